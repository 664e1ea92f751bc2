"""Filters, greedy and sampled generation against `transformers`, seeds, limits and errors."""

import math
import warnings

import pytest
import torch
from transformers.generation import logits_process as reference

from model.generate import (
    Past,
    Sampling,
    filter_logits,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)


def random_logits():
    """Scores by name: plain, rounded coarsely (ties), all equal, one certain, some dropped already."""
    generator = torch.Generator().manual_seed(0)
    plain = 4 * torch.randn(500, generator=generator)
    certain = plain.clone()
    certain[17] = 1000.0
    dropped = plain.clone()
    dropped[::3] = -math.inf
    return {
        "plain": plain,
        "flat": plain / 100,
        "ties": plain.round(),
        "few": plain[:2],
        "one": plain[:1],
        "equal": torch.zeros(100),
        "certain": certain,
        "dropped": dropped,
    }


LOGITS = random_logits()
SHAPES = [(5, 4, 2), (2, 4, 2), (None, 4, 2), (5, 4, 1), (16, 4, 4)]
NO_IDS = torch.zeros(1, 1, dtype=torch.int64)


@pytest.fixture(params=LOGITS)
def logits(request):
    return LOGITS[request.param].clone()


@pytest.mark.parametrize("top_k", [1, 2, 7, 499, 500, 10000])
def test_top_k_equals_transformers(logits, top_k):
    assert torch.equal(keep_top_k(logits, top_k), reference.TopKLogitsWarper(top_k)(NO_IDS, logits[None])[0])


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.95, 0.999999])
def test_top_p_equals_transformers(logits, top_p):
    assert torch.equal(keep_top_p(logits, top_p), reference.TopPLogitsWarper(top_p)(NO_IDS, logits[None])[0])


@pytest.mark.parametrize("min_p", [1e-9, 0.01, 0.1, 0.5, 1.0])
def test_min_p_equals_transformers(logits, min_p):
    assert torch.equal(keep_min_p(logits, min_p), reference.MinPLogitsWarper(min_p)(NO_IDS, logits[None])[0])


@pytest.mark.parametrize("penalty", [0.5, 1.15, 10.0])
@pytest.mark.parametrize("ids", [[0], [0, 0, 0], list(range(0, 500, 3))])
def test_repetition_penalty_equals_transformers(logits, penalty, ids):
    ids = [token for token in ids if token < len(logits)]
    seen = torch.zeros(len(logits), dtype=torch.bool)
    seen[ids] = True
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None])[0]
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


SAMPLINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.7, "top_k": 12},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_sampling_equals_transformers_generate(small_model, reference_of, options):
    """Its own pipeline chooses the filters and their order; with the same seed even the draws are equal."""
    model = small_model(initializer_range=0.15)
    prompt = [1, 5, 9, 5, 30, 2, 11, 44]
    torch.manual_seed(7)
    theirs = reference_of(model).generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"top_k": 0, **options},
    )
    ids = theirs.sequences[0].tolist()
    sampling = Sampling(**options, max_new_tokens=12, seed=7)
    for step, (raw, filtered) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        seen = torch.zeros(64, dtype=torch.bool)
        seen[ids[: len(prompt) + step]] = True
        assert torch.equal(filter_logits(raw[0], seen, sampling), filtered[0])
    assert list(generate(model, prompt, sampling)) == ids[len(prompt) :]


def reference_greedy(reference, prompt: list[int], **options) -> list[int]:
    # Without a mask it would take token 0 in a prompt for padding.
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask, **options}
    return reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def greedy(model, prompt: list[int], max_new_tokens: int, **options) -> list[int]:
    return list(generate(model, prompt, Sampling(temperature=0.0, max_new_tokens=max_new_tokens, **options)))


