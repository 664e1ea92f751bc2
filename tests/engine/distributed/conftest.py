"""Whole runs on several ranks, for the tests of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Ended(NamedTuple):
    codes: list[int]  # exit code of each rank, negative for a signal
    said: str  # everything that the ranks printed


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """run_ranks({name: {"ranks", "runs", "fault", "differs"}}) -> {name: Ended}. All jobs run at once; see rank_runs."""

    def run(jobs: dict[str, dict]) -> dict[str, Ended]:
        folder = tmp_path_factory.mktemp("jobs")
        outputs = {name: folder / f"{name}.txt" for name in jobs}
        file = folder / "jobs.json"
        usual = {"fault": None, "differs": {}}
        file.write_text(json.dumps([{**usual, "output": str(outputs[name]), **job} for name, job in jobs.items()]))
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.distributed.rank_runs", file],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout.splitlines()[-1])
        return {
            name: Ended(code, "".join(Path(f"{outputs[name]}.{rank}").read_text() for rank in range(len(code))))
            for name, code in zip(jobs, codes, strict=True)
        }

    return run
