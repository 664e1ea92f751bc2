"""Whole steps beside peers: what the figures mean, that candidates do the same work, and that turns are kept."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernels.linear_log_prob
import model.mistral
from benchmarks import own, train
from benchmarks.candidates import Candidate, Outcome, Schedule, take_turns
from benchmarks.checkpoint import CheckpointSettings
from benchmarks.kernels import KernelSettings
from benchmarks.peers import catalogue
from benchmarks.peers.steps import Steps
from benchmarks.peers.worker import peak_memory
from benchmarks.results import RESULTS, read_result
from benchmarks.synthetic import export_steps, write_synthetic
from benchmarks.train import TrainBenchSettings, points, trains_our_steps
from benchmarks.tune import TuneSettings
from benchmarks.work import Work, speed, with_reference, work_of
from engine.data.dataset import TokenDataset
from engine.loop import train_step
from engine.observe.profile import CATEGORIES, OPERATORS, OPTIMIZER, classified, ranges, replaced
from engine.optim.adamw import AdamW
from engine.run import Run
from engine.settings.toml import parse
from model.config import preset

CPU = torch.device("cpu")
ANSWERING = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
def say(answer): print(json.dumps(answer), flush=True)
say({"ready": {"path": sys.path, "variables": dict(os.environ), "folder": os.getcwd()}})
for number, line in enumerate(sys.stdin):
    order = json.loads(line)
    if job.get("fails") == number: print("first", file=sys.stderr); sys.exit("CUDA out of memory: 3 GiB")
    if job.get("sleeps") == number: time.sleep(60)
    say({"at": time.monotonic(), **order})
"""


@pytest.fixture
def answering(tmp_path):
    """answering(name, **job) -> a candidate that answers every order at once with the time and the order."""
    script = tmp_path / "peers" / "answering.py"
    script.parent.mkdir()
    script.write_text(ANSWERING)
    return lambda name, **job: Candidate(name, (str(script),), job)


def in_turns(candidates, scratch, report=lambda candidate, outcome: None, **changes):
    schedule = Schedule(warmup=2, rounds=3, steps=4, limit=20.0, side_by_side=True)
    return take_turns(candidates, dataclasses.replace(schedule, **changes), scratch, report)


def test_candidates_take_turns_side_by_side_and_another_begins_each_round(answering, tmp_path):
    done = []
    outcomes = in_turns([answering(name) for name in "abc"], tmp_path, lambda candidate, _: done.append(candidate.name))
    assert done == ["a", "b", "c"]
    for outcome in outcomes.values():
        assert [outcome.warmup["steps"], *(answer["steps"] for answer in outcome.rounds)] == [2, 4, 4, 4]
    times = sorted((answer["at"], name) for name, outcome in outcomes.items() for answer in outcome.rounds)
    assert "".join(name for _, name in times) == "abcbcacab"


def test_candidates_that_do_not_fit_together_run_one_after_another(answering, tmp_path):
    outcomes = in_turns([answering("a"), answering("b")], tmp_path, side_by_side=False)
    assert max(answer["at"] for answer in outcomes["a"].rounds) < outcomes["b"].warmup["at"]


@pytest.mark.slow
def test_a_crashed_or_hanging_peer_is_reported_and_the_rest_still_run(answering, tmp_path):
    outcomes = in_turns([answering("a", sleeps=2), answering("b", fails=1), answering("c")], tmp_path, limit=5.0)
    assert outcomes["a"].missing == "cut off after 5 s"
    assert outcomes["b"].missing == "exit 1: CUDA out of memory: 3 GiB"
    assert outcomes["c"].missing is None
    assert len(outcomes["c"].rounds) == 3


def test_an_order_that_fails_leaves_the_rounds(answering, tmp_path):
    candidate = dataclasses.replace(answering("a", fails=4), orders=("first", "second"))
    outcome = in_turns([candidate], tmp_path)["a"]
    assert outcome.missing is None
    assert len(outcome.rounds) == 3
    assert outcome.answers == {"first": {"missing": "exit 1: CUDA out of memory: 3 GiB"}}


