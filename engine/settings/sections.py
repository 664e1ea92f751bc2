"""The sections of a run's settings: data mixture, ranks, optimizer, schedule, preference loss, log, guards, profiler.

Each class checks its own ranges. Nothing here imports torch, so that `--help` and a wrong setting answer at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

# Losses that a scale of their spread needs.
LEAST_HISTORY = 10


@dataclass(frozen=True)
class Source:
    """One prepared dataset of a mixture.

    path: its folder. share: its part of the tokens of the whole run (pairs, for preferences), relative to the other
    sources' shares; the source repeats as often as that needs. passes: how often each document is seen per epoch
    (default 1; 0.5 takes half). A mixture uses either shares or passes.
    """

    path: str
    share: float | None = None
    passes: float | None = None

    def __post_init__(self):
        if self.share is not None and self.passes is not None:
            raise ValueError(f"source '{self.path}': share and passes exclude each other: leave one out")
        for name in ("share", "passes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"source '{self.path}': {name} = {value}: must be above 0")


@dataclass(frozen=True)
class ParallelSettings:
    """replicas: copies of the model, each sharded over ranks / replicas (HSDP); 1 shards over all. reshard: blocks give their
    gathered weights back between forward and backward; without it they are gathered once a micro-batch instead of twice, and
    every rank holds the whole model's weights meanwhile. timeout: seconds that ranks wait for one another in a collective."""

    replicas: int = 1
    reshard: bool = True
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"parallel.replicas = {self.replicas}: must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"parallel.timeout = {self.timeout}: must be above 0 seconds")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's constants. weight_decay is applied to matrices, not to norm scales. clip_norm: greatest Euclidean norm of the
    whole gradient; 0 does not clip.

    moments: their dtype. With bfloat16, rounded stochastically, a bfloat16 model takes 10 bytes a parameter instead of 14: the
    parameter and the rest of its master, the gradient, two moments. gradients: the dtype in which they add up over a step's
    micro-batches. With float32 no sum is rounded to bfloat16, and a bfloat16 model takes 2 bytes a parameter more. On several
    ranks sums are always float32, rounded once in the end.

    nonfinite: what to do with a step whose loss or gradient is not finite. Either way the device itself leaves the weights as
    they are; stop: from then on for good, and the run ends with an error at the next log line; skip: for that step, which is
    counted, and the run ends only when that happens skip_limit times in a row.

    offload: moments keeps these in the host's memory, for the trajectory it is to the bit the same. A bfloat16 model then takes
    6 bytes a parameter on the device, and an update the time to copy them there and back. For one rank.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"
    gradients: Literal["parameter", "float32"] = "parameter"
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_limit: int = 10
    offload: Literal["none", "moments"] = "none"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must lie in 0 .. 1, 1 excluded")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps = {self.eps}: must be above 0")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must be 0 or more")
        if self.skip_limit < 1:
            raise ValueError(f"optimizer.skip_limit = {self.skip_limit}: must be at least 1")


@dataclass(frozen=True)
class ScheduleSettings:
    """kind: shape after the warm-up. peak: learning rate at the end of the warm-up. warmup_steps: linear rise from 0.
    final_share: of the peak, where cosine and linear end."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    peak: float = 1e-5
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"schedule.peak = {self.peak}: the learning rate must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps = {self.warmup_steps}: must be 0 or more")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"schedule.final_share = {self.final_share}: must lie in 0 .. 1")
        if self.kind == "constant" and self.final_share:
            raise ValueError("schedule.final_share has no effect with a constant schedule; leave it out")


@dataclass(frozen=True)
class PreferenceSettings:
    """loss: see the module. beta: strength of the pull to the reference. label_smoothing: share of labels taken to be
    flipped (sigmoid only), 0 <= share < 0.5."""

    loss: Literal["sigmoid", "ipo", "ipo-mean", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"preference.beta = {self.beta}: must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing = {self.label_smoothing}: must lie in 0 .. 0.5, 0.5 excluded")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"preference.label_smoothing has no effect with the {self.loss} loss; leave it out")


@dataclass(frozen=True)
class LogSettings:
    """every: steps between log lines; losses of the steps between are kept and written then. tensorboard: write event files.
    wandb: Weights & Biases project, empty for none."""

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every = {self.every}: must be at least 1")


@dataclass(frozen=True)
class GuardSettings:
    """spike: a loss this many deviations above the median of the last `history` steps is noted in spikes.jsonl; 0: none is. A
    deviation is the median distance from that median, scaled to the standard deviation of normal noise.

    lag: share of a step's time that the other ranks wait for the slowest one, above which that is named; 0: none is."""

    spike: float = 8.0
    history: int = 100
    lag: float = 0.1

    def __post_init__(self) -> None:
        for name in ("spike", "lag"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"guard.{name} = {getattr(self, name)}: must be above 0, or 0 to look for none")
        if self.history < LEAST_HISTORY:
            raise ValueError(f"guard.history = {self.history}: must be at least {LEAST_HISTORY} steps")


@dataclass(frozen=True)
class ProfileSettings:
    """steps: to profile, by their number in the log. tool: torch writes, for each step and rank, a Chrome trace, a table of the
    time and the memory over time to `profile` in the run folder; nvtx only marks operations and steps for Nsight Systems, which
    has to run beside it (nsys profile --capture-range=cudaProfilerApi)."""

    steps: tuple[int, ...] = ()
    tool: Literal["torch", "nvtx"] = "torch"

    def __post_init__(self) -> None:
        if any(step < 1 for step in self.steps):
            raise ValueError(f"profile.steps = {list(self.steps)}: steps are numbered from 1")

    def check(self, device_type: str) -> None:
        """Raises: ValueError where the device cannot be looked at in the way that was chosen."""
        if self.tool == "nvtx" and device_type != "cuda":
            raise ValueError(f"profile.tool = 'nvtx': Nsight Systems looks at CUDA devices, this is {device_type}; use torch")
