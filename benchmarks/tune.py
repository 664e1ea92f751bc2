"""Which launch of each kernel is the fastest on a GPU: what `kernels.configurations` is filled from.

    python -m benchmarks.tune --out runs/tune.json
    python -m benchmarks.tune --kernels attention_forward attention_keys --tokens 16384

Each candidate takes the place of its kernel's entry in the table, and the operator that launches it is timed as in
`benchmarks.kernels`: fresh data, caches flushed, medians. Processes side by side compile the candidates first, into Triton's
cache; a candidate that does not fit the chip is a row with "missing". A row says how it compares with the table's entry.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from benchmarks import measure
from benchmarks.command import benchmark
from benchmarks.kernels import SMALL, Trial
from benchmarks.operators import OPERATORS
from benchmarks.operators.operator import Case, Operator, Sizes
from engine.environment import choose_device
from engine.settings.toml import to_table
from kernels.configurations import TABLES, Configuration, chip
from model.config import preset

COLUMNS = ("kernel", "direction", "candidate", "in_table", "seconds", "speed_over_table")
Grid = dict[str, tuple[int | bool, ...]]


@dataclass(frozen=True)
class Search:
    """Where a kernel is tried: the operator and direction that launch it, and grids of its configuration's fields, of each of
    which all combinations are candidates."""

    operator: str
    direction: str
    grids: tuple[Grid, ...]


_ATTENTION = "sliding_window_attention"
_STREAMED: Grid = {"block": (512, 1024, 2048, 4096), "warps": (2, 4, 8)}
SEARCHES: dict[str, Search] = {
    "attention_forward": Search(_ATTENTION, "forward", (
        {"rows": (128,), "block": (64, 128), "warps": (8,), "stages": (2, 3), "descriptors": (False, True)},
        {"rows": (64,), "block": (32, 64, 128), "warps": (4,), "stages": (2, 3, 4), "descriptors": (False, True)},
    )),
    "attention_queries": Search(_ATTENTION, "backward", (
        {"rows": (128,), "block": (64, 128), "warps": (8,), "stages": (2, 3), "descriptors": (False, True)},
        {"rows": (64,), "block": (32, 64, 128), "warps": (4,), "stages": (1, 2, 3), "descriptors": (False, True)},
    )),
    "attention_keys": Search(_ATTENTION, "backward", (
        {"rows": (128,), "block": (32, 64), "warps": (8,), "stages": (2, 3), "descriptors": (False, True)},
        {"rows": (64,), "block": (32, 64), "warps": (4,), "stages": (2, 3), "descriptors": (False, True)},
    )),
    "attention_decode": Search(
        "decode_attention", "forward", ({"block": (32, 64, 128), "warps": (4, 8), "programs": (1, 2, 4), "stages": (2, 3)},),
    ),
    "rms_norm": Search("add_rms_norm", "forward", ({"per_thread": (8, 16, 32)},)),
    "rms_norm_backward": Search("add_rms_norm", "backward", ({"per_thread": (8, 16, 32), "programs": (1, 2, 4, 8)},)),
    "adamw": Search("adamw", "update", (_STREAMED,)),
    "gradient_norm": Search("gradient_norm", "forward", ({"block": (4096, 8192, 16384, 32768), "warps": (8, 16)},)),
    "swiglu": Search("swiglu", "forward", (_STREAMED,)),
    "swiglu_backward": Search("swiglu backward, in place", "update", (_STREAMED,)),
    "embedding_backward": Search("embedding", "backward", ({"block": (256, 512, 1024), "rows": (4, 8, 16), "warps": (4, 8)},)),
    "rotary": Search("rotary", "forward", ({"rows": (8, 16, 32, 64), "warps": (4, 8)},)),
    "row_log_prob": Search("linear_log_prob", "forward", ({"block": (2048, 4096, 8192), "warps": (4, 8, 16)},)),
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A kernel and how it might be launched."""

    kernel: str
    configuration: Configuration

    @property
    def text(self) -> str:
        varied = {name for grid in SEARCHES[self.kernel].grids for name in grid}
        return ", ".join(f"{name} {value}" for name, value in asdict(self.configuration).items() if name in varied)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What to try, and where."""

    kernels: tuple[str, ...] = ()
    """Names as in `kernels.configurations`; default: all that can be tried."""
    preset: str = "shisa-7b"
    """Model whose shapes are taken; small: those of `benchmarks.kernels` on a CPU."""
    tokens: int = 8192
    """Tokens of the packed row."""
    repeats: int = 10
    """Timed calls of a candidate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Without a GPU there is nothing to tune; the CPU's eager functions show that the search itself runs."""
    workers: int = 0
    """Processes that compile; default: one less than there are cores, at most 12."""
    out: str = ""
    """File of the result; default: print only."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("repeats", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name in self.kernels:
            if name not in SEARCHES:
                raise ValueError(f"kernels: unknown {name!r}; there are {', '.join(SEARCHES)}")


def candidates(kernel: str, entry: Configuration) -> list[Candidate]:
    """The table's entry first, then all that the kernel's search has beside it."""
    found = [Candidate(kernel, entry)]
    for grid in SEARCHES[kernel].grids:
        for chosen in itertools.product(*grid.values()):
            values: dict[str, Any] = dict(zip(grid, chosen, strict=True))
            found.append(Candidate(kernel, dataclasses.replace(entry, **values)))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def in_table(candidate: Candidate, device: torch.device) -> Iterator[None]:
    """The candidate in place of its kernel's entry, inside of the block."""
    table = TABLES[chip(device)]
    before = table[candidate.kernel]
    table[candidate.kernel] = candidate.configuration
    try:
        yield
    finally:
        table[candidate.kernel] = before