def test_a_peers_process_has_nothing_of_the_checkout(answering, tmp_path, monkeypatch):
    root = Path(train.__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path / 'wheels'}")
    facts = in_turns([answering("a", threads=1)], tmp_path, rounds=0)["a"].facts
    assert str(root) not in facts["path"]
    assert str(tmp_path / "wheels") in facts["path"]
    assert Path(facts["folder"]) == tmp_path
    variables = facts["variables"]
    assert (variables["USE_HUB_KERNELS"], variables["HF_HUB_OFFLINE"], variables["OMP_NUM_THREADS"]) == ("NO", "1", "1")


def test_rounds_give_tokens_and_operations_a_second():
    works = [Work(places=100 * i, documents=i, flops=1000 * i) for i in range(1, 6)]
    rounds = [
        {"seconds": [1.0, 3.0], "cpu_seconds": 5.0, "counts": [{}, {}]},
        {"seconds": [2.0, 2.0], "cpu_seconds": 9.0, "counts": [{}, {}]},
    ]
    found = speed(works, rounds, first=1, steps=2, peak=1000.0, ceiling=500.0)
    # Steps 1 and 2 (counted from 0) in 4 s, steps 3 and 4 in 4 s.
    assert found["tokens"] == (200 + 300 + 400 + 500) / 4
    assert (found["tokens_per_second"]["low"], found["tokens_per_second"]["high"]) == (500 / 4, 900 / 4)
    assert (found["tokens_per_cpu_second"]["high"], found["tokens_per_cpu_second"]["low"]) == (100, 100)
    assert found["mfu"]["low"] == 5000 / 4 / 1000
    assert found["of_ceiling"]["high"] == 9000 / 4 / 500
    assert found["step_seconds"] == {"median": 2.0, "low": 2.0, "high": 2.0, "samples": 4}
    assert speed(works, rounds, first=1, steps=2)["mfu"] is None
    # A trainer that composes its own steps: 150 tokens in 2 documents are 148 places, of 10 operations each.
    counted = [{"seconds": [4.0], "cpu_seconds": 4.0, "counts": [{"tokens": 150, "documents": 2}]}]
    found = speed(works, counted, first=0, steps=1, peak=1.0)
    assert found["tokens_per_second"]["median"] == 148 / 4
    assert found["mfu"]["median"] == pytest.approx(1480 / 4)


def test_a_reference_that_is_computed_beforehand_is_charged_to_every_token(spread):
    figures = {"tokens_per_second": spread(50.0, 50.0, 100.0), "tokens_per_cpu_second": spread(50.0, 50.0, 50.0)}
    found = with_reference(figures, {"seconds": 5.0, "cpu_seconds": 10.0}, [Work(100, 2, 1)] * 5)
    # 5 steps of 100 tokens cost 5 s beforehand: 0.01 s a token, beside 0.02 s.
    assert found["tokens_per_second_with_reference"]["median"] == pytest.approx(1 / 0.03)
    assert found["tokens_per_second_with_reference"]["high"] == pytest.approx(1 / 0.02)
    assert found["tokens_per_cpu_second_with_reference"]["median"] == pytest.approx(1 / 0.04)
    assert found["tokens_per_second_with_reference"]["samples"] == 5


def test_losses_are_compared_only_where_the_steps_hold_the_same_tokens():
    works = [Work(places=98, documents=2, flops=1)] * 3

    def outcome(*counts):
        return Outcome(warmup={"counts": counts[:1]}, rounds=[{"counts": counts[1:]}])

    assert trains_our_steps(outcome({}, {}), works)
    assert trains_our_steps(outcome({"tokens": 100, "documents": 2}, {"tokens": 100, "documents": 2}), works)
    assert not trains_our_steps(outcome({"tokens": 100, "documents": 2}, {"tokens": 99, "documents": 2}), works)


