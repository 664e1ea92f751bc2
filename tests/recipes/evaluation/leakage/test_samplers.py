"""Hazards equal the foreign mass of the sampler's own distribution; sweeps measure and go on; pairs are made."""

import json

import numpy as np
import pytest
import torch

from engine.data.records import read_pair
from model.cache import KeyValueCache
from model.generate import filter_logits, generate
from model.sampling import Sampling
from model.vocabulary.chat import encode_chat, encode_prompt
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model
from recipes.evaluation.leakage.records import rate
from recipes.evaluation.leakage.samplers import Reference, distinct, foreign_pieces, foresee, generated, grid
from recipes.leakage import main

ASKED = [{"role": "user", "content": "the cat sees a dog"}]
SAMPLERS = [
    Sampling(),
    Sampling(temperature=0.5, min_p=0.1),
    Sampling(temperature=2.0, top_p=0.9, repetition_penalty=1.3),
    Sampling(temperature=0.0),
]


@pytest.fixture(scope="module")
def opened(tiny_model):
    tokenizer = Tokenizer.load(tiny_model)
    model = load_model(tiny_model, dtype=torch.float32, device="cpu", config=fitted_config(tiny_model, tokenizer))
    model.requires_grad_(False)
    return model, tokenizer


def test_pieces_of_other_scripts_are_foreign(opened):
    pieces = opened[1].pieces()
    english, japanese = (
        dict(zip(pieces, foreign_pieces(opened[1], language).tolist(), strict=True)) for language in ("en", "ja")
    )
    assert english["▁ねこ"]
    assert english["赤"]
    assert not english["▁cat"]
    assert english["<0xE3>"]
    assert not english["<0x41>"]
    assert not english["<0x80>"]  # goes on with a letter of any script
    assert not any(japanese[piece] for piece in ("▁ねこ", "赤", "▁cat", "<0xE3>"))
    assert japanese["<0xD0>"]


def test_the_hazard_is_the_samplers_own_foreign_mass(opened):
    model, tokenizer = opened
    reference = Reference(ASKED, "the red dog runs and it sees", "en")
    foreign = foreign_pieces(tokenizer, "en")
    found = foresee(model, tokenizer, reference, SAMPLERS, foreign)
    chat = encode_chat(tokenizer, [*ASKED, {"role": "assistant", "content": reference.response}])
    places = [place for place, trained in enumerate(chat.trained) if trained]
    # One place at a time, each from a pass of its own.
    for sampler, row in zip(SAMPLERS, found, strict=True):
        hazard, stays, kept = 0.0, 1.0, 0
        for place in places:
            text = torch.tensor(chat.ids[:place])
            cache = KeyValueCache(model.config, dtype=torch.float32, device=torch.device("cpu"))
            logits = model.logits(model(text, torch.arange(place), cache.attend)[-1:])[0]
            seen = torch.zeros(len(logits), dtype=torch.bool).index_fill_(0, text, True)
            chosen = filter_logits(logits, seen, sampler)
            if sampler.temperature == 0:
                shares = torch.zeros_like(chosen).index_fill_(0, chosen.argmax(), 1.0)
            else:
                shares = chosen.double().softmax(dim=-1)
            mass = float(shares[foreign].sum())
            hazard, stays, kept = hazard + mass, stays * (1 - mass), kept + int(shares[chat.ids[place]] > 0)
        assert row.tokens == len(places)
        assert row.hazard == pytest.approx(hazard, rel=1e-4, abs=1e-6)
        assert row.leak == pytest.approx(1 - stays, rel=1e-4, abs=1e-6)
        assert row.kept == kept


def test_foreign_tokens_of_the_reference_itself_do_not_count(opened):
    model, tokenizer = opened
    foreign = foreign_pieces(tokenizer, "en")
    row = foresee(model, tokenizer, Reference(ASKED, 'it sees "ねこ"', "en"), SAMPLERS[:1], foreign)[0]
    chat = encode_chat(tokenizer, [*ASKED, {"role": "assistant", "content": 'it sees "ねこ"'}])
    assert row.tokens == sum(trained and not foreign[id] for id, trained in zip(chat.ids, chat.trained, strict=True))
    assert row.tokens < sum(chat.trained)


def test_generated_answers_equal_those_of_one_at_a_time(opened):
    model, tokenizer = opened
    samplers = grid((0.0, 1.0), (0.0,), (1.0,), (1.0,), 12)
    other = [{"role": "user", "content": "ねこ は いぬ を 見る"}]
    wanted = [(sampler, prompt, sample) for sampler in range(2) for prompt in range(2) for sample in range(2)]
    together = {which: ids for which, ids, _ in generated(model, tokenizer, [ASKED, other], samplers, wanted, seed=3, rows=8)}
    alone = {
        which: ids
        for one in wanted
        for which, ids, _ in generated(model, tokenizer, [ASKED, other], samplers, [one], seed=3, rows=1)
    }
    assert together == alone
    ends = {tokenizer.eos_id, *model.config.end_ids}
    greedy = list(generate(model, encode_prompt(tokenizer, ASKED), samplers[0], stop_ids=ends))
    assert together[0, 0, 0] == [token for token in greedy if token not in ends]
    assert together[1, 0, 0] != together[1, 0, 1]


