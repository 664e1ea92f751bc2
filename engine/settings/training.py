"""The settings of a training run: one set of names for pre-training, fine-tuning and preference tuning."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from engine.settings.sections import (
    EvaluationSettings,
    Fp8Settings,
    GuardSettings,
    LogSettings,
    OptimizerSettings,
    ParallelSettings,
    ProfileSettings,
    ScheduleSettings,
    Source,
    check_finite,
)
from engine.settings.toml import PathName, option
from kernels.attention.choice import Backend
from kernels.recompute import Recompute

DEFAULT_CHECKPOINT_MINUTES = 30.0
# A resumed run may change these: they do not change the trajectory beyond rounding.
FREE_ON_RESUME = frozenset(
    {
        "checkpoint_every",
        "checkpoint_minutes",
        "device",
        "dry_run",
        "evaluate",
        "evaluate_every",
        "force",
        "fp8.keep_weights",
        "guard",
        "heldout",
        "heldout_limit",
        "keep_checkpoints",
        "keep_every",
        "log",
        "optimizer.nonfinite",
        "optimizer.offload",
        "optimizer.skip_limit",
        "out",
        "pack_tokens",
        "parallel",
        "profile",
        "recompute",
        "reference_cache",
        "replay",
        "resume",
    }
)
_LEAST = {
    "step_size": 1,
    "context_length": 1,
    "pack_tokens": 0,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "keep_every": 0,
    "replay": 0,
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that the training recipes share."""

    model: PathName = ""
    """Run folder (its newest checkpoint), Hugging Face folder, hub repository owner/name, or preset:NAME for fresh weights. A
    branch (`from`) needs none."""
    from_: Annotated[PathName, option("from")] = ""
    """Branch: start from this checkpoint of another run (or a run folder's newest), with its weights and float32 masters."""
    from_optimizer: bool = True
    """A branch takes over the optimizer's moments; otherwise they begin at 0."""
    from_data: bool = True
    """A branch goes on at the checkpoint's step: data order, noise, schedule and step numbers are those of the run that it
    comes from. Otherwise it begins at step 0 of its own data and schedule."""
    out: PathName
    """Run folder: config.toml, metrics.jsonl, tensorboard, checkpoints."""
    sources: tuple[Source, ...]
    """Prepared datasets and their share of the run."""
    step_size: int
    """Batch size: tokens of an optimizer step over all ranks (pairs, for preference tuning)."""
    tokenizer: PathName = ""
    """Tokenizer folder; default: the model's. A preset needs one."""
    heldout: tuple[PathName, ...] = ()
    """Validation: prepared datasets to evaluate on."""
    heldout_limit: int | None = None
    """Documents of each held-out dataset to evaluate; default: all."""
    context_length: int = 4096
    """Sequence length: the longest document in tokens; longer documents are split."""
    pack_tokens: int = 0
    """Micro-batch size: tokens of one forward and backward pass; default: context_length (twice that for pairs). Gradient
    accumulation follows: a step takes as many micro-batches as step_size needs."""
    steps: int | None = None
    """Optimizer steps; default: as many as the epochs take."""
    epochs: float | None = None
    """Passes over the sources that have no share."""
    seed: int = 0
    """Seed of data order, NEFTune noise, fresh weights and the rounding of bfloat16 moments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the parameters; auto: bfloat16 with exact float32 masters on CUDA, float32 on the CPU."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Matrix products of the layers' linear maps while training. dtype: in the parameters' dtype. fp8: in 8-bit floats, with
    scales made from the numbers at hand (`kernels/fp8_linear.py` explains the method). Predicted, not measured: a quarter
    more tokens a second; gradients are off by about 4 %. Evaluation, generation, checkpoints and the reference of
    preference tuning are as without it. On CUDA it needs dtype = bfloat16 and compute capability 8.9 (H100: 9.0)."""
    recompute: Recompute = "light"
    """Activation checkpointing: the activations that the backward pass computes again, from fastest to leanest: none, light
    (norms and SwiGLU), ffn (also gate and up), block (everything but a block's input). The results are bit-identical."""
    backend: Backend = "auto"
    """Attention by triton (our kernels), flash (FlashAttention 2; no shared prompts), flex (torch's FlexAttention) or reference
    (eager); auto: triton on CUDA except in float32, else reference. Results differ by rounding."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: by checkpoint_minutes alone. The last step always has one."""
    checkpoint_minutes: float | None = None
    """Minutes from one checkpoint to the next; 0: none by the clock; default: 30, or 0 with checkpoint_every."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep on disk."""
    keep_every: int = 0
    """Steps between checkpoints to keep forever; 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in `out`, if there is one; never: refuse a folder that holds a run."""
    replay: int = 0
    """Repeat this step of the run in `out` from the newest checkpoint before it, print its losses, write nothing."""
    dry_run: bool = False
    """Check everything, print the plan and a sample, train nothing, write nothing."""
    force: bool = False
    """Start although the memory plan exceeds the device."""
    fp8: Fp8Settings = field(default_factory=Fp8Settings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluate: EvaluationSettings = field(default_factory=EvaluationSettings)
    log: LogSettings = field(default_factory=LogSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: name at least one prepared folder ([[sources]] path = ...)")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.checkpoint_minutes is not None:
            check_finite("checkpoint_minutes", self.checkpoint_minutes, remedy="; 0 saves none by the clock")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every = {self.keep_every}: must be a multiple of checkpoint_every = {self.checkpoint_every}, as there "
                "is no other checkpoint to keep"
            )
        for name in ("steps", "epochs", "heldout_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be above 0")
        if self.heldout_limit and not self.heldout:
            raise ValueError("heldout_limit has no effect without heldout; name prepared folders there or leave it out")
        if self.evaluate_every and not (self.heldout or self.evaluate.prompts or self.evaluate.tasks):
            raise ValueError(
                "evaluate_every has no effect without heldout, evaluate.prompts or evaluate.tasks; give one of them, or leave "
                "it out"
            )

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between checkpoints by the clock; 0: none."""
        default = 0.0 if self.checkpoint_every else DEFAULT_CHECKPOINT_MINUTES
        return 60 * (default if self.checkpoint_minutes is None else self.checkpoint_minutes)


def check_neftune(alpha: float) -> None:
    """Raises: ValueError for a NEFTune scale that is negative or not finite."""
    check_finite("neftune_alpha", alpha, remedy="; 0 is no noise, the paper uses 5 to 15")