def test_synthetic_data_have_the_asked_size_lengths_and_shared_prompts(tmp_path):
    config = preset("tiny")
    for kind in ("text", "conversations", "preferences"):
        for documents in ("full", "mixed"):
            folder = tmp_path / f"{kind}-{documents}"
            write_synthetic(folder, kind, config, places=4000, sequence=50, documents=documents, seed=1)
            data = TokenDataset.open(folder)
            assert 4000 <= (data.lengths - 1).sum() < 4000 + 2 * 50
            assert data.lengths.max() <= 51
            assert (data.lengths.min() == 51) == (documents == "full")
            for pair in range(0, len(data), 2) if kind == "preferences" else ():
                shared = int(data.prompt_lengths[pair])
                assert shared == data.prompt_lengths[pair + 1] < data.lengths[pair + 1]
                assert (data.tokens(pair)[:shared] == data.tokens(pair + 1)[:shared]).all()
                assert not data.trained(pair)[:shared].any()
                assert data.trained(pair)[shared:].all()


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_peers_read_the_documents_of_a_step_and_padding_counts_nowhere(tmp_path, objective):
    folder = tmp_path / "point"
    folder.mkdir()
    point = TrainBenchSettings(objective=objective, sequence=48, micro_batch=3, documents="mixed", dtype="float32", rounds=1)
    job = train.make_job(point, CPU, folder)
    run = own.open_job(job, share_prompts=False)
    (data,) = run.datasets
    made = own.steps_of(run, 3)
    export_steps(made, tmp_path / "steps.safetensors")
    read = Steps(tmp_path / "steps.safetensors")
    assert len(read) == 3
    assert read.longest == max(int(data.lengths[number]) for step in made for b in step.batches for number in b.document_B)
    for index, step in enumerate(made):
        numbers = [int(number) for batch in step.batches for number in batch.document_B]
        documents = read.documents(index)
        assert [document.ids for document in documents] == [data.tokens(number).tolist() for number in numbers]
        assert [document.trained[1:] for document in documents] == [data.trained(number, 1).tolist() for number in numbers]
        if objective == "dpo":
            assert [document.prompt for document in documents] == [int(data.prompt_lengths[number]) for number in numbers]
        assert read.trained(index) == sum(float(batch.weight_T.sum()) for batch in step.batches)
        for row, batch in zip(read.rows(index), step.batches, strict=True):
            assert torch.equal(row.tokens_T, batch.tokens_T)
            assert torch.equal(row.positions_T, batch.positions_T.long())
            assert row.lengths == [end - start for start, end, _ in batch.attention.segments]
            assert torch.equal(row.labels_T, torch.where(batch.weight_T > 0, batch.labels_T, -100))
    # Our own steps share prompts; the same documents count all the same.
    ours = own.steps_of(own.open_job(job), 3)[0]
    numbers = [int(number) for batch in ours.batches for number in batch.document_B]
    work = work_of(point.config, ours)
    assert (ours.tokens_saved > 0) == (objective == "dpo")
    assert work.documents == len(numbers) > 1
    assert work.places == sum(int(data.lengths[number]) - 1 for number in numbers)
    assert work.places % (3 * 48) != 0


