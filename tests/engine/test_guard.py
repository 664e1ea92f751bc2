"""What goes wrong in a run: spikes and their replay, ranks that die, hang or lag, profiles of chosen steps."""

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.loop
from engine.checkpoint.state import checkpoints
from engine.distributed.garbage import GarbageAtLogLines
from engine.distributed.stragglers import slowest
from engine.observe.profile import CATEGORIES, memory_curve
from engine.observe.spikes import SpikeLog, documents_of
from engine.run import open_run
from engine.settings.sections import GuardSettings, ProfileSettings
from recipes import dpo, pretrain, sft

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
KINDS = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}
QUIET = {"every": 1, "tensorboard": False}


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def spikes_of(tiny_settings, tmp_path):
    """spikes_of(**guard settings) -> a log of spikes over a plan of pre-training."""
    plan = open_run(tiny_settings("pretrain", tmp_path / "run", steps=200), ("text",)).plan
    return lambda **guard: SpikeLog(tmp_path / "spikes.jsonl", GuardSettings(**guard), plan)


def test_a_spike_is_so_many_deviations_above_the_median_of_the_steps_before(spikes_of, tmp_path):
    """Losses around 2 whose distances from their median have a median of 0.1, which is 0.1 / 0.6745 deviations."""
    log = spikes_of(spike=6.0, history=20)
    losses = [1.9, 2.0, 2.1] * 4
    assert not any(log.look({"step": 1 + i, "loss": loss, "gradient_norm": 1.0}) for i, loss in enumerate(losses))
    edge = 2.0 + 6 * 0.1 / 0.6745
    assert log.look({"step": 13, "loss": edge - 0.01, "gradient_norm": 1.0}) is None
    assert log.look({"step": 14, "loss": 0.0, "gradient_norm": 1.0}) is None
    said = log.look({"step": 15, "loss": 2 * edge, "gradient_norm": 7.0})
    assert re.search(r"step 15: loss 5.77.. is \d\d\.\d deviations above the median 2.0000", said)
    assert "--replay 15 runs it again" in said
    (note,) = lines_of(tmp_path / "spikes.jsonl")
    assert (note["step"], note["loss"], note["gradient_norm"], note["median"]) == (15, 2 * edge, 7.0, 2.0)
    assert note["documents"] == documents_of(log._plan, 14)


def test_a_log_that_resumes_finds_what_it_would_have_found(spikes_of):
    losses = [2.0 + i % 7 / 10 for i in range(30)]
    whole, resumed = spikes_of(history=12), spikes_of(history=12)
    for i, loss in enumerate(losses):
        assert whole.look({"step": 1 + i, "loss": loss, "gradient_norm": 1.0}) is None
    assert resumed.look({"step": 31, "loss": 90.0, "gradient_norm": 1.0}) is None
    resumed = spikes_of(history=12)
    resumed.resume(losses)
    line = {"step": 31, "loss": 90.0, "gradient_norm": 1.0}
    assert resumed.look(line) == whole.look(line) is not None


def test_no_spikes_are_looked_for(spikes_of):
    log = spikes_of(spike=0.0)
    assert not any(log.look({"step": 1 + i, "loss": 10.0**i, "gradient_norm": 1.0}) for i in range(20))