def test_the_grid_holds_each_sampler_once_and_greedy_without_filters():
    samplers = grid((0.0, 1.0), (0.0, 0.1), (1.0, 0.9), (1.0,), 8)
    assert len(samplers) == 1 + 4
    assert samplers[0] == Sampling(temperature=0.0, max_new_tokens=8)


def test_distinct_counts_different_ngrams():
    assert distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1], [1]], 1) == 0.5
    assert distinct([[1]], 2) == 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


OPTIONS = [
    "--samplers.temperature",
    "0.2",
    "3",
    "--samplers.min-p",
    "0",
    "--samplers.top-p",
    "1",
    "--samplers.repetition-penalty",
    "1",
]


def english(count):
    return [{"messages": ASKED, "response": f"the dog runs and it sees {'a ' * number}cat"} for number in range(count)]


def test_hazard_ranks_samplers_and_leaves_leaking_references_out(tiny_model, tmp_path, capsys):
    out = tmp_path / "hazard.json"
    rows = [*english(3), {"messages": ASKED, "response": "the dog ねこ は runs"}]
    main(["hazard", str(tiny_model), "--references", write(tmp_path / "r.jsonl", rows), "--json", str(out), *OPTIONS])
    found = json.loads(out.read_text())
    assert (found["references"], found["left_out"]) == (3, 1)
    cold, hot = found["samplers"]
    assert cold["temperature"] == 0.2
    assert 0 <= cold["low"] <= cold["leak"] <= cold["high"] <= 1
    assert all(0 < row["hazard_per_token"] < 1 for row in (cold, hot))
    assert hot["hazard_per_token"] != cold["hazard_per_token"]
    assert hot["kept"] == 1
    assert "3 references; 1 left out" in capsys.readouterr().out


def test_a_stopped_sweep_goes_on_to_the_same_bytes(tiny_model, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [*english(1), {"messages": [{"role": "user", "content": "it runs"}]}])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def sweep(out, *more):
        main(
            [
                "sweep",
                str(tiny_model),
                "--prompts",
                prompts,
                "--out",
                str(out),
                "--samples",
                "2",
                "--max-new-tokens",
                "6",
                *OPTIONS,
                *more,
            ]
        )

    sweep(whole)
    lines = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * 2
    stopped.mkdir()
    (stopped / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    (stopped / "answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    sweep(stopped)
    assert sorted((stopped / "answers.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert (stopped / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    table = json.loads((whole / "sweep.json").read_text())["samplers"]
    assert [row["answers"] for row in table] == [4, 4]
    assert all(row["low"] <= row["rate"] <= row["high"] for row in table)
    assert table[1]["distinct_2"] >= table[0]["distinct_2"]
    assert table[0]["kept"] == 1
    with pytest.raises(SystemExit, match="holds another sweep"):
        sweep(whole, "--seed", "1")
    with pytest.raises(SystemExit):
        sweep(tmp_path / "none", "--rows", "0")
    assert not (tmp_path / "none").exists()


def test_intervals_of_rates_cover_as_prompts_differ():
    """A repeated sweep: prompts drawn anew, each with its own chance of a leak, several answers to a prompt."""
    random = np.random.default_rng(0)
    for a, b in ((0.3, 9.7), (1.0, 4.0)):
        covered = []
        for _ in range(400):
            chances = np.repeat(random.beta(a, b, size=60), 4)
            found = rate((random.random(240) < chances).tolist(), [str(number // 4) for number in range(240)])
            covered.append(found.interval.low <= a / (a + b) <= found.interval.high)
        assert 0.92 <= np.mean(covered) <= 0.985


def test_a_rate_of_none_has_a_width():
    assert rate([False] * 40, ["a", "b"] * 20).interval.high > 0.5
    assert 0.05 < rate([False] * 40, [str(number) for number in range(40)]).interval.high < 0.1


def test_pairs_join_a_leaked_answer_with_the_clean_one_of_nearest_length(tmp_path, capsys):
    def record(prompt, response):
        return {"messages": [{"role": "user", "content": prompt}], "response": response}

    rows = [
        record("Tell me of summer.", "It is 湿気 hot in summer."),
        record("Tell me of summer.", "Hot."),
        record("Tell me of summer.", "It is very hot in summer."),
        record("Tell me of winter.", "It is 寒い now."),
        record("Tell me of spring.", "It is mild."),
    ]
    out = tmp_path / "pairs.jsonl"
    main(["pairs", write(tmp_path / "a.jsonl", rows), "--out", str(out)])
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(made) == 1
    pair = read_pair(made[0])
    assert pair.prompt == rows[0]["messages"]
    assert (pair.chosen, pair.rejected) == ("It is very hot in summer.", "It is 湿気 hot in summer.")
    assert "1 pairs of 3 prompts; 2 answers leak; 1 prompts have leaked answers and no clean one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pairs", "FILE", "--out", "OUT"], "no prompt has a leaked and a clean answer"),
        (["sweep", "nowhere/model", "--prompts", "FILE", "--out", "OUT"], "nowhere/model"),
    ],
)
def test_mistakes_are_one_line(tiny_model, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"MODEL": str(tiny_model), "FILE": write(tmp_path / "a.jsonl", english(1)), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        main([names.get(argument, argument) for argument in arguments])
    assert said in str(ended.value)
    assert not (tmp_path / "out").exists()