def test_time_is_told_apart_by_the_calling_operator_in_both_directions(tmp_path):
    """Products of the head are products, the rest of the head is ours: in the backward pass as in the forward pass."""
    folder = tmp_path / "point"
    folder.mkdir()
    run = own.open_job(train.make_job(TrainBenchSettings(sequence=32, dtype="float32", rounds=1), CPU, folder))
    trained = own.fresh_model(run)
    optimizer = AdamW(trained.named_parameters(), run.settings.optimizer)
    objective, _ = own.objective_of(run, trained)
    with ranges(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        train_step(trained, objective, optimizer, own.steps_of(run, 1)[0], 1e-5, run.ranks)
    found: dict[str, set[str]] = {}
    for event, category in classified(profiler.events()):
        found.setdefault(event.name, set()).add(category)
    attention = {name: where for name, where in found.items() if "scaled_dot_product" in name}
    assert any("backward" in name for name in attention)
    assert set.union(*attention.values()) == {"attention"}
    assert found["aten::mm"] | found.get("aten::addmm", set()) == {"products"}
    assert found["aten::exp_"] == found["aten::rsqrt"] == {"our operators"}  # of the head's and the norm's forward
    assert "our operators" in found["aten::embedding_dense_backward"]  # attention on a CPU gathers rows likewise
    assert found[OPTIMIZER] == {"optimizer"}
    assert found["aten::add"] >= {"rest"}  # the residual
    assert set.union(*found.values()) <= set(CATEGORIES)


def test_every_part_of_the_ladder_has_its_references():
    parts = {part for _, references, _ in train.LADDER for part in references}
    # FP8 is a setting of a run, not a part that every step has.
    assert parts | {"fp8 products"} == set(OPERATORS)
    for _, reference in own.references(parts):
        assert "_reference" in reference.__name__
    original = kernels.linear_log_prob.linear_log_prob
    with replaced(list(own.references(["fused head"]))):
        assert model.mistral.linear_log_prob is kernels.linear_log_prob.linear_log_prob_reference
        assert model.mistral.linear_nll is kernels.linear_log_prob.linear_nll_reference
    assert model.mistral.linear_log_prob is kernels.linear_log_prob.linear_log_prob is original


def test_the_ladder_adds_part_after_part():
    rungs = train.ladder({"settings": {}, "device": "cpu"}, TrainBenchSettings())
    assert [len(rung.job["references"]) for rung in rungs] == [4, 3, 2, 1, 1, 0]
    assert [rung.job["settings"]["recompute"] for rung in rungs] == ["none"] * 4 + ["light"] * 2


def test_a_grid_is_the_product_of_its_axes():
    grid = points(TrainBenchSettings(sweep=("sequence=64,128", "micro-batch=1,2,4"), accumulate=3))
    assert [(point.sequence, point.micro_batch) for point in grid] == [(64, 1), (64, 2), (64, 4), (128, 1), (128, 2), (128, 4)]
    assert {(point.accumulate, point.sweep) for point in grid} == {(3, ())}
    assert points(TrainBenchSettings()) == [TrainBenchSettings()]
    sft, dpo = points(TrainBenchSettings(sweep=("objective=sft,dpo",), peers=("TRL SFT packed", "TRL DPO")))
    assert (sft.peers, dpo.peers) == (("TRL SFT packed",), ("TRL DPO",))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sweep": ("rounds=1,2",)}, "sweep = 'rounds=1,2': must be name=value,value with a name of preset"),
        ({"sweep": ("sequence=64,x",)}, "values of sequence must be int"),
        ({"sweep": ("sequence=64,1",)}, "sequence = 1: must be at least 2"),
        ({"sweep": ("preset=huge",)}, "unknown preset 'huge'"),
        ({"micro_batch": 0}, "micro_batch = 0: must be at least 1"),
        ({"recompute": "all"}, "recompute: unknown 'all'; choose from , none, light"),
        ({"peers": ("TRL",)}, "no peer is called 'TRL'"),
        ({"peers": ("TRL DPO",)}, "TRL DPO does not train the objective next-token"),
        ({"peers": ("all",), "ladder": True}, "peers have no effect with ladder"),
        ({"data": "x", "documents": "mixed"}, "documents has no effect with data"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        train.run(TrainBenchSettings(device="cpu", **settings))


MEASURED = read_result(RESULTS / "train-nvidia-h200.json")
OURS = [row for row in MEASURED["rows"] if row["name"] == "komainu" and "missing" not in row]


@pytest.mark.parametrize("row", OURS, ids=lambda row: row["task"])
def test_the_plan_equals_the_recorded_peak_of_a_gpu(row, tmp_path, monkeypatch):
    """The allocator's peak in runs that are on record, planned without their GPU."""
    given = {field.name: row[field.name] for field in dataclasses.fields(TrainBenchSettings) if field.name in row}
    given |= {name: MEASURED["settings"][row["task"]][name] for name in ("rounds", "steps", "warmup", "seed")}
    run = own.open_job(train.make_job(TrainBenchSettings(**given, device="cpu"), CPU, tmp_path))
    training = Run._training
    monkeypatch.setattr(Run, "_training", lambda *given, **more: dataclasses.replace(training(*given, **more), kernels=True))
    assert run.planned.peak / 2**30 == pytest.approx(row["memory"]["allocated_gib"], rel=0.001)


QUICK = {"sequence": 64, "rounds": 1, "steps": 1, "warmup": 1, "threads": 1, "device": "cpu"}


def test_ours_and_a_peer_train_alike_and_a_missing_peer_is_reported(tmp_path):
    """A whole run beside transformers and TRL: equal losses on packed conversations, figures that fit together."""
    out, peers = tmp_path / "train.json", ("transformers eager", "TRL SFT padding-free")
    result = train.run(
        TrainBenchSettings(objective="sft", micro_batch=2, documents="mixed", peers=peers, out=str(out), **QUICK)
    )
    assert json.loads(out.read_text()) == result
    assert result["complete"]
    ours, eager, trl = result["rows"]
    assert (ours["name"], eager["name"], trl["name"]) == ("komainu", *peers)
    if importlib.util.find_spec("trl") is None:
        assert trl["missing"] == "trl is not installed"
    else:
        assert trl["loss_largest_difference"] < 1e-4
    assert eager["loss_first"] == pytest.approx(ours["loss_first"], rel=1e-5)
    assert eager["loss_largest_difference"] < 1e-4
    assert eager["loss_first_difference"] == eager["loss_first"] - ours["loss_first"]
    assert eager["tokens"] == ours["tokens"] > 0
    assert eager["differs"]
    assert sum(part["share"] for part in ours["parts"].values()) == pytest.approx(1.0)
    assert set(ours["parts"]) == set(CATEGORIES)
    assert [name for name, part in ours["parts"].items() if part["floor_ms"]] == [*CATEGORIES[:4]]
    assert ours["parts"]["products"]["percent_of_limit"] > 0
    assert "missing" in eager["parts"]
    assert ours["of_ceiling"]["median"] > 0
    assert ours["mfu"] is None  # no published peak of this processor
    assert ours["memory"]["resident_gib"] > 0.1
    assert ours["plan_gib"] > 0
    assert "missing" in ours["watts"]
    text = train.show(result)
    assert "transformers eager" in text
    assert "percent_of_limit" in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert "<svg" in out.with_suffix(".svg").read_text()


@pytest.mark.slow
def test_several_ranks_train_the_whole_step():
    result = train.run(TrainBenchSettings(sweep=("ranks=1,2",), **QUICK))
    one, two = result["rows"]
    # Twice the micro-batches of the same weights; the sum over ranks is the loss of the whole step.
    assert two["tokens"] == 2 * one["tokens"]
    assert two["loss_first"] == pytest.approx(one["loss_first"], rel=0.05)
    assert two["parts"]["communication"]["ms"] > one["parts"]["communication"]["ms"] == 0
    assert two["parts"]["communication"]["floor_ms"] == 0


@pytest.mark.slow
def test_the_ladders_rungs_train_alike():
    result = train.run(TrainBenchSettings(ladder=True, breakdown=False, **QUICK))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [name for name, _, _ in train.LADDER]
    assert all(row["loss_largest_difference"] < 1e-4 for row in rows.values())


@pytest.mark.gpu
def test_the_peak_is_the_allocators():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    room = torch.empty(2**28, dtype=torch.uint8, device=device)
    del room
    assert peak_memory(device)["allocated_gib"] == torch.cuda.max_memory_allocated(device) / 2**30 == (held + 2**28) / 2**30
    assert peak_memory(device)["reserved_gib"] == torch.cuda.max_memory_reserved(device) / 2**30


def test_an_interpreter_of_peers_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"peers_python = '/no/python': no such program; name the interpreter"):
        TrainBenchSettings(peers_python="/no/python")


@pytest.mark.parametrize(
    ("settings_class", "names"),
    [
        (TrainBenchSettings, ["data", "scratch", "out", "peers_python"]),
        (CheckpointSettings, ["folder", "out"]),
        (KernelSettings, ["out"]),
        (TuneSettings, ["out"]),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(settings_class, names, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").symlink_to(sys.executable)
    found = parse(settings_class, [f"--{name.replace('_', '-')}=~/x" for name in names])
    assert [getattr(found, name) for name in names] == [str(tmp_path / "x")] * len(names)


def test_a_relative_interpreter_of_peers_is_found_from_another_folder(tmp_path, monkeypatch):
    """The link stays: it tells Python its environment."""
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    job = {"dtype": "float32", "config": {"vocab_size": 1, "unpadded_vocab_size": 1}}
    (found,) = catalogue.candidates([next(iter(catalogue.PEERS))], job, "./python")
    assert found.python == str(tmp_path / "python")
