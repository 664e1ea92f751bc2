"""The fastest launch of each kernel on a GPU: `kernels.configurations` is filled from this search.

    python -m benchmarks.tune --out runs/tune.json
    python -m benchmarks.tune --kernels attention_forward attention_keys --tokens 16384

Each candidate takes the place of its kernel's entry in the table, and the operator that launches it is timed as in
`benchmarks.kernels`. Processes side by side first compile all candidates into Triton's cache. A candidate that does not fit the
chip is a row with "missing". A row says how a candidate compares with the table's entry.
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
from benchmarks.command import benchmark, check_least, check_names
from benchmarks.kernels import Trial
from benchmarks.operators import OPERATORS
from benchmarks.operators.operator import Case, Sizes
from benchmarks.results import Result, table
from benchmarks.shapes import shape
from engine.environment import choose_device, choose_dtype
from engine.settings.toml import PathName
from kernels.configurations import TABLES, Configuration, chip

COLUMNS = ("kernel", "direction", "candidate", "in_table", "seconds", "speed_over_table")
Grid = dict[str, tuple[int | bool, ...]]


@dataclass(frozen=True)
class Search:
    """Where a kernel is tried."""

    operator: str  # launches the kernel
    direction: str
    grids: tuple[Grid, ...]  # values of the configuration's fields; all combinations of each grid are candidates


def _attention(direction: str, wide: Grid, narrow: Grid) -> Search:
    """Programs of 128 rows have 8 warps, programs of 64 rows 4; with and without descriptors."""
    both: Grid = {"descriptors": (False, True)}
    grids = ({"rows": (128,), "warps": (8,), **wide, **both}, {"rows": (64,), "warps": (4,), **narrow, **both})
    pairs: Grid = {"warpgroups": (True,), "rows": (64,), "block": (64, 128), "stages": (2, 3)}
    return Search("sliding_window_attention", direction, (*grids, pairs) if direction == "forward" else grids)


_STREAMED: Grid = {"block": (512, 1024, 2048, 4096), "warps": (2, 4, 8)}
_DECODE: Grid = {"block": (32, 64, 128), "warps": (4, 8), "programs": (1, 2, 4), "stages": (2, 3)}
SEARCHES: dict[str, Search] = {
    "attention_forward": _attention(
        "forward", {"block": (64, 128), "stages": (2, 3)}, {"block": (32, 64, 128), "stages": (2, 3, 4)}
    ),
    "attention_queries": _attention(
        "backward", {"block": (64, 128), "stages": (2, 3)}, {"block": (32, 64, 128), "stages": (1, 2, 3)}
    ),
    "attention_keys": _attention("backward", {"block": (32, 64), "stages": (2, 3)}, {"block": (32, 64), "stages": (2, 3)}),
    "attention_backward": Search("sliding_window_attention", "backward", ({"passes": (1,), "block": (32, 64)},)),
    "attention_decode": Search("decode_attention", "forward", (_DECODE,)),
    "rms_norm": Search("add_rms_norm", "forward", ({"per_thread": (8, 16, 32)},)),
    "rms_norm_backward": Search("add_rms_norm", "backward", ({"per_thread": (8, 16, 32), "programs": (1, 2, 4, 8)},)),
    "adamw": Search("adamw", "update", (_STREAMED,)),
    "gradient_norm": Search("gradient_norm", "forward", ({"block": (4096, 8192, 16384, 32768), "warps": (8, 16)},)),
    "swiglu": Search("swiglu", "forward", (_STREAMED,)),
    "swiglu_backward": Search("swiglu backward, in place", "update", (_STREAMED,)),
    "embedding_backward": Search("embedding", "backward", ({"block": (256, 512, 1024), "rows": (4, 8, 16), "warps": (4, 8)},)),
    "rotary": Search("rotary", "forward", ({"rows": (8, 16, 32, 64), "warps": (4, 8)},)),
    "row_log_prob": Search("linear_log_prob", "forward", ({"block": (2048, 4096, 8192), "warps": (4, 8, 16)},)),
}


@dataclass(frozen=True)
class Candidate:
    """A kernel and one way to launch it."""

    kernel: str
    configuration: Configuration

    @property
    def text(self) -> str:
        varied = {name for grid in SEARCHES[self.kernel].grids for name in grid}
        return ", ".join(f"{name} {value}" for name, value in asdict(self.configuration).items() if name in varied)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """The kernels to tune, and the device."""

    kernels: tuple[str, ...] = ()
    """Names as in `kernels.configurations`; default: all with a search."""
    preset: str = "shisa-7b"
    """Model whose shapes are taken, or small."""
    tokens: int = 8192
    """Tokens of the packed row."""
    repeats: int = 10
    """Timed calls of a candidate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """A CPU has nothing to tune; its eager functions show that the search runs."""
    workers: int = 0
    """Processes that compile; 0: one less than there are cores, at most 12."""
    out: PathName = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, tokens=1, repeats=1, workers=0)
        check_names("kernels", self.kernels, list(SEARCHES))


