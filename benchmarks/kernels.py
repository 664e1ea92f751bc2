"""One table of all operators of `kernels`, ours beside torch, torch.compile and the installed peers.

    python -m benchmarks.kernels                     Shisa 7B's shapes at 8,192 tokens on CUDA, small shapes on a CPU
    python -m benchmarks.kernels --operators rms_norm swiglu --tokens 1 2048 8192 --out results.json

"backward" is the backward pass alone (its memory covers both passes), "both" is timed in one piece. Data is random and
copied anew for each call, caches are flushed, providers take turns, and on CUDA calls are queued behind a busy device.
`benchmarks/README.md` defines floor, error and wrong.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from benchmarks import measure
from benchmarks.command import benchmark, check_least, check_names
from benchmarks.operators import OPERATORS
from benchmarks.operators.operator import Call, Case, Operator, Provider, Sizes, Tensors, gradient_of
from benchmarks.results import Result, table
from benchmarks.shapes import name_of, shape
from engine.environment import choose_device, choose_dtype
from engine.settings.toml import PathName

# Seconds that the timed calls of one provider and direction may take, with their preparation. A GPU's times vary little.
_BUDGET = {"cpu": 2.0, "cuda": 0.4}
# A window shorter than a row of 256 tokens, so that it hides keys.
_SMALL_WINDOW = 128
COLUMNS = ["operator", "direction", "shape", "provider", "seconds", "floor_seconds", "floor_fraction", "speed_over_best_peer"]
COLUMNS += ["best_peer", "peak_mib", "error", "error_allowed", "wrong", "missing"]


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """The operators to measure, and the device."""

    operators: tuple[str, ...] = ()
    """Names as in the table; default all."""
    providers: tuple[str, ...] = ()
    """Names as in the table; default all."""
    preset: str = ""
    """Model whose shapes are taken; default: shisa-7b (Mistral 7B's, 120,064 rows of vocabulary) on CUDA, small on a CPU."""
    tokens: tuple[int, ...] = ()
    """Tokens of the packed row; default: 8192 on CUDA, 256 on a CPU."""
    document: int = 0
    """Tokens of each document of the row; 0: one document."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""
    rounds: int = 3
    """Turns that each provider takes."""
    repeats: int = 0
    """Timed calls of a turn; default: 10 on CUDA, 5 on a CPU."""
    out: PathName = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, document=0, rounds=1, repeats=0, tokens=1)
        check_names("operators", self.operators, list(OPERATORS))
        known = dict.fromkeys(provider.name for operator in OPERATORS.values() for provider in operator.providers())
        check_names("providers", self.providers, list(known))


def run(settings: KernelSettings, command: str = "benchmarks.kernels.run") -> dict[str, Any]:
    """Measure, print a table of each operator; returns the result, whose file is written after each."""
    device = choose_device(settings.device)
    cuda, dtype = device.type == "cuda", choose_dtype(settings.dtype, device)
    name, tokens = settings.preset or ("shisa-7b" if cuda else "small"), settings.tokens or ((8192,) if cuda else (256,))
    config = shape(name) if name != "small" else dataclasses.replace(shape(name), sliding_window=_SMALL_WINDOW)
    timing = Timing(device, settings.rounds, settings.repeats or (10 if cuda else 5), measure.ceilings(device, dtype))
    resolved = {"preset": name, "tokens": list(tokens), "dtype": name_of(dtype)}
    result = Result("kernels", command, device, settings, resolved, ceilings=timing.ceilings)
    for operator in (OPERATORS[name] for name in OPERATORS if name in (settings.operators or OPERATORS)):
        for count in tokens if operator.per_tokens else tokens[:1]:
            # Each case compiles its functions anew; torch gives up on a function that it compiled for too many shapes.
            torch._dynamo.reset()
            case = operator.case(Sizes.of(config, count, settings.document), dtype, device)
            rows = measure_operator(operator, case, settings.providers, timing)
            print(table(rows, COLUMNS), flush=True)
            del case
            if cuda:
                torch.cuda.empty_cache()
            result.add(*rows)
    return result.finish()


@dataclass(frozen=True)
class Timing:
    """The timing of calls, and the ceilings of the device."""

    device: torch.device
    rounds: int
    repeats: int
    ceilings: dict[str, float]

    def samples(self, works: dict[str, tuple[Callable[..., Any], Callable[[], Any]]]) -> dict[str, list[float]]:
        """Seconds of each name's (work, preparation of its argument), in turns; slow work gets fewer calls."""
        repeats: dict[str, int] = {}

        def turn(name: str) -> list[float]:
            work, prepare = works[name]
            if name not in repeats:
                start = time.perf_counter()
                measure.kernel_seconds(work, self.device, repeats=2, warmup=0, prepare=prepare)
                call = (time.perf_counter() - start) / 2
                repeats[name] = max(1, min(self.repeats, int(_BUDGET[self.device.type] / self.rounds / max(call, 1e-9))))
            warmup = 0 if repeats[name] == 1 else 1
            return measure.kernel_seconds(work, self.device, repeats=repeats[name], warmup=warmup, prepare=prepare)

        turns = measure.alternate({name: partial(turn, name) for name in works}, self.rounds)
        return {name: [seconds for part in parts for seconds in part] for name, parts in turns.items()}


class Trial:
    """One provider on one case, with fresh inputs for each call."""

    def __init__(self, operator: Operator, provider: Provider, case: Case) -> None:
        self.case = case
        self.call: Call = provider.build(case)
        self.differentiable = operator.differentiable

    def leaves(self) -> Tensors:
        """Copies of the inputs, as the provider takes them."""
        copies = self.call.arrange({name: tensor.clone() for name, tensor in self.case.inputs.items()})
        return {
            name: tensor.detach().requires_grad_(self.differentiable and tensor.is_floating_point())
            for name, tensor in copies.items()
        }

    def upstream(self) -> Tensors:
        return self.call.upstream({name: tensor.clone() for name, tensor in self.case.upstream.items()})

    def timed(self, direction: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
        """(the timed function, the preparation of its argument) of a direction."""
        if direction == "backward":

            def before() -> tuple[Tensors, Tensors, Tensors]:
                leaves, upstream = self.leaves(), self.upstream()
                return self.call.run(leaves), upstream, leaves

            return (lambda given: gradient_of(*given)), before
        if direction == "both":
            return self._both, lambda: (self.leaves(), self.upstream())
        return self.call.run, self.leaves

    def peak_bytes(self, direction: str) -> int:
        leaves, upstream = self.leaves(), self.upstream()
        if direction in ("backward", "both"):
            return measure.allocated_peak(lambda: self._both((leaves, upstream)), self.case.device)
        return measure.allocated_peak(lambda: self.call.run(leaves), self.case.device)

    def results(self, *, backward: bool) -> Tensors:
        """The results, named like the exact results."""
        leaves = self.leaves()
        outputs = self.call.run(leaves)
        gradients = gradient_of(outputs, self.upstream(), leaves) if backward else {}
        found = self.call.results(leaves, {name: output.detach() for name, output in outputs.items()}, gradients)
        measure.synchronize(self.case.device)
        return found

    def _both(self, given: tuple[Tensors, Tensors]) -> Tensors:
        leaves, upstream = given
        return gradient_of(self.call.run(leaves), upstream, leaves)


def measure_operator(
    operator: Operator,
    case: Case,
    names: Sequence[str],  # of the providers; empty: all
    timing: Timing,
) -> list[dict[str, Any]]:
    """The rows of one operator on one case."""
    providers = list(operator.providers())
    judge = Judge(operator, case, next(provider for provider in providers if provider.name == operator.yardstick))
    rows: list[dict[str, Any]] = []
    trials: dict[str, Trial] = {}
    for provider in providers:
        if names and provider.name not in names:
            continue
        for direction in provider.directions or operator.directions:
            row: dict[str, Any] = {
                "operator": operator.name,
                "direction": direction,
                "shape": operator.shape(case.sizes),
                "dtype": name_of(case.dtype),
                "provider": provider.name,
            }
            rows.append(row)
            try:
                missing = provider.missing(case)
                if missing is None:
                    trial = trials.get(provider.name) or Trial(operator, provider, case)
                    trials[provider.name] = trial
                    row |= judge.errors(trial, direction)
                    if case.device.type == "cuda":
                        row["peak_mib"] = trial.peak_bytes(direction) / 2**20
                    continue
            except Exception as error:  # whatever a peer raises must not end the table
                missing = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
            row["missing"] = missing
    judge.forget()
    for direction in operator.directions:
        measured = {row["provider"]: row for row in rows if row["direction"] == direction and "missing" not in row}
        if not measured:
            continue
        samples = timing.samples({name: trials[name].timed(direction) for name in measured})
        cost = operator.cost(case, direction)
        floor = max(cost.bytes / timing.ceilings["copy_bytes"], cost.operations / timing.ceilings["product_flops"])
        for name, row in measured.items():
            seconds = measure.spread(samples[name])
            row |= {"seconds": seconds, "floor_seconds": floor, "floor_fraction": floor / seconds["median"]}
            row |= {"bytes": cost.bytes, "operations": cost.operations}
        compare(list(measured.values()), {provider.name for provider in providers if provider.rival})
    return rows


def compare(rows: Sequence[dict[str, Any]], rivals: set[str]) -> None:
    """Add to each row the fastest rival with right results, and its speed over that rival's."""
    peers = [row for row in rows if row["provider"] in rivals and "wrong" not in row]
    if not peers:
        return
    best = min(peers, key=lambda row: row["seconds"]["median"])
    for row in rows:
        row["best_peer"] = best["provider"]
        row["speed_over_best_peer"] = best["seconds"]["median"] / row["seconds"]["median"]


@dataclass
class Judge:
    """The exact results of a case, and the errors that are allowed."""

    operator: Operator
    case: Case
    yardstick: Provider
    exact: Tensors = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = Trial(self.operator, self.yardstick, self.case).results(backward=self.operator.differentiable)
        if self.operator.exact is not None:
            self.exact = self.operator.exact(self.case)
        else:
            wide = Trial(self.operator, self.yardstick, self.case.wide)
            self.exact = wide.results(backward=self.operator.differentiable)
        for name, result in plain.items():
            # Plain torch may have been lucky: one rounding more, and float32 sums in another order.
            rounding = torch.finfo(result.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            self.allowed[name] = 2 * self._error(name, result) + rounding

    def forget(self) -> None:
        """Free the exact results."""
        self.exact = {}

    def errors(self, trial: Trial, direction: str) -> dict[str, Any]:
        """The error of a direction's worst result, its allowance, and "wrong" where the error exceeds it."""
        found = trial.results(backward=direction in ("backward", "both"))
        errors = {name: self._error(name, result) for name, result in found.items() if self._belongs(name, direction)}
        if not errors:
            return {}
        worst = max(errors, key=lambda name: errors[name] / self.allowed[name])
        row: dict[str, Any] = {"error": errors[worst], "error_allowed": self.allowed[worst]}
        if errors[worst] > self.allowed[worst]:
            row["wrong"] = f"{worst}: error {errors[worst]:.2g}, {self.allowed[worst]:.2g} allowed"
        return row

    def _error(self, name: str, result: torch.Tensor) -> float:
        exact = self.exact[name]
        error = float((result.detach().double() - exact).abs().max() / exact.abs().max())
        # JSON has neither NaN nor infinity.
        return error if error < float("inf") else sys.float_info.max

    @staticmethod
    def _belongs(name: str, direction: str) -> bool:
        return direction in ("both", "update") or name.startswith("d ") == (direction == "backward")


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(KernelSettings, run, "kernels", argv)


if __name__ == "__main__":
    main()
