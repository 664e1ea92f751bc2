"""The sections of a run's settings: data mixture, ranks, optimizer, schedule, preference loss, evaluation, log, guard, profile.

Each class checks its own ranges and raises ValueError. Nothing here imports torch, so `--help` and a wrong setting answer at
once.
"""

import math
from dataclasses import dataclass
from typing import Literal

from engine.settings.toml import PathName
from model.sampling import Sampling

# Sums of more gradients than this are not rounded to bfloat16 after each addition.
FEW_MICRO_BATCHES = 4
# Fewer losses have no meaningful spread.
LEAST_HISTORY = 10


def check_finite(name: str, value: float, *, above: bool = False, remedy: str = "") -> None:
    """Raises: ValueError naming the setting where the value is negative, infinite or NaN; with `above`, also where it is 0."""
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ValueError(f"{name} = {value}: must be a number {'above 0' if above else 'that is 0 or more'}{remedy}")


@dataclass(frozen=True)
class Source:
    """One prepared dataset of the mixture. A mixture uses either shares or passes."""

    path: PathName
    """Folder of the prepared dataset."""
    share: float | None = None
    """Relative part of the run's tokens (pairs, for preferences). The source repeats as often as its share needs."""
    passes: float | None = None
    """Times that each document is seen in an epoch; default 1. 0.5 takes half of the documents."""

    def __post_init__(self) -> None:
        if self.share is not None and self.passes is not None:
            raise ValueError(f"source '{self.path}': share and passes exclude each other: leave one out")
        for name in ("share", "passes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"source '{self.path}': {name} = {value}: must be above 0")


@dataclass(frozen=True)
class ParallelSettings:
    """How several ranks (GPUs) share the model."""

    replicas: int = 1
    """Copies of the model (HSDP). Each copy is sharded over ranks / replicas; 1 shards over all ranks (FSDP)."""
    reshard: bool = True
    """Free each block's gathered weights after the forward pass and gather them again for the backward pass. Without it, each
    rank holds the whole model's weights during a micro-batch, and gathers them once instead of twice."""
    reduce_once: bool = False
    """Sum gradients over the ranks once a step, after its last micro-batch, and not after each. Sends less, and each rank holds
    the whole model's gradients in float32 from a step's first micro-batch on: 4 bytes a parameter instead of 4 / ranks."""
    timeout: float = 1800.0
    """Seconds that ranks wait for one another in a collective before the run ends."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"parallel.replicas = {self.replicas}: must be at least 1")
        check_finite("parallel.timeout", self.timeout, above=True, remedy=" (seconds)")


@dataclass(frozen=True)
class Fp8Settings:
    """Which layers multiply in FP8 with precision = fp8, and what they keep."""

    bf16_first: int = 1
    """Layers at the beginning that stay in the parameters' dtype."""
    bf16_last: int = 1
    """Layers at the end that stay in the parameters' dtype."""
    keep_weights: bool = True
    """Keep the weights' FP8 copies during a step: 2 bytes for each weight of an FP8 layer. Otherwise each forward and backward
    pass makes them again, with bit-identical results. Several ranks never keep them."""

    def __post_init__(self) -> None:
        for name in ("bf16_first", "bf16_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"fp8.{name} = {getattr(self, name)}: must be 0 or more layers")

    def layers(self, count: int) -> range:
        """The layers that multiply in FP8, of a model of `count`."""
        return range(self.bf16_first, max(self.bf16_first, count - self.bf16_last))


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with exact float32 masters. Training in bfloat16 takes 14 bytes a parameter by default: the parameter and the rest
    of its master (4), the gradient (2; 4 where a step has more than a few micro-batches), two float32 moments (8)."""

    beta1: float = 0.9
    """Decay of the first moment (the mean gradient)."""
    beta2: float = 0.95
    """Decay of the second moment (the mean squared gradient)."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norm scales never decay."""
    clip_norm: float = 1.0
    """Largest Euclidean norm of the whole gradient; 0: no clipping."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the moments. bfloat16 is rounded stochastically and saves 4 bytes a parameter."""
    gradients: Literal["auto", "parameter", "float32"] = "auto"
    """Dtype in which a step's gradients accumulate. float32 avoids rounding every sum to bfloat16 (1.5 % error at 129
    micro-batches, 4 % at 401; float32: 0.5 %) and costs 2 bytes a parameter more. auto: float32 where parameters are bfloat16
    and a step holds more than 4 x pack_tokens places, counted over all ranks, else parameter. A resumed run keeps what it
    began with. Several ranks always sum in float32 and round once at the end: over ranks first, then over micro-batches."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """After a loss or gradient that is not finite, the weights stay as they are. stop: no later update either, and the run ends
    with an error at the next log line; skip: skip and count this step alone."""
    skip_limit: int = 10
    """With nonfinite = skip, the run ends after this many skipped steps in a row."""
    offload: Literal["none", "moments"] = "none"
    """moments: keep the moments in the host's memory, with bit-identical results. Saves 8 bytes a parameter on the device.
    An update takes as long as their copies over the bus, both directions at once. One rank only."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must lie in 0 .. 1, 1 excluded")
        check_finite("optimizer.eps", self.eps, above=True)
        check_finite("optimizer.weight_decay", self.weight_decay)
        check_finite("optimizer.clip_norm", self.clip_norm, remedy="; 0 clips nothing")
        if self.skip_limit < 1:
            raise ValueError(f"optimizer.skip_limit = {self.skip_limit}: must be at least 1")

    def chosen_gradients(
        self,
        step_places: float,  # of all ranks
        pack_tokens: int,
        *,
        bfloat16: bool,  # the parameters
    ) -> Literal["parameter", "float32"]:
        """`gradients`, with the choice that auto makes. It does not depend on the number of ranks."""
        if self.gradients != "auto":
            return self.gradients
        return "float32" if bfloat16 and step_places > FEW_MICRO_BATCHES * pack_tokens else "parameter"


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning-rate schedule: a linear warm-up from 0, then `kind`."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    peak: float = 1e-5
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 0
    """Steps of the warm-up."""
    final_share: float = 0.0
    """Learning rate at the end of cosine and linear, as a share of the peak."""
    start: int = 0
    """Step after which the schedule begins, warm-up included: a branch may give the steps after its checkpoint a schedule of
    their own. Not above the steps that the branch's checkpoint has."""

    def __post_init__(self) -> None:
        check_finite("schedule.peak", self.peak, above=True, remedy=", as it is the learning rate")
        for name in ("warmup_steps", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} = {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"schedule.final_share = {self.final_share}: must lie in 0 .. 1")
        if self.kind == "constant" and self.final_share:
            raise ValueError("schedule.final_share has no effect with a constant schedule; leave it out")


@dataclass(frozen=True)
class PreferenceSettings:
    """Loss of preference tuning."""

    loss: Literal["sigmoid", "sigmoid-mean", "robust", "ipo", "ipo-mean", "hinge", "apo-zero", "apo-down", "simpo"] = "sigmoid"
    """sigmoid: DPO; sigmoid-mean: DPO on log-probabilities averaged over the answer's tokens (length-normalised; beta is then
    some 20 times larger); robust: DPO corrected for a known share of flipped labels; ipo: IPO on summed log-probabilities, as
    in the paper; ipo-mean: IPO on averages, as TRL computes it; hinge: SLiC's rank loss; apo-zero, apo-down: anchored losses,
    for chosen answers that are better or worse than the model's own; simpo: SimPO on averages, without a reference model."""
    beta: float = 0.1
    """Strength of the pull to the reference model; with simpo the scale of the reward (2 to 10 there)."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, below 0.5: conservative DPO with sigmoid, unbiased DPO with robust."""
    target_margin: float = 0.0
    """simpo only: by how much the chosen answer's reward should lead (gamma)."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-probability a token, added to each pair's loss (RPO)."""

    def __post_init__(self) -> None:
        check_finite("preference.beta", self.beta, above=True)
        check_finite("preference.target_margin", self.target_margin)
        check_finite("preference.sft_weight", self.sft_weight, remedy="; 0 leaves the term out")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing = {self.label_smoothing}: must lie in 0 .. 0.5, 0.5 excluded")
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid-mean", "robust"):
            raise ValueError(f"preference.label_smoothing has no effect with the {self.loss} loss; leave it out")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("preference.loss = 'robust': needs preference.label_smoothing, the share of flipped labels")
        if self.target_margin and self.loss != "simpo":
            raise ValueError(f"preference.target_margin has no effect with the {self.loss} loss; leave it out")

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a frozen reference model."""
        return self.loss != "simpo"

    @property
    def averages(self) -> bool:
        """Whether the loss takes log-probabilities averaged over an answer's tokens, not their sums."""
        return self.loss.endswith("-mean") or self.loss == "simpo"


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation does beside the held-out losses: answers to prompts, scores of benchmark tasks."""

    prompts: PathName = ""
    """File of prompts to answer: .txt with a prompt a line, or JSON Lines with `prompt` or `messages`. Fine-tuning and
    preference tuning ask through the chat template, pre-training continues the text."""
    new_tokens: int = 128
    """Longest answer to a prompt, in tokens."""
    temperature: float = 0.0
    """Divides the scores of the next token; 0 takes the most likely one (greedy)."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likely tokens that has this probability; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this many times as likely as the most likely one; 0: from all."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer so far less likely; 1 changes nothing."""
    seed: int = 0
    """Seed of sampled answers: every evaluation draws the same numbers."""
    tasks: tuple[str, ...] = ()
    """Benchmark tasks to score, by the names and task files that recipes.evaluate --tasks takes."""
    task_limit: int = 100
    """Only the first items of each task; 0: all."""
    task_data: PathName = ""
    """Folder of the files that task files read; default: each task file's own."""
    task_chat: bool = False
    """Ask the tasks through the chat template, examples as earlier turns."""

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError(f"evaluate.new_tokens = {self.new_tokens}: must be at least 1")
        if self.task_limit < 0:
            raise ValueError(f"evaluate.task_limit = {self.task_limit}: must be at least 1, or 0 for all items")
        try:
            _ = self.sampling
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from None

    @property
    def sampling(self) -> Sampling:
        """The sampler of answers to prompts."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.new_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True)
class LogSettings:
    """Metrics of the run."""

    every: int = 10
    """Steps between log lines, beside the first step's. A log line also writes the losses of the steps before it."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    wandb: str = ""
    """Weights & Biases project; empty: none."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every = {self.every}: must be at least 1")


@dataclass(frozen=True)
class GuardSettings:
    """Warnings of a run: loss spikes and slow ranks."""

    spike: float = 8.0
    """A loss more than this many deviations above the median of the last `history` steps is noted in spikes.jsonl; 0: never. A
    deviation is the median distance from the median, scaled to the standard deviation of normal noise."""
    history: int = 100
    """Steps that the median covers."""
    lag: float = 0.1
    """A log line names the slowest rank if the others wait for it longer than this share of a step; 0: never."""

    def __post_init__(self) -> None:
        for name in ("spike", "lag"):
            check_finite(f"guard.{name}", getattr(self, name), remedy="; 0 turns it off")
        if self.history < LEAST_HISTORY:
            raise ValueError(f"guard.history = {self.history}: must be at least {LEAST_HISTORY} steps")


@dataclass(frozen=True)
class ProfileSettings:
    """Profiling of chosen steps."""

    steps: tuple[int, ...] = ()
    """Steps to profile, by their number in the log."""
    tool: Literal["torch", "nvtx"] = "torch"
    """torch: write a Chrome trace, a table of operators and a memory timeline of each step and rank to `profile` in the run
    folder; nvtx: only mark operations and steps for Nsight Systems (nsys profile --capture-range=cudaProfilerApi)."""

    def __post_init__(self) -> None:
        if any(step < 1 for step in self.steps):
            raise ValueError(f"profile.steps = {list(self.steps)}: steps are numbered from 1")

    def check(self, device_type: str) -> None:
        """Raises: ValueError where `tool` cannot observe this type of device."""
        if self.tool == "nvtx" and device_type != "cuda":
            raise ValueError(f"profile.tool = 'nvtx': Nsight Systems observes CUDA devices, this is {device_type}; use torch")