def random_prompt(length: int) -> list[int]:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize(("window", "heads", "kv_heads"), SHAPES)
def test_greedy_equals_transformers_generate(small_model, reference_of, window, heads, kv_heads):
    """Prompts shorter and longer than the window, answers past it."""
    model = small_model(sliding_window=window, num_attention_heads=heads, num_key_value_heads=kv_heads)
    reference = reference_of(model)
    for length in (1, 4, 40):
        ours = greedy(model, random_prompt(length), 20)
        assert ours == reference_greedy(reference, random_prompt(length), max_new_tokens=20)
        assert len(set(ours)) > 3, "a text that repeats itself proves little"


def test_a_window_of_one_equals_transformers_without_its_cache(small_model, reference_of):
    model = small_model(sliding_window=1)
    theirs = reference_greedy(reference_of(model), [3, 4, 5], max_new_tokens=12, use_cache=False)
    assert greedy(model, [3, 4, 5], 12) == theirs


def test_a_prompt_of_several_chunks_equals_transformers(small_model, reference_of, monkeypatch):
    monkeypatch.setattr("model.generate._PREFILL_CHUNK", 250)
    model = small_model(sliding_window=100, max_position_embeddings=1024)
    prompt = random_prompt(600)
    assert greedy(model, prompt, 8) == reference_greedy(reference_of(model), prompt, max_new_tokens=8)


def test_greedy_applies_the_repetition_penalty_as_transformers_does(small_model, reference_of):
    model = small_model()
    theirs = reference_greedy(reference_of(model), [1, 2, 3], max_new_tokens=20, repetition_penalty=1.5)
    assert greedy(model, [1, 2, 3], 20, repetition_penalty=1.5) == theirs
    assert greedy(model, [1, 2, 3], 20) != theirs


def test_padding_rows_are_never_sampled_here_nor_from_the_exported_folder(small_model, reference_of):
    model = small_model(vocab_size=128, unpadded_vocab_size=70)
    # The padding rows would win every time.
    model.lm_head.weight[70:] = 10 * model.lm_head.weight[:58]
    ours = greedy(model, [1, 2, 3], 15)
    assert max(ours) < 70
    assert ours == reference_greedy(reference_of(model), [1, 2, 3], max_new_tokens=15)
    assert max(generate(model, [1, 2, 3], Sampling(temperature=2.0, max_new_tokens=40))) < 70


def test_a_seed_repeats_and_leaves_the_global_random_state_alone(small_model):
    model = small_model(initializer_range=0.05)
    sampled = Sampling(max_new_tokens=30, seed=3)
    torch.manual_seed(0)
    first = list(generate(model, [1], sampled))
    assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    assert list(generate(model, [1], sampled)) == first
    assert list(generate(model, [1], Sampling(max_new_tokens=30, seed=4))) != first


def test_answers_stream_and_do_not_disturb_each_other(small_model):
    model = small_model(initializer_range=0.05)
    sampled = Sampling(max_new_tokens=20)
    alone = list(generate(model, [1, 2], sampled))
    one, two = generate(model, [1, 2], sampled), generate(model, [1, 2], sampled)
    interleaved = [(next(one), next(two)) for _ in range(20)]
    assert interleaved == [(token, token) for token in alone]
    # Between two tokens the caller's own tensors still record gradients.
    stream = generate(model, [1, 2], sampled)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_an_answer_ends_with_its_stop_token(small_model):
    model = small_model()
    unstopped = greedy(model, [1], 20)
    stop = unstopped[10]
    sampling = Sampling(temperature=0.0, max_new_tokens=20)
    assert list(generate(model, [1], sampling, stop_ids=[stop])) == unstopped[: unstopped.index(stop) + 1]


@pytest.mark.parametrize("window", [5, None])
def test_an_answer_ends_at_the_last_position_and_a_longer_prompt_is_refused(small_model, window):
    model = small_model(sliding_window=window, max_position_embeddings=16)
    sampling = Sampling(max_new_tokens=100)
    assert len(list(generate(model, [1] * 10, sampling))) == 6
    assert len(list(generate(model, [1] * 15, sampling))) == 1
    for length in (16, 17):
        with pytest.raises(ValueError, match=f"prompt of {length} tokens.*max_position_embeddings = 16"):
            generate(model, [1] * length, sampling)


