"""The tests that run in processes of their own, see `processes.py`."""

import pytest

from tests.kernels.cases import cases
from tests.kernels.processes import JOBS, ROOT, result

MUTANTS = {name: case.MUTANTS for name, case in cases().items()}


@pytest.mark.parametrize("job", JOBS)
def test_process(job):
    status, output = result(job)
    assert status == 0, output[-8000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_what_mutants_replace_is_there_once(name):
    source = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    assert {text: source.count(text) for text, _ in MUTANTS[name]} == {text: 1 for text, _ in MUTANTS[name]}
