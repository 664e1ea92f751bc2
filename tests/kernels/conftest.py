"""The tests of an operator run three ways from one text: on a CPU against the eager reference, in Triton's interpreter
(`test_processes.py` starts them again with TRITON_INTERPRET=1), and on a GPU (marked `gpu`)."""

import os

import pytest
import torch

from kernels.launch import INTERPRETED
from tests.kernels.processes import Processes

# The interpreter truncates float32 to bfloat16 instead of rounding, and multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames and "dtype" not in _given(metafunc):
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _given(metafunc) -> set[str]:
    """The arguments that a test's own marks give."""
    return {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }


@pytest.fixture(autouse=True)
def _poisoned():
    """Every tensor that is made without values is full of NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


_PROCESSES = pytest.StashKey[Processes]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The file that waits for processes comes last."""
    items.sort(key=lambda item: item.path.name == "test_processes.py")


def pytest_collection_finish(session):
    """Start what runs in processes of its own beside the other tests."""
    names = [item.callspec.params["job"] for item in session.items if "job" in getattr(item, "fixturenames", ())]
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if names and first and not session.config.option.collectonly:
        session.config.stash[_PROCESSES] = Processes(names)


def pytest_sessionfinish(session, exitstatus):
    if _PROCESSES in session.config.stash:
        session.config.stash[_PROCESSES].finish(kill=exitstatus == pytest.ExitCode.INTERRUPTED)
