"""Training runs meet faults at random moments, for `make stress`. Its result is stress_kills.json beside this file.

    KILLS=100 SEED=0 python -m pytest tests/engine/stress_kills.py

Runs of the three objectives get SIGKILL, to one process or to all, or SIGTERM, to one process or to torchrun, at any moment or
in an evaluation, or the disk of one process is full for a while. They are resumed by another number of processes, HSDP
included, until they finish. After every fault each complete checkpoint must pass recipes.verify, and the newest must not be
older than before. The final checkpoint and the metrics must be those of a run on one process without faults. The seed decides
everything except the work of a process at the moment of its fault.
"""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from engine.checkpoint.state import checkpoints as complete
from engine.checkpoint.state import newest_checkpoint
from engine.checkpoint.verifying import problems
from engine.settings.toml import to_toml
from tests.engine.forked_ranks import end_of
from tests.engine.killed_runs import IN_EVALUATION, full_for_a_while, in_evaluation, ready, start_all
from tests.engine.trajectories import assert_close

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_suffix(".json")
STAGES = ("pretrain", "sft", "dpo")
# (processes, replicas)
LAYOUTS = ((1, 1), (2, 1), (3, 1), (4, 1), (4, 2))
STEPS = 8
# How often each fault comes. torchrun starts anew and imports torch, which takes as long as many others.
FAULTS = {"one": 3, "all": 3, "term": 3, "evaluation": 3, "disk": 3, "torchrun": 1}
NAMES = {
    "one": "SIGKILL to one process",
    "all": "SIGKILL to all",
    "term": "SIGTERM to one process",
    "evaluation": "signals in an evaluation",
    "disk": "full disks that ended the run",
    "torchrun": "SIGTERM to torchrun",
}
# Latest moment of a fault after the first step has begun, in seconds: about the duration of eight steps and checkpoints.
SECONDS = 2.5


def test_random_kills(tiny_settings, tmp_path):
    configs: dict[str, list[str]] = {}
    for stage in STAGES:
        for replicas in (1, 2):
            settings = tiny_settings(
                stage,
                tmp_path / stage,
                steps=STEPS,
                checkpoint_every=1,
                keep_checkpoints=2,
                pack_tokens=64,
                evaluate_every=3,
                optimizer={"eps": 1e-6},
                log={"every": 2, "tensorboard": False},
                parallel={"timeout": 20.0, "replicas": replicas},
            )
            path = tmp_path / f"{stage}-{replicas}.toml"
            path.write_text(to_toml(settings))
            configs.setdefault(stage, []).append(str(path))
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    size = (os.environ.get("KILLS", "100"), os.environ.get("SEED", "0"))
    subprocess.run(
        [sys.executable, "-m", "tests.engine.stress_kills", tmp_path, *size],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )


def main():
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    configs = json.loads((folder / "configs.json").read_text())
    ready()
    rng, counts, start = random.Random(seed), Counter(), time.time()
    whole = {}
    for stage in STAGES:
        attempt(folder, stage, configs, (1, 1), None, rng, counts)
        whole[stage] = (folder / stage).rename(folder / f"{stage}-whole")
    while counts["kills"] < kills:
        stage = rng.choice(STAGES)
        out = folder / stage
        while not attempt(folder, stage, configs, rng.choice(LAYOUTS), some_fault(rng), rng, counts):
            pass
        assert_close(whole[stage], out)
        counts["runs that ended as one without kills"] += 1
        out.rename(folder / f"ended-{counts['runs that ended as one without kills']}")
        print(dict(counts), flush=True)
    RESULT.write_text(
        json.dumps(
            {
                "command": f"KILLS={kills} SEED={seed} make stress",
                "counts": dict(sorted(counts.items())),
                "seconds": round(time.time() - start),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            indent=2,
        )
        + "\n"
    )


def some_fault(rng):
    return rng.choices([*FAULTS], [*FAULTS.values()])[0]


def attempt(folder, stage, configs, layout, fault, rng, counts):
    """Begin or resume a run, and let it meet a fault at a random moment. Returns whether it finished."""
    ranks, replicas = layout
    out, config = folder / stage, configs[stage][replicas - 1]
    before = newest_checkpoint(out)
    moment, victim = rng.uniform(0, SECONDS), rng.randrange(ranks)
    with tempfile.TemporaryFile() as output:
        if fault == "torchrun":
            codes = [told_by_torchrun(stage, config, ranks, output, moment)]
        else:
            arranged = {
                "disk": full_for_a_while(moment, rng.uniform(0, SECONDS)),
                "evaluation": in_evaluation(rng.randint(1, 3), rng.randint(1, 2), rng.choice((signal.SIGKILL, signal.SIGTERM))),
            }.get(fault, lambda: None)
            children = start_all({"stage": stage, "config": config}, ranks, output, arranged, victim)
            if fault in ("one", "all", "term"):
                wait_for_start(output)
                time.sleep(moment)
                for child in children if fault == "all" else [children[victim]]:
                    os.kill(child, signal.SIGTERM if fault == "term" else signal.SIGKILL)
            codes = end_of(children)
        output.seek(0)
        said = output.read().decode()
    ended = not any(codes)
    assert ended or fault, said
    check_words(fault, codes, said)
    for checkpoint in complete(out):
        assert not list(problems(checkpoint)), said
        counts["checkpoints verified"] += 1
    newest = newest_checkpoint(out)
    assert newest == before or (newest is not None and (before is None or newest.name > before.name)), said
    if ended and "could not be written" in said:
        counts["full disks that the run outlived"] += 1
    if not ended:
        counts["kills"] += 1
        counts[NAMES[fault]] += 1
        counts[f"kills on {ranks} processes" + (" in 2 replicas" if replicas == 2 else "")] += 1
        told = "stopped by SIGTERM" in said
        if fault in ("term", "torchrun") and not told:
            counts["SIGTERM before the first step or after the last"] += 1
        elif not told and list(out.glob(".step-*.partial")):
            counts["SIGKILL while a checkpoint was written"] += 1
    return ended


def check_words(fault, codes, said):
    """Check exit codes and words of a run that a fault has met."""
    # torchrun has a traceback of its own.
    assert "Traceback" not in said or (fault == "torchrun" and said.count("Traceback") == said.count("SignalException: ")), said
    if fault == "disk" and any(codes):
        assert set(codes) == {1}, said
        assert "free the disk" in said
    if fault == "evaluation" and any(codes):
        assert IN_EVALUATION in said
    if "stopped by SIGTERM" in said:
        assert set(codes) == {1 if fault == "torchrun" else 128 + signal.SIGTERM}, said


def wait_for_start(output):
    """Wait until a run is about to begin its first step."""
    while b"start      step" not in os.pread(output.fileno(), 2**20, 0):
        time.sleep(0.01)


def told_by_torchrun(stage, config, ranks, output, moment):
    """Start a run with torchrun, and send SIGTERM to torchrun itself. Returns its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", f"recipes.{stage}", config]
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    wait_for_start(output)
    time.sleep(moment)
    process.send_signal(signal.SIGTERM)
    return process.wait()


if __name__ == "__main__":
    main()
