"""Batched generation against one text at a time, whatever stands beside a text."""

import itertools
import math
import random
import time

import pytest
import torch

from engine.inference import generation
from engine.inference.generation import Prompt, answers, generate_many
from model.config import MistralConfig
from model.generate import generate
from model.mistral import Mistral, initialize
from model.sampling import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=20)
SAMPLED = [
    Sampling(max_new_tokens=15),
    Sampling(temperature=0.7, top_p=0.9, max_new_tokens=25),
    Sampling(temperature=1.5, min_p=0.05, repetition_penalty=1.2, max_new_tokens=9),
    Sampling(top_k=7, max_new_tokens=12),
    Sampling(temperature=0.0, repetition_penalty=1.3, max_new_tokens=18),
    GREEDY,
]


def prompts_of(count: int, seed: int = 0, settings=SAMPLED) -> list[Prompt]:
    """Prompts of 1 to 40 tokens, some of which begin alike or are equal, with settings in turn and seeds of their own."""
    chooser = random.Random(seed)
    examples, prompts = [1, *(chooser.randrange(64) for _ in range(9))], []
    for number, sampling in zip(range(count), itertools.cycle(settings), strict=False):
        own = [chooser.randrange(64) for _ in range(chooser.choice([1, 2, 5, 30]))]
        ids = [[1, *own], [*examples, *own], examples][number % 3]
        stops = frozenset(chooser.sample(range(64), 3)) if number % 4 else frozenset()
        prompts.append(Prompt(ids, Sampling(**{**vars(sampling), "seed": number}), stops))
    return prompts


def alone(model, prompt: Prompt) -> list[int]:
    return list(generate(model, prompt.ids, prompt.sampling, stop_ids=prompt.stop_ids))


@pytest.mark.parametrize(("window", "rows"), [(None, 3), (5, 8), (12, 32)])
def test_every_text_is_the_one_generated_alone(small_model, window, rows):
    """In float32: prompts and answers longer than the window, rows that end at once and rows that enter late."""
    model, prompts = small_model(sliding_window=window), prompts_of(24)
    found = {answer.number: answer for answer in answers(model, prompts, rows=rows, pack_tokens=50)}
    assert sorted(found) == list(range(24))
    for number, prompt in enumerate(prompts):
        expected = alone(model, prompt)
        assert found[number].ids == expected
        assert found[number].end == ("stop" if expected[-1] in prompt.stop_ids else "length")


@pytest.mark.parametrize("window", [None, 12])
def test_scores_do_not_change_by_a_bit_with_the_texts_beside(small_model, monkeypatch, window):
    model, prompts = small_model(sliding_window=window), prompts_of(33, settings=[GREEDY])
    scores: dict[int, list[torch.Tensor]] = {}
    chosen = generation._chosen

    def record(logits, seen, texts):
        for row, text in enumerate(texts):
            scores.setdefault(text.number, []).append(logits[row].clone())
        return chosen(logits, seen, texts)

    monkeypatch.setattr(generation, "_chosen", record)
    list(answers(model, prompts, rows=32))
    together = dict(scores)
    for number, prompt in enumerate(prompts[:8]):
        scores.clear()
        list(answers(model, [prompt], rows=1))
        assert all(torch.equal(one, two) for one, two in zip(scores[0], together[number], strict=True))


def test_tokens_stream_and_prompts_are_asked_for_when_rows_are_free(small_model):
    model, asked = small_model(), []

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield Prompt([1, number % 60], GREEDY)

    stream = generate_many(model, endless(), rows=4)
    first = [next(stream) for _ in range(4)]
    assert [token.number for token in first] == asked == [0, 1, 2, 3]
    seen = list(itertools.islice(stream, 200))
    assert {token.number for token in seen} >= {4, 5, 6}
    ends = [token for token in seen if token.end]
    assert all(token.end == "length" for token in ends)
    # Between two tokens the caller's own tensors still record gradients.
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_text_ends_where_its_caller_says(small_model):
    model = small_model()
    unstopped = alone(model, Prompt([1, 2], GREEDY))
    pushed: list[int] = []

    def ends(token: int) -> bool:
        pushed.append(token)
        return len(pushed) == 7

    (answer,) = answers(model, [Prompt([1, 2], GREEDY, ends=ends)])
    assert (answer.ids, answer.end) == (unstopped[:7], "stop")
    assert pushed == answer.ids


def test_equal_prompts_are_read_once(small_model, monkeypatch):
    model, read = small_model(), []
    forward = Mistral.forward
    monkeypatch.setattr(
        Mistral, "forward", lambda self, tokens, *rest: (read.append(len(tokens)), forward(self, tokens, *rest))[1]
    )
    choices = [Prompt(list(range(40)), Sampling(max_new_tokens=1, seed=seed)) for seed in range(8)]
    assert len({tuple(answer.ids) for answer in answers(model, choices)}) > 1
    assert read == [48], "40 tokens, padded to a multiple of 16"


def test_the_last_position_ends_a_text_and_a_longer_prompt_is_named(small_model):
    model = small_model(max_position_embeddings=16, sliding_window=None)
    long = Sampling(temperature=0.0, max_new_tokens=100)
    lengths = {answer.number: len(answer.ids) for answer in answers(model, [Prompt([1] * 10, long), Prompt([1] * 15, long)])}
    assert lengths == {0: 6, 1: 1}
    for wrong, message in (([], "prompt 1: the prompt is empty"), ([1] * 16, "prompt 1: prompt of 16 tokens")):
        with pytest.raises(ValueError, match=message):
            list(answers(model, [Prompt([1], long), Prompt(wrong, long)]))
    with pytest.raises(ValueError, match="rows = 0"):
        generate_many(model, [], rows=0)
    assert list(answers(model, [])) == []


def test_global_random_state_is_neither_read_nor_changed(small_model):
    model, prompts = small_model(), prompts_of(5)
    torch.manual_seed(0)
    first = list(answers(model, prompts))
    assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    assert list(answers(model, prompts)) == first


def test_damaged_weights_are_named(small_model):
    model = small_model()
    model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        next(generate_many(model, [Prompt([1, 2], GREEDY)]))


@pytest.mark.slow
def test_32_rows_give_the_texts_of_one_at_a_time_and_both_print_their_tokens_a_cpu_second():
    config = MistralConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        sliding_window=4096,
        max_position_embeddings=4096,
    )
    model = Mistral(config)
    initialize(model, 0)
    model.requires_grad_(False)
    chooser = random.Random(0)
    greedy = Sampling(temperature=0.0, max_new_tokens=64)
    prompts = [Prompt([chooser.randrange(8192) for _ in range(chooser.randint(20, 60))], greedy) for _ in range(32)]

    start = time.process_time()
    one = [alone(model, prompt) for prompt in prompts[:2]]
    middle = time.process_time()
    many = {answer.number: answer.ids for answer in answers(model, prompts)}
    end = time.process_time()
    rates = sum(map(len, one)) / (middle - start), sum(map(len, many.values())) / (end - middle)
    print(f"\ntokens a CPU second: one at a time {rates[0]:.0f}, 32 rows {rates[1]:.0f}, {rates[1] / rates[0]:.1f} times")
    assert [many[0], many[1]] == one


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 12])
def test_a_gpu_gives_the_greedy_texts_of_the_cpu(small_model, window):
    model, prompts = small_model(sliding_window=window, head_dim=16), prompts_of(20, settings=[GREEDY])
    expected = {answer.number: answer.ids for answer in answers(model, prompts, rows=7)}
    model.to("cuda")
    assert {answer.number: answer.ids for answer in answers(model, prompts, rows=7)} == expected
