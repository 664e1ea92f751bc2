"""Evaluations beside the held-out losses: answers to prompts land in every log, and training does not notice them."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch

import engine.loop
from engine.environment import choose_device
from engine.inference.opening import open_model
from engine.run import open_run
from model.generate import generate
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt
from recipes import dpo, pretrain, sft
from recipes.training import extras_of

RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
PROMPTS = ["the cat sees", "ねこ は", "it runs and"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return str(file)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("pretrain", "dpo"))])
def test_samples_are_the_models_answers_and_change_nothing(stage, tiny_settings, tmp_path, prompts, assert_same_end, capsys):
    """The last samples equal those of the last checkpoint, asked one by one; weights and losses are as without samples."""
    log = {"every": 4, "tensorboard": False}
    given = {"seed": 7} | ({} if stage == "pretrain" else {"neftune_alpha": 5.0})
    evaluate = {"prompts": prompts, "new_tokens": 12}
    last = RECIPES[stage].run(tiny_settings(stage, tmp_path / "with", evaluate_every=3, evaluate=evaluate, log=log, **given))
    console = capsys.readouterr().out
    RECIPES[stage].run(tiny_settings(stage, tmp_path / "without", evaluate_every=3, log=log, **given))
    lines = lines_of(tmp_path / "with")
    samples = {line["step"]: line["samples"] for line in lines if "samples" in line}
    assert [line["step"] for line in lines if "samples" in line] == [0, 3, 6]
    assert all(set(line) == {"step", "samples"} for line in lines if "samples" in line)
    assert all([sample["prompt"] for sample in found] == PROMPTS for found in samples.values())
    _, tokenizer, model = open_model(str(last), choose_device("cpu"))
    for sample in samples[6]:
        ids = [tokenizer.bos_id, *tokenizer.encode(sample["prompt"])]
        if stage != "pretrain":
            ids = encode_prompt(tokenizer, [{"role": "user", "content": sample["prompt"]}])
        answer = [*generate(model, ids, Sampling(temperature=0, max_new_tokens=12), stop_ids={tokenizer.eos_id})]
        assert sample["answer"] == tokenizer.decode(answer).strip(" ")
    assert len({sample["answer"] for found in samples.values() for sample in found}) > 2
    assert re.search(r"step      6  sample  the cat sees -> \S", console)
    # The same trajectory: the samples' lines are all that the logs differ in.
    file = tmp_path / "with" / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines if "samples" not in line))
    assert_same_end(tmp_path / "with", tmp_path / "without")


def test_an_evaluation_leaves_random_states_and_the_models_mode_as_they_were(tiny_settings, tmp_path, prompts, monkeypatch):
    states = []

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    examine = engine.loop.examine

    def watched(model, *arguments):
        before = state(), model.training
        found = examine(model, *arguments)
        states.append((before, (state(), model.training)))
        return found

    monkeypatch.setattr(engine.loop, "examine", watched)
    evaluate = {"prompts": prompts, "new_tokens": 4, "temperature": 0.8}
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", heldout=[], evaluate=evaluate, steps=1))
    assert len(states) == 2
    for before, after in states:
        assert before == after


def test_sampled_answers_depend_on_the_seed_and_are_drawn_alike_each_time(tiny_settings, tmp_path, prompts):
    found = {}
    for seed in (1, 2):
        evaluate = {"prompts": prompts, "new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": seed}
        settings = tiny_settings("sft", tmp_path / "run", heldout=[], evaluate=evaluate)
        run = open_run(settings, ("conversations",))
        samples = extras_of(run, chat=True).samples
        model = run.load_model().eval()
        first, second = (samples.answer(model, lambda: None, lambda: False) for _ in range(2))
        assert first == second
        found[seed] = [sample["answer"] for sample in first]
        assert samples.answer(model, lambda: None, lambda: True) is None
    assert found[1] != found[2]


def test_a_diverged_model_has_no_answers_and_the_run_goes_on(tiny_settings, tmp_path, prompts):
    run = open_run(tiny_settings("sft", tmp_path / "run", evaluate={"prompts": prompts, "new_tokens": 8}), ("conversations",))
    model = run.load_model().eval()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    found = extras_of(run, chat=True).samples.answer(model, lambda: None, lambda: False)
    assert [sample["prompt"] for sample in found] == PROMPTS
    assert all(sample["answer"].startswith("(no answer: the model gives scores that are not finite") for sample in found)


def test_samples_reach_tensorboard_as_text(tiny_settings, tmp_path, prompts):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluate = {"prompts": prompts, "new_tokens": 4}
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", heldout=[], evaluate=evaluate, steps=1))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")}
    lines = {line["step"]: line["samples"] for line in lines_of(tmp_path / "run") if "samples" in line}
    assert shown.keys() == lines.keys() == {0, 1}
    for step, samples in lines.items():
        for sample in samples:
            assert f"    {sample['prompt']}\n\nanswer\n\n    {sample['answer']}" in shown[step]


def test_the_time_of_an_evaluation_does_not_count_in_the_speed(tiny_settings, tmp_path, prompts, monkeypatch):
    """Steps that wait for a log line when an evaluation begins are logged before it."""
    examine = engine.loop.examine
    seconds = 0.0

    def late(*arguments):
        nonlocal seconds
        seconds += 1000
        return examine(*arguments)

    clock = engine.loop.time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: clock() + seconds)
    monkeypatch.setattr(engine.loop, "examine", late)
    out = tmp_path / "run"
    log = {"every": 10, "tensorboard": False}
    pretrain.run(tiny_settings("pretrain", out, evaluate_every=2, log=log, evaluate={"prompts": prompts, "new_tokens": 2}))
    steps = [line for line in lines_of(out) if "loss" in line]
    assert all(line["step_seconds"] < 500 for line in steps)
    assert [round(line["wall_seconds"] / 1000) for line in steps] == [1, 1, 2, 2, 3, 3]


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for_when_only_prompts_are_asked(tiny_settings, tmp_path, prompts):
    out = tmp_path / "run"
    evaluate = {"prompts": prompts, "new_tokens": 2}
    settings = tiny_settings(
        "pretrain", out, heldout=[], evaluate_every=3, checkpoint_every=3, keep_checkpoints=9, evaluate=evaluate
    )
    pretrain.run(settings)
    shutil.rmtree(out / "step-00000006")
    whole = lines_of(out)
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in whole if not (line["step"] == 3 and "samples" in line))
    )
    pretrain.run(settings)
    assert [(line["step"], line["samples"]) for line in lines_of(out) if "samples" in line] == [
        (line["step"], line["samples"]) for line in whole if "samples" in line
    ]


def test_mistakes_are_found_before_anything_is_trained(tiny_settings, tmp_path, prompts):
    for dry_run in (False, True):
        for evaluate, said in [
            ({"prompts": str(tmp_path / "absent.txt")}, "no such file"),
            ({"prompts": prompts, "new_tokens": 127}, r"prompts.txt:1: a prompt of \d+ tokens"),
        ]:
            with pytest.raises((FileNotFoundError, ValueError), match=said):
                sft.run(tiny_settings("sft", tmp_path / "run", evaluate=evaluate, dry_run=dry_run))
    assert not (tmp_path / "run").exists()
