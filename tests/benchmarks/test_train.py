"""Whole steps beside peers: what the figures mean, that candidates do the same work, and that turns are kept."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernels.linear_log_prob
import model.mistral
from benchmarks import own, parts, train
from benchmarks.contest import Candidate, contest
from benchmarks.definitions import Work, head_again, speed, work_of
from benchmarks.packs import export_steps, write_synthetic
from benchmarks.peers.steps import Steps
from benchmarks.peers.worker import peak_memory, peak_resident_bytes
from benchmarks.train import TrainBenchSettings, points
from engine.data.dataset import TokenDataset
from engine.observe.profile import CATEGORIES, OPERATORS, OPTIMIZER, classified, ranges, replaced
from kernels.linear_log_prob import linear_log_prob, linear_nll
from model.config import preset

CPU = torch.device("cpu")
PEERS = str(Path(train.__file__).parent / "peers")
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


def in_turns(candidates, scratch, **changes):
    arguments = {"warmup": 2, "rounds": 3, "steps": 4, "side_by_side": True, "limit": 20.0} | changes
    return contest(candidates, scratch, **arguments)


def test_candidates_take_turns_side_by_side_and_another_begins_each_round(answering, tmp_path):
    done = []
    outcomes = in_turns([answering(name) for name in "abc"], tmp_path, report=lambda candidate, _: done.append(candidate.name))
    assert done == ["a", "b", "c"]
    assert all(outcome.warmup["steps"] == 2 and [answer["steps"] for answer in outcome.rounds] == [4] * 3
               for outcome in outcomes.values())  # fmt: skip
    times = sorted((answer["at"], name) for name, outcome in outcomes.items() for answer in outcome.rounds)
    assert "".join(name for _, name in times) == "abcbcacab"


def test_candidates_that_do_not_fit_together_run_one_after_another(answering, tmp_path):
    outcomes = in_turns([answering("a"), answering("b")], tmp_path, side_by_side=False)
    assert max(answer["at"] for answer in outcomes["a"].rounds) < outcomes["b"].warmup["at"]


def test_one_that_ends_or_hangs_is_missing_and_the_others_go_on(answering, tmp_path):
    start = time.monotonic()
    outcomes = in_turns([answering("a", sleeps=2), answering("b", fails=1), answering("c")], tmp_path, limit=3.0)
    assert time.monotonic() - start < 50
    assert outcomes["a"].missing == "cut off after 3 s"
    assert outcomes["b"].missing == "exit 1: CUDA out of memory: 3 GiB"
    assert outcomes["c"].missing is None
    assert len(outcomes["c"].rounds) == 3


def test_an_order_that_fails_leaves_what_was_measured(answering, tmp_path):
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


def test_what_a_round_says_of_speed():
    works = [Work(places=100 * i, documents=i, trained=10, flops=1000 * i, again=500 * i) for i in range(1, 6)]
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
    assert found["hfu"]["low"] == 7500 / 4 / 1000
    assert found["of_ceiling"]["high"] == 9000 / 4 / 500
    assert found["step_seconds"] == {"median": 2.0, "low": 2.0, "high": 2.0, "samples": 4}
    assert speed(works, rounds, first=1, steps=2)["mfu"] is None
    assert speed(works, rounds, first=1, steps=2, whole_documents=True)["tokens_per_second"]["low"] == (500 + 5) / 4
    # A trainer that composes its own steps: 150 tokens in 2 documents are 148 places, of 10 operations each.
    counted = [{"seconds": [4.0], "cpu_seconds": 4.0, "counts": [{"tokens": 150, "documents": 2}]}]
    found = speed(works, counted, first=0, steps=1, peak=1.0)
    assert found["tokens_per_second"]["median"] == 148 / 4
    assert found["mfu"]["median"] == pytest.approx(1480 / 4)


@pytest.mark.parametrize("rows", [4, 7])
def test_logits_that_do_not_fit_are_counted_twice(rows, monkeypatch):
    """The products that the head asks torch for: three where what is kept fits the budget, four where it does not."""
    counted = []
    product = torch.mm

    def counting_product(left, right, **settings):
        counted.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        return product(left, right, **settings)

    monkeypatch.setattr(torch, "mm", counting_product)
    config = dataclasses.replace(preset("tiny"), vocab_size=40, unpadded_vocab_size=33, hidden_size=8)
    budget = 5 * (4 + 4) * 40
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets, chosen = torch.zeros(9, dtype=torch.int64), torch.arange(rows)
    linear_log_prob(hidden, head, targets, chosen, vocab_size=33, budget_bytes=budget).sum().backward()
    batch = SimpleNamespace(rows_N=chosen, pair_B=torch.arange(2))
    again = head_again(config, batch, 4, budget)
    assert (again > 0) == (rows == 7)
    assert sum(counted) == 3 * 2 * rows * 8 * 40 + again
    counted.clear()
    linear_nll(hidden, head, targets, chosen, torch.ones(9), vocab_size=33, budget_bytes=budget)[0].backward()
    batch = SimpleNamespace(rows_N=chosen, pair_B=None)
    assert sum(counted) == 3 * 2 * rows * 8 * 40 + head_again(config, batch, 4, budget)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_padding_counts_nowhere(tmp_path, objective):
    """Packs that are not full: tokens are the places of the documents, operations those of the places and rows alone."""
    config = preset("tiny")
    point = TrainBenchSettings(objective=objective, sequence=64, micro_batch=3, documents="mixed", dtype="float32", rounds=1)
    folder = tmp_path / "point"
    folder.mkdir()
    job = train.make_job(point, CPU, folder)
    data = TokenDataset.open(job["settings"]["sources"][0]["path"])
    (step,) = own.steps_of(own.open_job(job), 1)
    documents = [int(number) for batch in step.batches for number in batch.document_B]
    work = work_of(config, step)
    assert (step.tokens_saved > 0) == (objective == "dpo")
    assert work.documents == len(documents) > 1
    assert work.places == sum(int(data.lengths[number]) - 1 for number in documents)
    assert work.places % (3 * 64) != 0
    assert work.trained == sum(int(data.trained(number, 1).sum()) for number in documents)


def test_the_peak_is_the_kernels(tmp_path):
    def of_the_kernel():
        return (
            int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]) * 1024
        )

    before = peak_resident_bytes()
    room = torch.ones(before // 8 + 2**26)  # half of the peak and 256 MiB
    assert peak_memory(CPU)["resident_gib"] == peak_resident_bytes() / 2**30 == of_the_kernel() / 2**30
    del room
    assert peak_resident_bytes() >= before


@pytest.mark.gpu
def test_the_peak_is_the_allocators():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    room = torch.empty(2**28, dtype=torch.uint8, device=device)
    del room
    assert peak_memory(device)["allocated_gib"] == torch.cuda.max_memory_allocated(device) / 2**30 == (held + 2**28) / 2**30
    assert peak_memory(device)["reserved_gib"] == torch.cuda.max_memory_reserved(device) / 2**30


def test_synthetic_data_is_what_was_asked_for(tmp_path):
    config = preset("tiny")
    for kind in ("text", "conversations", "preferences"):
        for documents in ("full", "mixed"):
            folder = tmp_path / f"{kind}-{documents}"
            write_synthetic(folder, kind, config, places=4000, sequence=50, documents=documents, seed=1)
            data = TokenDataset.open(folder)
            assert 4000 <= (data.lengths - 1).sum() < 4000 + 2 * 50
            assert data.lengths.max() <= 51
            assert (data.lengths.min() == 51) == (documents == "full")
            if kind == "preferences":
                for pair in range(0, len(data), 2):
                    shared = int(data.prompt_lengths[pair])
                    assert shared == data.prompt_lengths[pair + 1] < data.lengths[pair + 1]
                    assert (data.tokens(pair)[:shared] == data.tokens(pair + 1)[:shared]).all()
                    assert not data.trained(pair)[:shared].any()
                    assert data.trained(pair)[shared:].all()


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_peers_read_the_very_documents_of_a_step(tmp_path, objective):
    folder = tmp_path / "point"
    folder.mkdir()
    point = TrainBenchSettings(objective=objective, sequence=48, micro_batch=2, documents="mixed", dtype="float32", rounds=1)
    job = train.make_job(point, CPU, folder)
    run = own.open_job(job, whole_documents=True)
    made = own.steps_of(run, 4)
    export_steps(made, tmp_path / "steps.safetensors")
    read = Steps(tmp_path / "steps.safetensors")
    (data,) = run.datasets
    assert len(read) == 4
    assert read.longest == max(int(data.lengths[number]) for step in made for b in step.batches for number in b.document_B)
    for index, step in enumerate(made):
        numbers = [int(number) for batch in step.batches for number in batch.document_B]
        documents = read.documents(index)
        assert [document.ids for document in documents] == [data.tokens(number).tolist() for number in numbers]
        expected = [[False, *data.trained(number, 1).tolist()] for number in numbers]
        assert [document.trained for document in documents] == expected
        if objective == "dpo":
            assert [document.prompt for document in documents] == [int(data.prompt_lengths[number]) for number in numbers]
        assert read.trained(index) == sum(float(batch.weight_T.sum()) for batch in step.batches)
        for row, batch in zip(read.rows(index), step.batches, strict=True):
            assert torch.equal(row.tokens_T, batch.tokens_T)
            assert torch.equal(row.positions_T, batch.positions_T.long())
            assert row.lengths == [end - start for start, end, _ in batch.attention.segments]
            assert torch.equal(row.labels_T, torch.where(batch.weight_T > 0, batch.labels_T, -100))


def test_operations_are_told_apart_by_what_called_them_in_both_directions(tmp_path):
    """Products of the head are products, the rest of it is ours, and so on: in the backward pass as in the forward one."""
    folder = tmp_path / "point"
    folder.mkdir()
    run = own.open_job(train.make_job(TrainBenchSettings(sequence=32, dtype="float32", rounds=1), CPU, folder))
    trained = own.fresh_model(run)
    optimizer = own.AdamW(trained.named_parameters(), run.settings.optimizer)
    objective, _ = own.objective_of(run, trained)
    with ranges(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        own.train_step(run, trained, optimizer, objective, own.steps_of(run, 1)[0])
    found: dict[str, set[str]] = {}
    for event, category in classified(profiler.events()):
        found.setdefault(event.name, set()).add(category)
    attention = {name: where for name, where in found.items() if "scaled_dot_product" in name}
    assert any("backward" in name for name in attention)
    assert set.union(*attention.values()) == {"attention"}
    assert found["aten::mm"] | found.get("aten::addmm", set()) == {"products"}
    assert found["aten::exp_"] == found["aten::rsqrt"] == {"our operators"}  # of the head's and the norm's forward
    assert found["aten::sigmoid"] == found["aten::embedding_dense_backward"] == {"our operators"}  # of SwiGLU's backward
    assert found["aten::sqrt_"] == found[OPTIMIZER] == {"optimizer"}
    assert found["aten::add"] >= {"rest"}  # the residual
    assert set.union(*found.values()) <= set(CATEGORIES)


def test_functions_are_replaced_wherever_they_are_named_and_come_back():
    original = kernels.linear_log_prob.linear_log_prob
    with replaced(list(parts.references(["fused head"]))):
        assert model.mistral.linear_log_prob is kernels.linear_log_prob.linear_log_prob_reference
        assert model.mistral.linear_nll is kernels.linear_log_prob.linear_nll_reference
    assert model.mistral.linear_log_prob is kernels.linear_log_prob.linear_log_prob is original


def test_a_part_exists_when_its_operator_does_more_than_call_its_reference(monkeypatch):
    def rms_norm(hidden, weight, eps):
        return kernels.rms_norm.rms_norm_triton(hidden, weight, eps)

    assert parts.missing_part("eager", "cpu") is None
    assert parts.missing_part("fused head", "cpu") is None
    for module, name in (operator for group in OPERATORS.values() for operator in group):
        assert callable(getattr(sys.modules[module], name))
        assert callable(getattr(sys.modules[module], parts.reference_name(name)))
    monkeypatch.setattr("kernels.rms_norm.rms_norm", rms_norm)
    assert parts.missing_part("fused operators", "cpu") is None


def test_a_grid_is_the_product_of_its_axes():
    grid = points(TrainBenchSettings(sweep=("sequence=64,128", "micro-batch=1,2,4"), accumulate=3))
    assert [(point.sequence, point.micro_batch) for point in grid] == [(64, 1), (64, 2), (64, 4), (128, 1), (128, 2), (128, 4)]
    assert {(point.accumulate, point.sweep) for point in grid} == {(3, ())}
    assert points(TrainBenchSettings()) == [TrainBenchSettings()]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sweep": ("rounds=1,2",)}, "sweep = 'rounds=1,2': must be name=value,value with a name of preset"),
        ({"sweep": ("sequence=64,x",)}, "values of sequence must be int"),
        ({"sweep": ("sequence=64,1",)}, "sequence = 1: must be at least 2"),
        ({"sweep": ("preset=huge",)}, "unknown preset 'huge'"),
        ({"micro_batch": 0}, "micro_batch = 0: must be at least 1"),
        ({"peers": ("TRL",)}, "no peer is called 'TRL'"),
        ({"peers": ("TRL DPO",)}, "TRL DPO does not train the objective next-token"),
        ({"peers": ("all",), "ladder": True}, "peers have no effect with ladder"),
        ({"data": "x", "documents": "mixed"}, "documents has no effect with data"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        train.run(TrainBenchSettings(device="cpu", **settings))


def test_ours_and_a_peer_train_alike_and_what_is_not_there_is_named(tmp_path, capsys):
    """A whole run beside transformers: equal losses on packed conversations, figures that fit together, missing columns."""
    out = tmp_path / "train.json"
    settings = TrainBenchSettings(
        objective="sft", sequence=64, micro_batch=2, documents="mixed", peers=("transformers eager", "transformers + Liger"),
        rounds=1, steps=1, warmup=1, threads=1, device="cpu", out=str(out), sweep=("ranks=1,2",),
    )  # fmt: skip
    result = train.run(settings)
    assert json.loads(out.read_text()) == result
    assert result["complete"]
    ours, eager, liger, *on_two_ranks = result["rows"]
    assert (ours["name"], eager["name"], liger["name"]) == ("komainu", "transformers eager", "transformers + Liger")
    assert "missing" in liger
    peers, (two_ranks,) = on_two_ranks[:-1], on_two_ranks[-1:]
    assert {(row["name"], row["missing"]) for row in peers} == {
        (row["name"], "trains in one process here") for row in (eager, liger)
    }
    assert (two_ranks["name"], two_ranks["ranks"]) == ("komainu", 2)
    # Twice the micro-batches of the same weights; the sum over ranks is the loss of the whole step.
    assert two_ranks["tokens"] > 1.5 * ours["tokens"]
    assert two_ranks["loss_first"] == pytest.approx(ours["loss_first"], rel=0.05)
    assert two_ranks["breakdown"]["communication"] > 0
    assert ours["breakdown"]["communication"] == 0
    assert eager["loss_first"] == pytest.approx(ours["loss_first"], rel=1e-5)
    assert eager["loss_last"] == pytest.approx(ours["loss_last"], rel=1e-5)
    assert eager["loss_first_difference"] == eager["loss_first"] - ours["loss_first"]
    assert eager["tokens"] == ours["tokens"] > 0
    assert eager["differs"]
    assert sum(ours["breakdown"].values()) == pytest.approx(1.0)
    assert set(ours["breakdown"]) == set(CATEGORIES)
    assert ours["of_ceiling"]["median"] > 0
    assert ours["mfu"] is None  # no published peak of this processor
    assert ours["memory"]["resident_gib"] > 0.1
    assert ours["plan_gib"] > 0
    assert "missing" in ours["watts"]
    text = train.show(result)
    assert "transformers eager" in text
    assert "products" in text


def test_a_ladder_has_a_rung_for_each_part_that_exists(monkeypatch):
    monkeypatch.setattr(train, "missing_part", lambda part, device: {"attention": "not yet"}.get(part))
    rungs, absent = train.ladder({"settings": {}, "device": "cuda"}, TrainBenchSettings())
    assert absent == {"attention": "not yet"}
    assert [rung.name for rung in rungs] == [name for name in parts.LADDER if name != "attention"]
    kept = ["attention"]
    assert [rung.job["references"] for rung in rungs] == [
        ["fused operators", *kept, "fused head", "fused optimizer"], [*kept, "fused head", "fused optimizer"],
        [*kept, "fused optimizer"], [*kept, "fused optimizer"], kept, kept,
    ]  # fmt: skip
    assert [rung.job["settings"]["recompute"] for rung in rungs] == ["none", "none", "none", "light", "light", "light"]
    assert [rung.name for rung in rungs if rung.job.get("compiled")] == [parts.COMPILED]


def test_a_ladders_rungs_train_alike(monkeypatch):
    """Two of them: each is a process."""
    monkeypatch.setattr(train, "LADDER", ("eager", "attention", "fused head"))
    monkeypatch.setattr(train, "missing_part", lambda part, device: {"attention": "not yet"}.get(part))
    result = train.run(TrainBenchSettings(sequence=32, rounds=1, steps=1, warmup=1, threads=1, device="cpu", ladder=True,
                                          breakdown=False))  # fmt: skip
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"eager", "attention", "fused head"}
    assert rows["attention"]["missing"] == "not yet"
    assert rows["eager"]["loss_first_difference"] == 0
    assert rows["fused head"]["loss_first_difference"] == pytest.approx(0, abs=1e-5)
    assert "missing" not in rows["eager"]
    assert "missing" not in rows["fused head"]


def test_a_worker_answers_orders_and_says_what_it_lacks(tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"device": "cpu", "dtype": "float32"}))
    program = f"""