class Bench:
    """An operator's data, and what a candidate's call of it takes."""

    def __init__(self, settings: TuneSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.sizes = Sizes.of(SMALL if settings.preset == "small" else preset(settings.preset), settings.tokens)
        self.operator: Operator | None = None
        self.case: Case | None = None

    def work(self, candidate: Candidate) -> tuple[Callable[..., Any], Callable[[], Any]]:
        """(what is timed, what makes its argument) of a candidate's operator."""
        search = SEARCHES[candidate.kernel]
        operator = next(operator for operator in OPERATORS if operator.name == search.operator)
        if operator is not self.operator:
            # One operator's data at a time.
            self.case = None
            self.operator, self.case = operator, operator.case(self.sizes, self.dtype, self.device)
        assert self.case is not None
        return Trial(operator, next(iter(operator.providers())), self.case).timed(search.direction)

    def compile(self, candidate: Candidate) -> str | None:
        """Run a candidate once. Returns: why it cannot run."""
        try:
            with in_table(candidate, self.device):
                work, prepare = self.work(candidate)
                work(prepare())
                measure.synchronize(self.device)
        except Exception as error:  # whatever a compiler says of a launch that the chip does not have
            return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
        return None

    def seconds(self, candidate: Candidate) -> dict[str, float | int]:
        with in_table(candidate, self.device):
            work, prepare = self.work(candidate)
            return measure.spread(
                measure.kernel_seconds(work, self.device, repeats=self.settings.repeats, warmup=2, prepare=prepare)
            )


def _compile_share(settings: TuneSettings, device: str, share: Sequence[Candidate]) -> list[str | None]:
    # Kernels are the same for any number of tokens, and many processes share the memory.
    bench = Bench(dataclasses.replace(settings, tokens=min(settings.tokens, 1024)), torch.device(device))
    return [bench.compile(candidate) for candidate in share]


def run(settings: TuneSettings, command: str = "benchmarks.tune") -> dict[str, Any]:
    """Measure, print a table of each kernel, write the result; returns it."""
    device = choose_device(settings.device)
    table = TABLES[chip(device)]
    kernels = settings.kernels or tuple(SEARCHES)
    tried = [candidate for kernel in kernels for candidate in candidates(kernel, table[kernel])]
    reasons = _compiled(settings, device, tried)
    bench, rows = Bench(settings, device), []
    for kernel in kernels:
        mine = [candidate for candidate in tried if candidate.kernel == kernel]
        base, new = 0.0, []
        for candidate in mine:
            row: dict[str, Any] = {
                "kernel": kernel, "direction": SEARCHES[kernel].direction, "candidate": candidate.text,
                "in_table": candidate == mine[0],
            }  # fmt: skip
            new.append(row)
            why = reasons[candidate] or bench.compile(candidate)
            if why:
                row["missing"] = why
                continue
            row["seconds"] = bench.seconds(candidate)
            base = base or row["seconds"]["median"]
            row["speed_over_table"] = base / row["seconds"]["median"]
        new.sort(key=lambda row: row["seconds"]["median"] if "seconds" in row else float("inf"))
        rows += new
        measured = [row for row in new if "missing" not in row]
        print(measure.table([*measured[:6], *[row for row in measured[6:] if row["in_table"]]], COLUMNS), flush=True)
        if settings.out:
            measure.write_result(settings.out, _result(settings, command, device, rows, kernel == kernels[-1]))
    return _result(settings, command, device, rows, True)


def _result(settings: TuneSettings, command: str, device: torch.device, rows: list[dict], complete: bool) -> dict[str, Any]:
    return measure.result("tune", command, device, to_table(settings), rows, complete=complete)


def _compiled(settings: TuneSettings, device: torch.device, tried: Sequence[Candidate]) -> dict[Candidate, str | None]:
    """Why candidates cannot run; all of them are compiled in processes side by side."""
    workers = settings.workers or min(12, max(1, (os.cpu_count() or 2) - 1))
    # Neighbours differ little and take about as long: dealt out like cards.
    shares = [tried[i::workers] for i in range(workers) if tried[i::workers]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(shares)) as pool:
        answers = pool.starmap(_compile_share, [(settings, str(device), share) for share in shares])
    return {
        candidate: why
        for share, answer in zip(shares, answers, strict=True)
        for candidate, why in zip(share, answer, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(TuneSettings, run, argv, "tune")


if __name__ == "__main__":
    main()
