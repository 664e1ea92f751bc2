"""Objectives against `transformers`, the papers' formulas and the definitions of their metrics."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from engine.data.batch import Packing, evaluation_batches, make_step
from engine.data.dataset import TokenDataset
from engine.data.plan import Plan
from engine.loop import accumulate
from engine.objectives.heldout import Evaluation, evaluate
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference, preference_loss, reference_log_probs
from engine.objectives.scoring import document_log_probs, token_log_probs
from engine.settings.sections import PreferenceSettings, Source
from model.mistral import Mistral, initialize
from model.weights import load_model, save_model


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model without padding rows, which `transformers` would count as pieces."""
    model = Mistral(replace(load_model(tiny_model).config, unpadded_vocab_size=384))
    initialize(model, 2)
    folder = tmp_path_factory.mktemp("whole")
    save_model(model, folder)
    return folder


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def documents(folder):
    """(tokens [1, L], labels [1, L] with -100 where not trained on) of a prepared folder."""
    dataset = TokenDataset.open(folder)
    for i in range(len(dataset)):
        tokens = torch.from_numpy(dataset.tokens(i).astype("int64"))
        yield tokens[None], tokens.masked_fill(~torch.from_numpy(dataset.trained(i)), -100)[None]


def batches_of(folder, pack_tokens, **layout):
    return evaluation_batches(TokenDataset.open(folder), Packing(16, pack_tokens), 64, **layout)


def their_loss(theirs, folder):
    """The mean over all labels of a folder, as `transformers` computes it with gradient accumulation."""
    items = sum(int((labels[:, 1:] != -100).sum()) for _, labels in documents(folder))
    with torch.no_grad():
        losses = [
            float(theirs(tokens, labels=labels, num_items_in_batch=torch.tensor(items)).loss)
            for tokens, labels in documents(folder)
        ]
    return sum(losses)


def their_answer_log_probs(theirs, folder):
    """[pairs, 2]: summed log-probabilities of (chosen, rejected) answers."""
    sums = []
    with torch.no_grad():
        for tokens, labels in documents(folder):
            scores = theirs(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            sums.append(float(scores[labels[0, 1:] != -100].sum()))
    return torch.tensor(sums).view(-1, 2)


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_the_loss_of_a_step_equals_transformers(model, theirs, tiny_data, kind):
    folder = getattr(tiny_data, kind)
    plan = Plan(
        [TokenDataset.open(folder)],
        [Source("x")],
        seed=0,
        context_length=64,
        step_size=10**6,
        steps=None,
        epochs=1,
    )
    assert plan.steps == 1
    step = make_step(plan, 0, Packing(16, 200))
    assert len(step.batches) > 3
    loss = accumulate(model, NextToken(), step)["loss"]
    assert float(loss) == pytest.approx(their_loss(theirs, folder), rel=1e-5)


def test_evaluation_is_the_mean_over_the_whole_set_without_noise(model, theirs, tiny_data):
    batches = batches_of(tiny_data.conversations_heldout, 64)
    assert len(batches) > 1
    found = evaluate(model, [Evaluation("chat", NextToken(neftune_alpha=15.0), batches.as_step())])
    assert model.training
    assert found == {"eval/chat/loss": pytest.approx(their_loss(theirs, tiny_data.conversations_heldout), rel=1e-5)}


def test_padding_rows_take_no_probability(tiny_model, tiny_data):
    model = load_model(tiny_model)
    with torch.no_grad():
        # The padding rows would be the most likely pieces.
        model.lm_head.weight[340:] = 100 * model.lm_head.weight[:44]
    (batch,) = batches_of(tiny_data.text_heldout, 1000)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found = document_log_probs(token_log_probs(model, batch), batch)
        for i, (tokens, _) in enumerate(documents(tiny_data.text_heldout)):
            scores = reference(tokens).logits[0, :-1, :340].log_softmax(-1).gather(1, tokens[0, 1:, None])
            assert float(found[i]) == pytest.approx(float(scores.sum()), rel=1e-5)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_answer_log_probs_equal_transformers(model, theirs, tiny_data, share_prompts):
    batches = batches_of(tiny_data.preferences, 100, share_prompts=share_prompts)
    assert any(batch.tokens_saved for batch in batches) == share_prompts
    table = reference_log_probs(model, batches, 32)
    assert model.training
    torch.testing.assert_close(table, their_answer_log_probs(theirs, tiny_data.preferences), rtol=1e-5, atol=1e-4)


def test_pairs_without_a_score_are_nan(model, tiny_data):
    pairs = TokenDataset.open(tiny_data.preferences)
    batches = evaluation_batches(pairs, Packing(16, 100), 64, limit=3)
    table = reference_log_probs(model, batches, 32)
    assert table[:3].isfinite().all()
    assert table[3:].isnan().all()


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


MARGINS = [-30.0, -3.0, -0.2, 0.0, 0.7, 5.0, 12.0]


def loss_of(chosen, rejected, **changes):
    pair = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected)]
    return float(preference_loss(*pair, PreferenceSettings(**changes)))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("chosen", [-4.0, 0.0, 2.5])
