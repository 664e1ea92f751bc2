"""The gradient of a step does not depend on the split of its tokens: in float64, against one document at a time."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.data.batch import Packing, make_step
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.data.plan import Plan
from engine.loop import accumulate
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference
from engine.objectives.scoring import token_log_probs
from engine.settings.sections import PreferenceSettings, Source
from kernels.embedding import EmbeddingNoise
from model.config import read_config
from model.mistral import Mistral, initialize, packed_attention
from model.weights import save_model

SEED = 7
WINDOW = 5
CONTEXT = {"text": 16, "conversations": 16, "preferences": 64}


@pytest.fixture(scope="module")
def model(tiny_model):
    """In float64, with a window shorter than the segments."""
    model = Mistral(replace(read_config(tiny_model), sliding_window=WINDOW)).double()
    initialize(model, 3)
    return model


@pytest.fixture(scope="module")
def plan_of(tiny_data):
    def make(*kinds: str, step_size: int) -> Plan:
        datasets = [TokenDataset.open(getattr(tiny_data, kind)) for kind in kinds]
        return Plan(
            datasets,
            [Source(kind) for kind in kinds],
            seed=SEED,
            context_length=CONTEXT[kinds[0]],
            step_size=step_size,
            steps=3,
            epochs=None,
        )

    return make


# (tokens of the prompt, of the chosen answer, of the rejected answer, places that can be shared)
PAIRS = [
    (0, 3, 9, 0),
    (1, 8, 2, 0),
    (2, 1, 1, 1),
    (4, 7, 3, 3),
    (5, 2, 12, 4),
    (6, 11, 10, 5),
    (17, 1, 9, 16),  # a prompt beyond the window
    (23, 14, 6, 22),
    (9, 4, 5, 3),  # a prompt with a trained token
    (8, 5, 3, 5),  # prompts that differ midway
]
TRAINED_PROMPT, DIFFERENT_PROMPTS = 8, 9


@pytest.fixture(scope="module")
def shared_plan(tmp_path_factory):
    """shared_plan(share) -> a plan of one step that holds all of PAIRS."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(5)
    with DatasetWriter(folder, "preferences", vocab_size=340, tokenizer_fingerprint="t") as writer:
        for number, (prompt, *answers, shared) in enumerate(PAIRS):
            common = torch.randint(340, (prompt,), generator=generator)
            for side, answer in enumerate(answers):
                ids = torch.cat([common, torch.randint(340, (answer,), generator=generator)])
                trained = torch.arange(len(ids)) >= prompt
                # The two answers begin differently.
                ids[prompt] = side
                if number == TRAINED_PROMPT:
                    trained[shared + 1] = True
                if number == DIFFERENT_PROMPTS:
                    ids[shared + 1] = side
                # A document of one token has no place.
                ids, trained = (torch.cat([part, part[:1]]) if len(ids) < 2 else part for part in (ids, trained))
                writer.add(ids.numpy(), trained.numpy(), prompt)
        writer.finish()
    dataset = TokenDataset.open(folder)
    assert dataset.shared_places.tolist() == [shared for *_, shared in PAIRS]

    def make(share: bool) -> Plan:
        return Plan(
            [dataset],
            [Source("pairs")],
            seed=SEED,
            context_length=64,
            step_size=len(PAIRS),
            steps=1,
            epochs=None,
            share_prompts=share,
        )

    return make


def split_gradients(model, objective, plan, step, *, pack_tokens, ranks=1, pad=False):
    """(gradients, values, micro-batches) of a global step, summed over its ranks. pad: as for a GPU."""
    model.zero_grad()
    values: dict[str, torch.Tensor] = {}
    batches = 0
    for rank in range(ranks):
        window = model.config.sliding_window
        part = make_step(plan, step, Packing(window, pack_tokens, rank=rank, ranks=ranks, pad=pad))
        batches += len(part.batches)
        for name, value in accumulate(model, objective, part).items():
            values[name] = values.get(name, 0) + value
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, values, batches


