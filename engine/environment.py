"""The machine's devices and packages, and whether torch can use them: `python -m engine.environment`."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# The checkout.
ROOT = Path(__file__).resolve().parents[1]
_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = ("triton", "sentencepiece", "numpy", "safetensors", "tokenizers", "flash-attn", "datasets", "transformers")


class DeviceError(RuntimeError):
    """The device that a run would use is missing or unusable."""


def choose_device(name: str) -> torch.device:
    """The device of a run.

    Args: name: auto (CUDA if there is a GPU, else CPU), cpu or cuda.
    Raises: DeviceError for a GPU that is asked for, or present with auto, but that the installed torch cannot use: falling
        back to the CPU quietly would waste days. The message names driver, build and remedy.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        problem = _gpu_problem()
        if problem:
            raise DeviceError(problem)
        # torch's memory counters need the device's number.
        return torch.device("cuda", 0)
    driver = nvidia_driver()
    if name == "auto" and driver is None:
        return torch.device("cpu")
    if driver is None:
        raise DeviceError("device = cuda: no NVIDIA driver is loaded on this machine; install one, or use device = cpu")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    remedy = "install the CUDA build of torch" if not torch.version.cuda else "update the driver to one for this CUDA version"
    raise DeviceError(
        f"an NVIDIA GPU is present (driver {driver}) but torch {torch.__version__} (built for {build}) cannot use it: "
        f"{remedy}, or use device = cpu"
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a model's parameters: float32, bfloat16, or with "auto" bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def use_deterministic_algorithms() -> None:
    """Make a resumed run repeat bit for bit on CUDA: fixed orders of addition in torch's own operators and in cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The deterministic mode also fills every new tensor with NaN, which costs bandwidth and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def host_memory() -> tuple[int, int]:
    """Bytes of the host's memory: all, and available now, within the limit of this container; 0 where unknown."""
    table = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            table[name] = 1024 * int(value.split()[0])
    except (OSError, ValueError, IndexError):
        return 0, 0
    total, available = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    return min(total, limit), min(available, max(0, limit - used))


def nvidia_driver() -> str | None:
    """Version of the loaded NVIDIA kernel driver, None without a driver."""
    try:
        first = _DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in first if word[0].isdigit() and "." in word), "unknown")


def _gpu_problem() -> str | None:
    """Why Triton could not launch kernels, None if it can: it compiles a small C launcher against Python's headers."""
    if compiler() is None:
        return "no C compiler, which Triton needs to launch kernels: install gcc or clang, or set CC"
    if not python_header().is_file():
        return f"{python_header()} is missing, which Triton needs to launch kernels: install Python's development package"
    return None


def compiler() -> str | None:
    """Path of the C compiler that Triton would use, None without one."""
    named = os.environ.get("CC")
    return next((path for name in ([named] if named else ["gcc", "clang", "cc"]) if (path := shutil.which(name))), None)


def python_header() -> Path:
    """Path that Python.h should have."""
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def machine(
    device: torch.device,
    packages: Sequence[str] = ("transformers",),  # besides torch and triton
) -> dict[str, Any]:
    """What a result should say of the machine that made it: device, processor and versions, None for an absent package."""
    described: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "driver": nvidia_driver(),
        "torch": str(torch.__version__),  # with its build, which the package's version may lack
    }
    for package in ("triton", *packages):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """KOMAINU_COMMIT if it is set (for files copied without their history), else the checkout's commit, else "unknown".

    A "+" follows the checkout's commit where files differ from it.
    """
    if named := os.environ.get("KOMAINU_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A result that is being written says nothing about the code that measured it.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report() -> list[tuple[str, str]]:
    """(name, value) of everything that a bug report should say."""
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} cores"),
        ("torch", f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'}"),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    spec = importlib.util.find_spec("kernels")
    rows.append(("kernels package", str(spec.origin) if spec else "not found"))
    rows.append(("NVIDIA driver", nvidia_driver() or "none"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            rows.append((f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"))
    rows.append(("C compiler", compiler() or "none (Triton needs one on a GPU)"))
    rows.append(("Python header", str(python_header()) if python_header().is_file() else f"{python_header()} is missing"))
    try:
        rows.append(("device used", str(choose_device("auto"))))
    except DeviceError as error:
        rows.append(("device used", f"none: {error}"))
    return rows


def main() -> None:
    for name, value in report():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    main()
