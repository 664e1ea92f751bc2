"""The device that a run takes, and the message where a GPU is present but unusable."""

import subprocess
from pathlib import Path

import pytest
import torch

from engine import environment
from engine.environment import DeviceError, choose_device, main, nvidia_driver, report

ROOT = Path(__file__).resolve().parents[2]
DRIVER_TEXT = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs-builder@U22)\n"
    "GCC version:  gcc version 12.3.0\n"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(cuda=usable by torch, driver=text of the driver's file or None, build=torch's CUDA or None, ...)."""

    def make(*, cuda=False, driver=None, build="13.0", compiler=True, header=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.version, "cuda", build)
        file = tmp_path / "driver"
        if driver is not None:
            file.write_text(driver)
        monkeypatch.setattr(environment, "_DRIVER", file)
        monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
        (tmp_path / "Python.h").write_text("")
        monkeypatch.setattr(environment, "python_header", lambda: tmp_path / ("Python.h" if header else "absent/Python.h"))

    return make


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cpu", "cpu")])
def test_auto_takes_a_usable_gpu(machine, name, expected):
    machine(cuda=True, driver=DRIVER_TEXT)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_auto_takes_the_cpu_without_a_gpu(machine, name):
    machine()
    assert choose_device(name) == torch.device("cpu")


def test_cuda_without_a_gpu_is_refused(machine):
    machine()
    with pytest.raises(DeviceError, match=r"device = cuda: no NVIDIA driver is loaded .* or use device = cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("build", "parts"),
    [
        ("13.0", ["driver 580.82.07", f"torch {torch.__version__}", "built for CUDA 13.0", "update the driver"]),
        (None, ["driver 580.82.07", "built for CPU only", "install the CUDA build of torch"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_instead_of_taking_the_cpu_quietly(machine, name, build, parts):
    machine(driver=DRIVER_TEXT, build=build)
    with pytest.raises(DeviceError) as error:
        choose_device(name)
    assert all(part in str(error.value) for part in [*parts, "or use device = cpu"])
    assert choose_device("cpu") == torch.device("cpu")


def test_a_missing_compiler_or_header_is_named(machine, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    machine(cuda=True, driver=DRIVER_TEXT, compiler=False)
    with pytest.raises(DeviceError, match=r"no C compiler, .* install gcc or clang, or set CC"):
        choose_device("auto")
    machine(cuda=True, driver=DRIVER_TEXT, header=False)
    with pytest.raises(DeviceError, match=r"Python.h is missing, .* install Python's development package"):
        choose_device("auto")


def test_cc_overrides_the_known_compilers(machine, monkeypatch):
    machine()
    monkeypatch.setattr(environment.shutil, "which", lambda name: {"gcc": "/usr/bin/gcc"}.get(name))
    monkeypatch.delenv("CC", raising=False)
    assert environment.compiler() == "/usr/bin/gcc"
    monkeypatch.setenv("CC", "icc")
    assert environment.compiler() is None


@pytest.mark.parametrize(("text", "version"), [(DRIVER_TEXT, "580.82.07"), ("something else\n", "unknown"), ("", None)])
def test_the_drivers_version_is_read_from_its_file(machine, text, version):
    machine(driver=text)
    assert nvidia_driver() == version


def test_the_report_says_that_a_gpu_is_unusable(machine):
    machine(driver=DRIVER_TEXT, build=None)
    rows = dict(report())
    assert rows["NVIDIA driver"] == "580.82.07"
    assert rows["device used"].startswith("none: an NVIDIA GPU is present")
    assert "CPU only" in rows["torch"]


def test_the_command_prints_the_report(capsys):
    main()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"torch            {torch.__version__}" in printed.out
    assert str(ROOT / "kernels" / "__init__.py") in printed.out
    assert "device used" in printed.out


def test_commit_is_the_checkouts_with_a_plus_where_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("KOMAINU_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("KOMAINU_COMMIT", "abc")
    assert environment.commit() == "abc"
    monkeypatch.delenv("KOMAINU_COMMIT")
    git("init", "-q")
    result = tmp_path / "benchmarks" / "results" / "train.json"
    result.parent.mkdir(parents=True)
    for path in (tmp_path / "file", result):
        path.write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    result.write_text("2")  # a result that is being written changes nothing that measures
    assert environment.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert environment.commit() == git("rev-parse", "HEAD") + "+"


def test_a_results_machine_is_named_with_its_versions():
    described = environment.machine(torch.device("cpu"), ("no-such-package",))
    assert described["torch"] == torch.__version__
    assert described["no-such-package"] is None
    assert (described["kind"], described["threads"]) == ("cpu", torch.get_num_threads())