def test_wrong_prompts_are_refused_before_any_computation(small_model):
    model = small_model(vocab_size=128, unpadded_vocab_size=100)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [], Sampling())
    for token in (-1, 100, 128):
        with pytest.raises(ValueError, match=f"prompt token {token}: the vocabulary has 100 pieces"):
            generate(model, [1, token], Sampling())


def test_damaged_weights_are_named(small_model):
    model = small_model()
    model.norm.weight[0] = math.nan
    for sampling in (Sampling(), Sampling(temperature=0.0)):
        with pytest.raises(ValueError, match="not finite"):
            next(generate(model, [1, 2], sampling))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0\.1: must be"),
        ({"temperature": 1e-9}, "temperature = 1e-09: must be"),
        ({"temperature": math.nan}, "temperature = nan: must be"),
        ({"temperature": math.inf}, "temperature = inf: must be"),
        ({"top_k": -1}, "top_k = -1: must be"),
        ({"top_p": 0.0}, r"top_p = 0\.0: must lie in"),
        ({"top_p": 1.1}, r"top_p = 1\.1: must lie in"),
        ({"top_p": math.nan}, "top_p = nan: must lie in"),
        ({"min_p": -0.1}, r"min_p = -0\.1: must lie in"),
        ({"min_p": 2.0}, r"min_p = 2\.0: must lie in"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0: must be"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf: must be"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be"),
        ({"seed": -1}, "seed = -1: must lie in"),
        ({"temperature": 0.0, "top_k": 5}, "top_k = 5 has no effect with temperature = 0"),
        ({"temperature": 0.0, "top_p": 0.5}, r"top_p = 0\.5 has no effect with temperature = 0"),
        ({"temperature": 0.0, "min_p": 0.5}, r"min_p = 0\.5 has no effect with temperature = 0"),
    ],
)
def test_wrong_sampling_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "heads", "kv_heads"), SHAPES)
def test_a_gpu_gives_the_greedy_text_of_the_cpu_and_repeats_its_samples(small_model, window, heads, kv_heads):
    model = small_model(sliding_window=window, num_attention_heads=heads, num_key_value_heads=kv_heads)
    expected = greedy(model, random_prompt(40), 20)
    model.to("cuda")
    assert greedy(model, random_prompt(40), 20) == expected
    sampling = Sampling(top_p=0.9, min_p=0.01, top_k=40, repetition_penalty=1.1, max_new_tokens=20, seed=3)
    assert list(generate(model, [1, 2], sampling)) == list(generate(model, [1, 2], sampling))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}], ids=str)
def test_the_host_waits_for_a_gpu_once_a_token(small_model, options):
    model = small_model(sliding_window=16).to("cuda")

    def waits(tokens: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                assert len(list(generate(model, random_prompt(40), Sampling(**options, max_new_tokens=tokens)))) == tokens
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    # The first call compiles.
    waits(2)
    assert waits(12) - waits(4) == 8


def test_a_past_changes_only_the_number_of_tokens_read(small_model, monkeypatch):
    """Texts that continue, leave and forget the text before, and an answer that was stopped midway."""
    model = small_model(sliding_window=12, max_position_embeddings=120).to(torch.float64)
    past, read = Past(model), []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, tokens, *rest: (read.append(len(tokens)), forward(self, tokens, *rest))[1]
    )
    greedy = Sampling(temperature=0.0, max_new_tokens=4)
    text = [1, 5, 9]
    for question, unread in (([3, 4], 5), ([7], 2), ([8, 2, 6], 4)):
        text += question
        expected = list(generate(model, text, greedy))
        read.clear()
        assert list(generate(model, text, greedy, past=past)) == expected
        # The last token of an answer was chosen but not read.
        assert read == [unread, 1, 1, 1]
        text += expected
    other = [1, 5, 9, 3, 4, 60]
    stream = generate(model, other, greedy, past=past)
    assert next(stream) == next(generate(model, other, greedy))
    stream.close()
    assert list(generate(model, [2, 2], greedy, past=past)) == list(generate(model, [2, 2], greedy))