def segments(plan, step):
    """(document id, tokens of the whole document, trained, first place, places) of each segment of a step."""
    units = plan.units(step)
    for source, document, start, places in zip(
        *(column.tolist() for column in (units.source, units.document, units.start, units.places)), strict=True
    ):
        dataset = plan.datasets[source]
        tokens = torch.from_numpy(dataset.tokens(document).astype("int64"))
        yield plan.document_offsets[source] + document, tokens, torch.from_numpy(dataset.trained(document)), start, places


def segment_log_probs(model, document, tokens, start, places, *, alpha, step, prompt=(0, 0, 0)):
    """Log-probability of each label of one segment, alone in its row, by autograd through all logits.

    prompt: number of places at the start with another document's noise, and the other document's id and length.
    """
    inside = torch.arange(places)
    common, other, length = prompt
    noise = EmbeddingNoise(
        alpha=alpha,
        seed=SEED,
        step=step,
        document_T=torch.where(inside < common, other, document),
        position_T=start + inside,
        length_T=torch.where(inside < common, length, len(tokens)),
    )
    attend = packed_attention(torch.tensor([0, places], dtype=torch.int32), model.config.sliding_window)
    hidden = model(tokens[start : start + places], inside, attend, noise if alpha else None)
    logits = hidden @ model.lm_head.weight[: model.config.unpadded_vocab_size].T
    return logits.log_softmax(-1)[inside, tokens[start + 1 : start + places + 1]]


def lone_next_token_gradients(model, plan, step, alpha):
    model.zero_grad()
    total = weight = 0.0
    for document, tokens, trained, start, places in segments(plan, step):
        predicted = trained[start + 1 : start + places + 1].double()
        scores = segment_log_probs(model, document, tokens, start, places, alpha=alpha, step=step)
        total = total - (predicted * scores).sum()
        weight += float(predicted.sum())
    (total / weight).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, float(total.detach() / weight)