import sys
sys.path.insert(0, {PEERS!r})
from worker import Worker
worker = Worker(["", {str(job)!r}], {{"double": lambda: 4}})
print("noise of a library")
worker.ready(kind="test")
worker.serve(lambda index: index * 1.5)
worker.need("json", "no_such_package")
"""
    orders = '{"steps": 2}\n{"double": true}\n{"steps": 1}\n'
    ended = subprocess.run([sys.executable, "-c", program], input=orders, capture_output=True, text=True, check=True)
    ready, first, double, second, missing = map(json.loads, ended.stdout.splitlines())
    assert ready["ready"]["kind"] == "test"
    assert (first["loss"], second["loss"], double) == ([0.0, 1.5], [3.0], {"double": 4})
    assert len(first["seconds"]) == 2
    assert missing == {"missing": "no_such_package is not installed"}
    assert "noise of a library" in ended.stderr


def test_candidates_end_with_the_one_that_started_them(tmp_path):
    """Also with one that is killed, and in the middle of a step."""
    job, pid = tmp_path / "job.json", tmp_path / "pid"
    job.write_text(json.dumps({"device": "cpu", "dtype": "float32"}))
    worker = (
        f"import os, sys, time; sys.path.insert(0, {PEERS!r}); from worker import Worker; Worker(['', {str(job)!r}]);"
        f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    starter = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", starter])
    wait_for(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    wait_for(lambda: not runs(int(pid.read_text())))


def runs(pid):
    """Whether a process is there and has not ended; one that nobody waited for is still listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(happens, seconds=30):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.1)
