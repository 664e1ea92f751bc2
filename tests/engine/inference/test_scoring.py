"""Packed log-likelihoods against each request alone, and against `transformers`."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.inference.scoring import Request, Score, Scoring, score, shortened
from model.mistral import packed_attention
from model.weights import save_model


def requests_of(seed: int, count: int = 40, longest: int = 40) -> list[Request]:
    """Contexts that share beginnings, several continuations each, some of one token and some that begin another."""
    chooser = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [chooser.randrange(64) for _ in range(count)]

    examples = [[1, *tokens(12)] for _ in range(2)]
    requests: list[Request] = []
    while len(requests) < count:
        context = [*chooser.choice([*examples, [1]]), *tokens(chooser.randint(0, 8))]
        for _ in range(chooser.randint(1, 4)):
            requests.append(Request(context, tokens(chooser.choice([1, 1, 2, 5]))))
        requests.append(Request(context, [*requests[-1].continuation, *tokens(2)]))
    chooser.shuffle(requests)
    return [request for request in requests[:count] if len(request.text) <= longest]


@torch.no_grad()
def alone(model, request: Request) -> Score:
    """The request by itself, by the plain formula."""
    text = torch.tensor(request.text)
    attend = packed_attention(torch.tensor([0, len(text)]), model.config.sliding_window)
    logits = model.logits(model(text, torch.arange(len(text)), attend))[len(request.context) - 1 :]
    label = torch.tensor(request.continuation)
    log_prob = logits.double().log_softmax(-1).gather(1, label[:, None]).sum()
    return Score(float(log_prob), bool((logits.argmax(-1) == label).all()))


@pytest.mark.parametrize("window", [None, 5, 16])
@pytest.mark.parametrize("pack_tokens", [1, 60, 4000])
def test_a_pack_gives_the_scores_of_requests_alone(small_model, window, pack_tokens):
    model = small_model(sliding_window=window).to(torch.float64)
    requests = requests_of(0)
    scores = dict(score(model, requests, pack_tokens=pack_tokens))
    assert sorted(scores) == list(range(len(requests)))
    for number, request in enumerate(requests):
        expected = alone(model, request)
        assert scores[number].log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
        assert scores[number].greedy == expected.greedy
    # The likeliest continuations of all are greedy.
    greedy = [Request(request.context, [int(likeliest(model, request.context))]) for request in requests]
    assert all(result.greedy for _, result in score(model, greedy, pack_tokens=pack_tokens))


def likeliest(model, context: list[int]) -> torch.Tensor:
    text = torch.tensor(context)
    attend = packed_attention(torch.tensor([0, len(text)]), model.config.sliding_window)
    return model.logits(model(text, torch.arange(len(text)), attend))[-1].argmax()


def test_float32_scores_are_transformers(small_model, tmp_path):
    model = small_model(sliding_window=16, initializer_range=0.1)
    save_model(model, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    requests = requests_of(1)
    for number, ours in score(model, requests):
        request = requests[number]
        with torch.no_grad():
            logits = reference(torch.tensor([request.text])).logits[0, len(request.context) - 1 :]
        label = torch.tensor(request.continuation)
        assert ours.log_likelihood == pytest.approx(float(logits.log_softmax(-1).gather(1, label[:, None]).sum()), abs=1e-5)
        assert ours.greedy == bool((logits.argmax(-1) == label).all())


def test_places_are_counted(small_model):
    """Letters after one question are read at its last place; the examples before all questions are read once."""
    examples = list(range(30))
    requests = [Request([*examples, 40 + number, 2, 3], [letter]) for number in range(10) for letter in (50, 51, 52, 53)]
    plan = Scoring(requests, pack_tokens=1000, longest=128)
    assert (plan.places, plan.places_alone) == (30 + 10 * 3, 40 * 33)
    model = small_model()
    results = plan.score(model, plan.packs[0])
    assert math.isclose(results[7].log_likelihood, alone(model, requests[7]).log_likelihood, abs_tol=1e-5)


def test_of_equally_likely_tokens_the_first_is_greedy_and_padding_rows_take_no_probability(small_model):
    model = small_model(vocab_size=128, unpadded_vocab_size=64)
    model.lm_head.weight[64:] = 10 * model.lm_head.weight[:64]
    best = int(likeliest(model, [1, 2]))
    twin = 63 if best != 63 else 62
    model.lm_head.weight[twin] = model.lm_head.weight[best]
    results = dict(score(model, [Request([1, 2], [token]) for token in range(64)]))
    assert [number for number, result in results.items() if result.greedy] == [min(best, twin)]
    assert math.isclose(sum(math.exp(result.log_likelihood) for result in results.values()), 1, abs_tol=1e-5)


def test_portions_of_the_head_change_nothing(small_model, monkeypatch):
    model, requests = small_model(), requests_of(2)
    expected = dict(score(model, requests))
    monkeypatch.setattr("engine.inference.scoring.default_budget", lambda device: 4 * 64 * 3)
    for number, result in score(model, requests):
        assert result.log_likelihood == pytest.approx(expected[number].log_likelihood, abs=1e-5)
        assert result.greedy == expected[number].greedy


def test_a_request_that_is_too_long_keeps_its_first_token_and_its_end():
    assert shortened(Request([1, 2, 3, 4, 5], [6, 7]), 4) == Request([1, 4, 5], [6, 7])
    assert shortened(Request([1, 2], [6, 7]), 3) == Request([1, 2], [6, 7])
    with pytest.raises(ValueError, match="continuation of 9 tokens does not fit the model's 8 positions"):
        shortened(Request([1, 2, 3], list(range(9))), 8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "request 1 has no context"),
        (Request([1], []), "request 1 has no continuation"),
        (Request([1] * 128, [1, 2]), "request 1 has 129 tokens to read: the model's max_position_embeddings is 128"),
    ],
)
def test_requests_that_cannot_be_scored_are_named_before_any_computation(small_model, request_, message):
    with pytest.raises(ValueError, match=message):
        next(score(small_model(), [Request([1], [2]), request_]))


def test_damaged_weights_are_named(small_model):
    model = small_model()
    model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        next(score(model, [Request([1], [2])]))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_a_gpu_gives_the_scores_of_the_cpu(small_model, window):
    model, requests = small_model(sliding_window=window, head_dim=16), requests_of(3)
    expected = dict(score(model, requests, pack_tokens=200))
    for number, result in score(model.to("cuda"), requests, pack_tokens=200):
        assert result.log_likelihood == pytest.approx(expected[number].log_likelihood, abs=1e-4)
        assert result.greedy == expected[number].greedy