def lone_dpo_gradients(model, plan, step, alpha, reference, beta):
    model.zero_grad()
    sums = []
    for document, tokens, trained, start, places in segments(plan, step):
        dataset, chosen = plan.datasets[0], document - document % 2
        common = int(dataset.shared_places[document // 2]) if plan.share_prompts else 0
        prompt = (common, chosen, int(dataset.lengths[chosen]))
        scores = segment_log_probs(model, document, tokens, start, places, alpha=alpha, step=step, prompt=prompt)
        sums.append((trained[1:].double() * scores).sum() - reference[document // 2, document % 2])
    losses = [
        torch.nn.functional.softplus(-beta * (chosen - rejected))
        for chosen, rejected in zip(sums[0::2], sums[1::2], strict=True)
    ]
    mean = torch.stack(losses).mean()
    mean.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, float(mean.detach())


def difference(found, expected):
    """Largest difference of a parameter's gradient, relative to the parameter's largest gradient."""
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


@pytest.mark.parametrize(("kinds", "alpha"), [(("text",), 0.0), (("conversations",), 5.0), (("conversations", "text"), 10.0)])
def test_next_token_gradients_equal_those_of_documents_one_at_a_time(model, plan_of, kinds, alpha):
    plan = plan_of(*kinds, step_size=150)
    step = 1
    expected, loss = lone_next_token_gradients(model, plan, step, alpha)
    counts = []
    for pack_tokens, ranks, pad in [(16, 1, False), (45, 1, True), (1000, 1, False), (45, 2, False), (1000, 3, True)]:
        found, values, batches = split_gradients(
            model, NextToken(neftune_alpha=alpha, seed=SEED), plan, step, pack_tokens=pack_tokens, ranks=ranks, pad=pad
        )
        assert difference(found, expected) < 1e-12
        assert float(values["loss"]) == pytest.approx(loss, rel=1e-13)
        counts.append(batches)
    assert counts[2] == 1
    assert len(set(counts)) >= 4


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_dpo_gradients_equal_those_of_documents_one_at_a_time(model, plan_of, alpha):
    plan = plan_of("preferences", step_size=7)
    reference = -30 - 10 * torch.rand(32, 2, generator=torch.Generator().manual_seed(0))
    expected, loss = lone_dpo_gradients(model, plan, 1, alpha, reference.double(), beta=0.3)
    objective = Preference(PreferenceSettings(beta=0.3), [reference], neftune_alpha=alpha, seed=SEED)
    counts = []
    for pack_tokens, ranks in [(50, 1), (120, 1), (1000, 1), (120, 2), (1000, 3)]:
        found, values, batches = split_gradients(model, objective, plan, 1, pack_tokens=pack_tokens, ranks=ranks)
        assert difference(found, expected) < 1e-12
        assert float(values["loss"]) == pytest.approx(loss, rel=1e-13)
        counts.append(batches)
    assert counts[2] == 1
    assert len(set(counts)) >= 3


@pytest.mark.parametrize(("window", "alpha"), [(1, 0.0), (5, 5.0), (9, 5.0), (None, 0.0)])
def test_gradients_with_shared_prompts_equal_those_of_documents_one_at_a_time(model, shared_plan, monkeypatch, window, alpha):
    monkeypatch.setattr(model, "config", replace(model.config, sliding_window=window))
    plan, apart = shared_plan(True), shared_plan(False)
    reference = -30 - 10 * torch.rand(len(PAIRS), 2, generator=torch.Generator().manual_seed(0))
    expected, loss = lone_dpo_gradients(model, plan, 0, alpha, reference.double(), beta=0.3)
    objective = Preference(PreferenceSettings(beta=0.3), [reference], neftune_alpha=alpha, seed=SEED)
    counts = []
    for number, (pack_tokens, ranks) in enumerate([(plan.longest_unit, 1), (70, 1), (1000, 1), (70, 2), (1000, 3), (70, 12)]):
        found, values, batches = split_gradients(
            model, objective, plan, 0, pack_tokens=pack_tokens, ranks=ranks, pad=number % 2 > 0
        )
        assert difference(found, expected) < 1e-12
        assert float(values["loss"]) == pytest.approx(loss, rel=1e-13)
        counts.append(batches)
    assert counts[2] == 1
    assert counts[-1] == 12 > len(PAIRS), "two ranks without work"
    whole, values, more = split_gradients(model, objective, apart, 0, pack_tokens=70)
    assert more > counts[1]
    if alpha == 0:
        assert difference(whole, expected) < 1e-12
        assert float(values["loss"]) == pytest.approx(loss, rel=1e-13)
    step = make_step(plan, 0, Packing(window, 70))
    assert step.tokens_saved == sum(shared for *_, shared in PAIRS)
    assert step.tokens + step.tokens_saved == make_step(apart, 0, Packing(window, 70)).tokens


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_shares_its_prompt_never_sees_the_other(model, shared_plan, side):
    (batch,) = make_step(shared_plan(True), 0, Packing(WINDOW, 1000)).batches
    own = torch.zeros(len(batch.tokens_T), dtype=torch.bool)
    for start, end, prefix in batch.attention.segments:
        own[start:end] = prefix >= 0 and int(batch.document_T[start]) % 2 == side
    assert 0 < int(own.sum()) < len(own)
    # Change the inputs and keep the labels.
    changed = torch.where(own, (batch.tokens_T + 1) % 340, batch.tokens_T)
    with torch.no_grad():
        before, after = (token_log_probs(model, replace(batch, tokens_T=tokens)) for tokens in (batch.tokens_T, changed))
    trained = batch.weight_T > 0
    assert (before != after)[own & trained].all()
    assert torch.equal(before[~own], after[~own])
    assert before[~own & trained].all()


@pytest.mark.parametrize(("kind", "step_size"), [("text", 16), ("preferences", 1)])
def test_a_rank_without_work_adds_nothing(model, plan_of, kind, step_size):
    """The second rank of a step of one document or pair runs a filler, which has no reference."""
    plan = plan_of(kind, step_size=step_size)
    step = next(step for step in range(plan.steps) if len(plan.units(step).sizes) == 1 and plan.units(step).document[0])
    objective = NextToken()
    if kind == "preferences":
        reference = torch.full((32, 2), torch.nan)
        reference[plan.units(step).document // 2] = -30.0
        objective = Preference(PreferenceSettings(), [reference])
    alone, values, _ = split_gradients(model, objective, plan, step, pack_tokens=1000)
    shared, shared_values, batches = split_gradients(model, objective, plan, step, pack_tokens=1000, ranks=2)
    assert batches == 2
    assert difference(shared, alone) < 1e-12
    for name, value in values.items():
        assert float(shared_values[name]) == pytest.approx(float(value), rel=1e-13), name


def test_noise_changes_the_gradient_and_only_while_training(model, plan_of):
    plan = plan_of("conversations", step_size=150)
    quiet, noisy = NextToken(seed=SEED), NextToken(neftune_alpha=5.0, seed=SEED)
    step = make_step(plan, 0, Packing(WINDOW, 1000))
    gradients = [split_gradients(model, objective, plan, 0, pack_tokens=1000)[0] for objective in (quiet, noisy)]
    assert difference(*gradients) > 1e-3
    with torch.no_grad():
        model.eval()
        losses = [objective(model, batch, step)["loss"] for objective in (quiet, noisy) for batch in step.batches]
        model.train()
    assert losses[0] == losses[1]


def test_gradients_equal_transformers(model, plan_of, tmp_path):
    """Within float32: `transformers` normalises in float32 even in a float64 model."""
    config = replace(model.config, unpadded_vocab_size=model.config.vocab_size)
    whole = Mistral(config).double()
    whole.load_state_dict(model.state_dict())
    save_model(whole, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    plan = plan_of("text", step_size=150)
    weight = 0
    total = torch.zeros((), dtype=torch.float64)
    for _, tokens, _, start, places in segments(plan, 0):
        logits = reference(tokens[None, start : start + places]).logits[0]
        labels = tokens[start + 1 : start + places + 1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        weight += places
    (total / weight).backward()
    found, values, _ = split_gradients(whole, NextToken(), plan, 0, pack_tokens=45)
    assert float(values["loss"]) == pytest.approx(float(total.detach()) / weight, rel=1e-6)
    theirs = reference.model
    expected = {"embed_tokens.weight": theirs.embed_tokens.weight.grad, "lm_head.weight": reference.lm_head.weight.grad}
    expected["norm.weight"] = theirs.norm.weight.grad
    for i, layer in enumerate(theirs.layers):
        attention, mlp = layer.self_attn, layer.mlp
        stacks = {
            "self_attn.qkv_proj": (attention.q_proj, attention.k_proj, attention.v_proj),
            "self_attn.o_proj": (attention.o_proj,),
            "mlp.gate_up_proj": (mlp.gate_proj, mlp.up_proj),
            "mlp.down_proj": (mlp.down_proj,),
            "input_layernorm": (layer.input_layernorm,),
            "post_attention_layernorm": (layer.post_attention_layernorm,),
        }
        for name, parts in stacks.items():
            expected[f"layers.{i}.{name}.weight"] = torch.cat([part.weight.grad for part in parts])
    assert found.keys() == expected.keys()
    assert difference(found, expected) < 1e-5


def test_the_plan_splits_long_documents_and_its_steps_differ(plan_of):
    """The tests above rely on it."""
    plan = plan_of("text", step_size=150)
    starts = [start for step in range(plan.steps) for _, _, _, start, _ in segments(plan, step)]
    assert any(starts)
    steps = [[(document, start) for document, _, _, start, _ in segments(plan, step)] for step in range(plan.steps)]
    assert all(a != b for a, b in itertools.pairwise(steps))