@pytest.mark.parametrize("margin", MARGINS)
def test_losses_are_the_papers_formulas(margin, chosen, beta):
    """chosen: its log(policy / reference). margin: chosen minus the rejected answer's."""
    rejected = chosen - margin

    def loss(kind, **changes):
        return loss_of(chosen, rejected, loss=kind, beta=beta, **changes)

    dpo = -math.log(sigmoid(beta * margin))  # Rafailov et al. 2023, equation 7
    flipped = -math.log(sigmoid(-beta * margin))
    assert loss("sigmoid") == pytest.approx(dpo, rel=1e-12)
    assert loss("sigmoid-mean") == pytest.approx(dpo, rel=1e-12)
    for epsilon in (0.1, 0.4):
        # Mitchell 2023, equation 3; Chowdhury et al. 2024, equation 12
        assert loss("sigmoid", label_smoothing=epsilon) == pytest.approx((1 - epsilon) * dpo + epsilon * flipped, rel=1e-12)
        robust = ((1 - epsilon) * dpo - epsilon * flipped) / (1 - 2 * epsilon)
        assert loss("robust", label_smoothing=epsilon) == pytest.approx(robust, rel=1e-9, abs=1e-12)
    assert loss("ipo") == pytest.approx((margin - 1 / (2 * beta)) ** 2, rel=1e-12)  # Azar et al. 2023, equation 17
    assert loss("hinge") == pytest.approx(max(0.0, 1 - beta * margin), rel=1e-12)  # Zhao et al. 2023
    # D'Oosterlinck et al. 2024: raise the chosen answer and lower the rejected one; lower both, the rejected one more.
    zero = 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
    down = sigmoid(beta * chosen) + 1 - sigmoid(beta * margin)
    assert loss("apo-zero") == pytest.approx(zero, rel=1e-12)
    assert loss("apo-down") == pytest.approx(down, rel=1e-12)
    # Meng et al. 2024, equation 6
    assert loss("simpo", target_margin=0.8) == pytest.approx(-math.log(sigmoid(beta * margin - 0.8)), rel=1e-12)


@given(st.floats(-20, 20), st.floats(0.05, 1), st.floats(0.01, 0.45))
@settings(max_examples=50, deadline=None)
def test_robust_dpo_over_flipped_labels_is_dpo_over_true_labels(margin, beta, flipped):
    """In expectation; the property that its paper asks for."""
    changes = {"loss": "robust", "beta": beta, "label_smoothing": flipped}
    expected = (1 - flipped) * loss_of(margin, 0.0, **changes) + flipped * loss_of(-margin, 0.0, **changes)
    assert expected == pytest.approx(loss_of(margin, 0.0, beta=beta), rel=1e-9, abs=1e-9)