@pytest.mark.parametrize("stage", KINDS)
def test_documents_of_a_step_are_those_that_its_micro_batches_hold(tiny_settings, tmp_path, stage):
    run = open_run(tiny_settings(stage, tmp_path / "run", pack_tokens=64), (KINDS[stage],))
    found = []
    for batch in run.step(2).batches:
        length_B = torch.bincount(batch.document_T)
        for index, number in enumerate(batch.document_B.tolist()):
            found.append((number, int(batch.document_start_B[index]), int(length_B[index])))
    told = documents_of(run.plan, 2)
    assert {note["source"] for note in told} == {run.settings.sources[0].path}
    if stage == "dpo":
        assert sorted(note["pair"] for note in told) == sorted(number // 2 for number, *_ in found[::2])
        lengths = run.datasets[0].lengths
        assert all(note["tokens"] == [lengths[2 * note["pair"]] - 1, lengths[2 * note["pair"] + 1] - 1] for note in told)
    else:
        assert sorted((note["document"], note["start"], note["tokens"]) for note in told) == sorted(found)


@pytest.mark.parametrize("stage", KINDS)
def test_a_spike_in_a_run_is_replayed_to_the_bit(tiny_settings, tmp_path, monkeypatch, capsys, stage):
    """Also one that came before the last log line; a resumed run forgets what it does again; nothing is written."""
    out = tmp_path / "run"
    settings = tiny_settings(
        stage, out, steps=16, checkpoint_every=13, heldout=[], log={"every": 4, "tensorboard": False}, guard={"spike": 1.0}
    )
    if stage != "pretrain":
        settings = dataclasses.replace(settings, neftune_alpha=5.0)
    accumulate = engine.loop.accumulate

    def spiking(model, objective, step):
        if step.index == 13:
            with torch.no_grad():
                model.norm.weight.mul_(-3.0)
        return accumulate(model, objective, step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "accumulate", spiking)
        RECIPES[stage].run(settings)
    spike = next(note for note in lines_of(out / "spikes.jsonl") if note["step"] == 14)
    assert spike["deviations"] > 1
    assert "step 14: loss" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert RECIPES[stage].run(dataclasses.replace(settings, replay=12)) is None
    said = capsys.readouterr().out
    assert "with the weights of" in said
    assert "11 steps older than the step's own" in said
    RECIPES[stage].run(dataclasses.replace(settings, replay=14))
    said = capsys.readouterr().out
    assert f"step 14 with the weights of {out / 'step-00000013'}\n" in said
    found = float(re.search(r"loss +(\S+) \(logged", said)[1])
    # The weights had been spoilt after the checkpoint; without that the step is an ordinary one.
    assert found < spike["loss"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # Resumed without the fault, step 14 is another, and its replay is that one to the bit.
    (out / "step-00000016").rename(tmp_path / "lost")
    RECIPES[stage].run(settings)
    assert all(note["step"] != 14 or note["loss"] == found for note in lines_of(out / "spikes.jsonl"))
    capsys.readouterr()
    RECIPES[stage].run(dataclasses.replace(settings, replay=14))
    said = capsys.readouterr().out
    assert said.count("the same") >= 2
    assert float(re.search(r"loss +(\S+) \(logged", said)[1]) == found
    assert sum(float(part) for part in re.findall(r"adds (\S+)", said)) == pytest.approx(found, abs=1e-5)
    losses = [float(text) for text in re.findall(r"^loss (\d\S+) in", said, flags=re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == min(5, len(documents_of(open_run(settings, (KINDS[stage],)).plan, 13)))


class _Reads(TorchDispatchMode):
    """Counts operations for whose result the host would wait, if they ran on a GPU."""

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"})

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, _types, arguments=(), keywords=None):
        name = operation.name().removeprefix("aten::").split(".")[0]
        self.found.extend([name] if name in self.WAITING else [])
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("stage", KINDS)
def test_the_host_reads_no_value_of_a_step(tiny_settings, tmp_path, monkeypatch, stage):
    """Forward and backward, NEFTune and shared prompts included; the update on a GPU is the fused one's."""
    reads, accumulate = _Reads(), engine.loop.accumulate

    def watched(*arguments):
        with reads:
            return accumulate(*arguments)

    monkeypatch.setattr(engine.loop, "accumulate", watched)
    changes = {} if stage == "pretrain" else {"neftune_alpha": 5.0}
    RECIPES[stage].run(tiny_settings(stage, tmp_path / "run", steps=1, heldout=[], log=QUIET, **changes))
    assert reads.found == []
    with reads:
        assert float(torch.ones(())) == 1.0
    assert reads.found == ["_local_scalar_dense"]


def test_garbage_is_collected_at_log_lines(tiny_settings, tmp_path, monkeypatch):
    collected, enabled = [], []
    accumulate, collect = engine.loop.accumulate, GarbageAtLogLines.collect

    def watched(model, objective, step):
        enabled.append(gc.isenabled())
        return accumulate(model, objective, step)

    def counted(garbage):
        collected.append(len(enabled))
        collect(garbage)

    monkeypatch.setattr(engine.loop, "accumulate", watched)
    monkeypatch.setattr(GarbageAtLogLines, "collect", counted)
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", heldout=[], log={"every": 4, "tensorboard": False}))
    assert enabled == [False] * 6
    assert collected == [4, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_step_that_is_not_in_the_run_cannot_be_replayed(tiny_settings, tmp_path):
    with pytest.raises(ValueError, match=r"replay = 9: the run has 6 steps"):
        pretrain.run(tiny_settings("pretrain", tmp_path / "run", replay=9))


def test_a_step_that_is_not_finite_is_noted(tiny_settings, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        pretrain.run(tiny_settings("pretrain", out, schedule={"peak": 1e20}, heldout=[], log=QUIET))
    note = lines_of(out / "spikes.jsonl")[-1]
    assert note["step"] == 2
    assert note["deviations"] is None
    assert note["documents"]
    assert "step 2: its documents are in" in capsys.readouterr().out


@pytest.fixture(scope="module")
def faults(tiny_model, tiny_data, tmp_path_factory):
    """faults[fault] -> (exit codes, output, run folder) of two ranks, the second of which misbehaves."""
    folder = tmp_path_factory.mktemp("faults")

    def job(fault: str, timeout: float, **more) -> list:
        settings = {
            "model": str(tiny_model), "out": str(folder / fault), "sources": [{"path": str(tiny_data.text)}],
            "context_length": 32, "step_size": 256, "pack_tokens": 64, "steps": 4, "device": "cpu", "log": QUIET,
            "parallel": {"timeout": timeout}, "checkpoint_every": 3, **more,
        }  # fmt: skip
        stages = [["pretrain", settings]]
        if fault == "lags":
            stages.append(["pretrain", {**settings, "replay": 4}])
        return [fault, str(folder / f"{fault}.txt"), stages]

    jobs = [job("killed", 60.0), job("hangs", 6.0), job("lags", 60.0, profile={"steps": [2]}), job("poisoned", 60.0)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.faulty_ranks", str(folder / "jobs.json")], check=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    codes = json.loads(done.stdout)
    return {fault: (code, Path(file).read_text(), folder / fault) for (fault, file, _), code in zip(jobs, codes, strict=True)}


LOST = r"ConnectionError: rank 0: another rank stopped or did not answer within parallel.timeout"


def test_ranks_end_when_one_is_killed_in_a_step(faults):
    codes, said, _ = faults["killed"]
    assert codes == [1, -signal.SIGKILL]
    assert re.search(LOST, said)


def test_ranks_stop_together_where_one_computes_nonsense(faults):
    codes, said, out = faults["poisoned"]
    assert codes == [1, 1]
    assert said.count("FloatingPointError: step 3: loss nan") == 2
    assert [note["step"] for note in lines_of(out / "spikes.jsonl")] == [3]
    assert checkpoints(out) == []


def test_a_rank_that_hangs_says_where_and_ends(faults):
    codes, said, _ = faults["hangs"]
    assert codes == [1, -signal.SIGALRM]
    assert re.search(LOST, said)
    assert "Timeout (0:00:06)!" in said
    assert re.search(r'File ".*faulty_ranks.py", line \d+ in hang_here', said)


def test_the_slowest_rank_is_named(faults):
    codes, said, out = faults["lags"]
    assert codes == [0, 0]
    named = re.findall(r"rank (\d) is the slowest: the others wait \d+\.\d\d s for it in a step of \d+\.\d\d s", said)
    # A busy machine may hold the other one up for once.
    assert named.count("1") > len(named) / 2
    assert all(line["rank_wait_seconds"] > 0 for line in lines_of(out / "metrics.jsonl"))


def test_a_step_of_several_ranks_is_replayed_to_the_bit(faults):
    _, said, _ = faults["lags"]
    assert re.search(r"replay     step 4 with the weights of .*/step-00000003\n", said)
    assert re.search(r"\nloss +\S+ \(logged \S+, the same\)\ngradient_norm \S+ \(logged \S+, the same\)\n", said)
    assert {"0", "1"} == set(re.findall(r"micro-batch rank (\d), ", said))


def test_a_profile_of_several_ranks_shows_their_communication(faults):
    _, said, out = faults["lags"]
    for rank in (0, 1):
        profile = json.loads((out / "profile" / "step-00000002" / f"rank-{rank}" / "time.json").read_text())
        assert profile["shares"]["communication"] > 0
    assert re.search(r"step 2: products \S+%, .*, communication \S+%, .*waiting \S+%; see", said)


@pytest.mark.parametrize(
    ("waits", "expected"), [([0.5, 0.1, 0.6, 0.4], (1, 0.4)), ([0.0, 0.3], (0, 0.3)), ([0.2, 0.2], (0, 0.0))]
)
def test_the_slowest_rank_waits_least(waits, expected):
    assert slowest(waits) == pytest.approx(expected)


def test_a_profile_holds_trace_times_and_memory_and_changes_nothing(tiny_settings, tmp_path, metric_lines):
    for name, profile in (("plain", {}), ("run", {"steps": [2]})):
        pretrain.run(tiny_settings("pretrain", tmp_path / name, steps=2, step_size=64, heldout=[], log=QUIET, profile=profile))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "plain")
    (step,) = (tmp_path / "run" / "profile").iterdir()
    assert step.name == "step-00000002"
    folder = step / "rank-0"
    shares = json.loads((folder / "time.json").read_text())["shares"]
    assert tuple(shares) == CATEGORIES
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[name] for name in ("products", "attention", "our operators", "optimizer", "waiting")) > 0
    trace = json.loads((folder / "trace.json").read_text())
    assert {"komainu optimizer", "komainu attention", "aten::mm"} <= {event.get("name") for event in trace["traceEvents"]}
    drawing = ElementTree.parse(folder / "memory.svg").getroot()
    peak = max(size for _, size in memory_curve(trace, cuda=False))
    # The logits of a micro-batch's rows alone.
    assert peak > 128 * 340 * 4
    assert f"{peak / 2**30:.3f} GiB" in "".join(drawing.itertext())
    assert len(drawing.find("{*}polyline").get("points").split()) == 2 * len(memory_curve(trace, cuda=False))


def test_memory_over_time_is_what_was_allocated():
    def event(at, size, held, device):
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Total Allocated": held, "Device Type": device}}

    trace = {"traceEvents": [event(3000.0, -8, 99, 0), event(1000.0, 8, 98, 0), event(2000.0, 5, 50, 1), {"name": "aten::mm"}]}
    assert memory_curve(trace, cuda=False) == [(0.0, 8), (2.0, 0)]
    assert memory_curve(trace, cuda=True) == [(0.0, 50)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lambda: GuardSettings(spike=-1.0), r"guard.spike = -1.0: must be above 0"),
        (lambda: GuardSettings(lag=-1.0), r"guard.lag = -1.0: must be above 0"),
        (lambda: GuardSettings(history=2), r"guard.history = 2: must be at least 10 steps"),
        (lambda: ProfileSettings(steps=(0,)), r"profile.steps = \[0\]: steps are numbered from 1"),
        (
            lambda: ProfileSettings(tool="nvtx").check(torch.device("cpu")),
            r"profile.tool = 'nvtx': Nsight Systems observes CUDA",
        ),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        settings()