def candidates(kernel: str, entry: Configuration) -> list[Candidate]:
    """The table's entry first, then all others of the kernel's search."""
    found = [Candidate(kernel, entry)]
    for grid in SEARCHES[kernel].grids:
        for chosen in itertools.product(*grid.values()):
            values: dict[str, Any] = dict(zip(grid, chosen, strict=True))
            found.append(Candidate(kernel, dataclasses.replace(entry, **values)))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def in_table(candidate: Candidate, device: torch.device) -> Iterator[None]:
    """Inside the block, the candidate is its kernel's entry in the table."""
    table = TABLES[chip(device)]
    before = table[candidate.kernel]
    table[candidate.kernel] = candidate.configuration
    try:
        yield
    finally:
        table[candidate.kernel] = before


class Bench:
    """One operator's data at a time, and the time of a candidate's call on it."""

    def __init__(self, settings: TuneSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.dtype = choose_dtype("auto", device)
        self.sizes = Sizes.of(shape(settings.preset), settings.tokens)
        self.operator = ""
        self.case: Case | None = None

    def work(self, candidate: Candidate) -> tuple[Callable[..., Any], Callable[[], Any]]:
        """(the timed function, the preparation of its argument) of a candidate's operator."""
        search = SEARCHES[candidate.kernel]
        operator = OPERATORS[search.operator]
        if operator.name != self.operator:
            self.case = None  # freed before the next is made
            self.operator, self.case = operator.name, operator.case(self.sizes, self.dtype, self.device)
        assert self.case is not None
        return Trial(operator, next(iter(operator.providers())), self.case).timed(search.direction)

    def compile(self, candidate: Candidate) -> str | None:
        """Run a candidate once. Returns why it cannot run."""
        try:
            with in_table(candidate, self.device):
                work, prepare = self.work(candidate)
                work(prepare())
                measure.synchronize(self.device)
        except Exception as error:  # whatever a compiler says about a launch that the chip does not have
            return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
        return None

    def seconds(self, candidate: Candidate) -> dict[str, float | int]:
        with in_table(candidate, self.device):
            work, prepare = self.work(candidate)
            repeats = self.settings.repeats
            return measure.spread(measure.kernel_seconds(work, self.device, repeats=repeats, warmup=2, prepare=prepare))


def _compile_share(settings: TuneSettings, device: str, share: Sequence[Candidate]) -> list[str | None]:
    # Kernels do not depend on the number of tokens, and many processes share the memory.
    bench = Bench(dataclasses.replace(settings, tokens=min(settings.tokens, 1024)), torch.device(device))
    return [bench.compile(candidate) for candidate in share]


def run(settings: TuneSettings, command: str = "benchmarks.tune.run") -> dict[str, Any]:
    """Measure, print a table of each kernel; returns the result, whose file is written after each."""
    device = choose_device(settings.device)
    entries = TABLES[chip(device)]
    tried = {kernel: candidates(kernel, entries[kernel]) for kernel in settings.kernels or SEARCHES}
    reasons = _compiled(settings, device, [candidate for some in tried.values() for candidate in some])
    bench, result = Bench(settings, device), Result("tune", command, device, settings)
    for kernel, some in tried.items():
        base, rows = 0.0, []
        for candidate in some:
            row: dict[str, Any] = {"kernel": kernel, "direction": SEARCHES[kernel].direction}
            row |= {"candidate": candidate.text, "in_table": candidate == some[0]}
            rows.append(row)
            why = reasons[candidate] or bench.compile(candidate)
            if why:
                row["missing"] = why
                continue
            row["seconds"] = bench.seconds(candidate)
            base = base or row["seconds"]["median"]
            row["speed_over_table"] = base / row["seconds"]["median"]
        rows.sort(key=lambda row: row["seconds"]["median"] if "seconds" in row else float("inf"))
        measured = [row for row in rows if "missing" not in row]
        print(table([*measured[:6], *[row for row in measured[6:] if row["in_table"]]], COLUMNS), flush=True)
        result.add(*rows)
    return result.finish()


def _compiled(settings: TuneSettings, device: torch.device, tried: Sequence[Candidate]) -> dict[Candidate, str | None]:
    """Compile all candidates in processes side by side. Returns why some cannot run."""
    workers = settings.workers or min(12, max(1, (os.cpu_count() or 2) - 1))
    # Dealt out like cards: neighbours differ little and take about as long.
    shares = [tried[i::workers] for i in range(workers) if tried[i::workers]]
    with multiprocessing.get_context("spawn").Pool(len(shares)) as pool:
        answers = pool.starmap(_compile_share, [(settings, str(device), share) for share in shares])
    found = zip(itertools.chain(*shares), itertools.chain(*answers), strict=True)
    return dict(found)


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(TuneSettings, run, "tune", argv)


if __name__ == "__main__":
    main()