@given(st.floats(-50, 50), st.floats(0.01, 2), st.floats(0, 0.49))
@settings(max_examples=50, deadline=None)
def test_conservative_dpo_has_its_minimum_where_the_policys_belief_is_the_share_of_true_labels(margin, beta, smoothing):
    """The minimum lies at sigmoid(beta * margin) = 1 - smoothing (Mitchell 2023). DPO has its minimum at infinity."""
    chosen = PreferenceSettings(beta=beta, label_smoothing=smoothing)
    value = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    preference_loss(value, torch.zeros_like(value), chosen).sum().backward()
    assert float(value.grad) == pytest.approx(beta * (sigmoid(beta * margin) - (1 - smoothing)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "sft_weight"),
    [
        ("sigmoid", 0.0),
        ("sigmoid-mean", 0.0),
        ("ipo", 0.0),
        ("ipo-mean", 0.5),
        ("hinge", 0.0),
        ("apo-zero", 0.0),
        ("simpo", 0.0),
        ("simpo", 0.25),
    ],
)
def test_losses_and_metrics_of_a_step(model, theirs, tiny_data, kind, sft_weight):
    """Against plain arithmetic on the log-probabilities of `transformers` and a reference table."""
    beta = 0.2
    scores = their_answer_log_probs(theirs, tiny_data.preferences).double()
    reference = (scores + 8 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) - 4).float()
    lengths = [int((labels[:, 1:] != -100).sum()) for _, labels in documents(tiny_data.preferences)]
    chosen_settings = PreferenceSettings(loss=kind, beta=beta, sft_weight=sft_weight)
    objective = Preference(chosen_settings, [] if kind == "simpo" else [reference])
    found = evaluate(model, [Evaluation("p", objective, batches_of(tiny_data.preferences, 100).as_step())])

    losses, chosen, rejected, nll = [], [], [], []
    for i in range(32):
        counts = lengths[2 * i : 2 * i + 2]
        ratios = [float(scores[i, side] - (0 if kind == "simpo" else reference[i, side])) for side in (0, 1)]
        means = [ratio / count for ratio, count in zip(ratios, counts, strict=True)]
        rewards = means if kind == "simpo" else ratios
        chosen.append(beta * rewards[0])
        rejected.append(beta * rewards[1])
        scored = means if kind in ("sigmoid-mean", "ipo-mean", "simpo") else ratios
        margin = scored[0] - scored[1]
        losses.append(
            max(0.0, 1 - beta * margin)
            if kind == "hinge"
            else (margin - 1 / (2 * beta)) ** 2
            if kind.startswith("ipo")
            else 1 - sigmoid(beta * scored[0]) + sigmoid(beta * scored[1])
            if kind == "apo-zero"
            else -math.log(sigmoid(beta * margin))
        )
        nll.append(-float(scores[i, 0]) / counts[0])
    expected = {
        "loss": sum(losses) / 32 + sft_weight * sum(nll) / 32,
        "rewards/chosen": sum(chosen) / 32,
        "rewards/rejected": sum(rejected) / 32,
        "rewards/margins": sum(c - r for c, r in zip(chosen, rejected, strict=True)) / 32,
        "rewards/accuracies": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 32,
        "logps/chosen": float(scores[:, 0].mean()),
        "logps/rejected": float(scores[:, 1].mean()),
    }
    if sft_weight:
        expected["nll"] = sum(nll) / 32
    assert 0 < expected["rewards/accuracies"] < 1
    assert found == {f"eval/p/{name}": pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in expected.items()}


@pytest.mark.parametrize(("kind", "loss"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("ipo-mean", 25.0), ("hinge", 1.0)])
def test_before_the_first_step_the_margin_is_zero(model, tiny_data, kind, loss):
    """Although the reference and the policy run in different packs. 25 = (1 / (2 * 0.1))^2.

    Evaluation adds no NEFTune noise.
    """
    reference = reference_log_probs(model, batches_of(tiny_data.preferences, 300), 32)
    objective = Preference(PreferenceSettings(loss=kind), [reference], neftune_alpha=15.0)
    found = evaluate(model, [Evaluation("p", objective, batches_of(tiny_data.preferences, 60).as_step())])
    assert found["eval/p/loss"] == pytest.approx(loss, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert found[f"eval/p/{name}"] == pytest.approx(0, abs=1e-5), name


def test_each_source_reads_its_own_reference(model, tiny_data):
    """Pairs are numbered within their source."""
    datasets = [TokenDataset.open(folder) for folder in (tiny_data.preferences, tiny_data.preferences_heldout)]
    plan = Plan(datasets, [Source("a"), Source("b")], seed=0, context_length=64, step_size=100, steps=None, epochs=1)
    tables = [
        reference_log_probs(model, batches_of(folder, 100), count)
        for folder, count in ((tiny_data.preferences, 32), (tiny_data.preferences_heldout, 6))
    ]
    step = make_step(plan, 0, Packing(16, 100))
    assert step.pairs == 38
    values = accumulate(model, Preference(PreferenceSettings(), tables), step)
    assert float(values["rewards/margins"]) == pytest.approx(0, abs=1e-5)
    assert float(values["loss"]) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "preference.beta = 0.0"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing = 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing has no effect with the ipo loss"),
        ({"loss": "robust"}, "'robust': needs preference.label_smoothing"),
        ({"target_margin": 0.5}, "target_margin has no effect with the sigmoid loss"),
        ({"sft_weight": -1.0}, "preference.sft_weight = -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(**changes)
