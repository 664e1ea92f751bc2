"""What a training recipe can be told: one set of names for pre-training, fine-tuning and preference tuning."""

from dataclasses import dataclass, field
from typing import Literal

from engine.settings.sections import (
    GuardSettings,
    LogSettings,
    OptimizerSettings,
    ParallelSettings,
    ProfileSettings,
    ScheduleSettings,
    Source,
)
from kernels.attention.backends import Backend
from model.mistral import Recompute

# Changing these does not change the trajectory (beyond rounding), so a run may be resumed with other values.
FREE_ON_RESUME = frozenset(
    {"out", "pack_tokens", "device", "heldout", "heldout_limit", "evaluate_every", "checkpoint_every", "keep_checkpoints",
     "keep_every", "log", "resume", "dry_run", "reference_cache", "recompute", "parallel", "optimizer.offload",
     "guard", "profile", "replay"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that the training recipes share."""

    model: str
    """Run folder (its newest checkpoint), Hugging Face folder, hub repository owner/name, or preset:NAME for fresh weights."""
    out: str
    """Run folder: config.toml, metrics.jsonl, tensorboard, checkpoints."""
    sources: tuple[Source, ...]
    """Prepared folders and their share of the run."""
    step_size: int
    """Tokens of a step (pairs of a step for preference tuning)."""
    tokenizer: str = ""
    """Tokenizer folder; default: the model's. A preset needs one."""
    heldout: tuple[str, ...] = ()
    """Prepared folders to evaluate on."""
    heldout_limit: int | None = None
    """Documents of each held-out folder that are evaluated; default all."""
    context_length: int = 4096
    """Longest document in tokens; longer ones are split."""
    pack_tokens: int = 0
    """Tokens of a micro-batch; default context_length (twice that for pairs)."""
    steps: int | None = None
    """Optimizer steps; default as many as the epochs take."""
    epochs: float | None = None
    """Passes over the sources (those without a share)."""
    seed: int = 0
    """Of data order, NEFTune noise, fresh weights and the rounding of bfloat16 moments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; auto: bfloat16 with exact float32 masters on CUDA, float32 on the CPU."""
    recompute: Recompute = "light"
    """What the backward pass makes again instead of keeping it, from fastest to leanest: none, light (norms and SwiGLU), ffn
    (the product for gate and up too), block (everything but a block's input). The results are to the bit the same."""
    backend: Backend = "auto"
    """Who computes attention: triton (our kernels), flash (FlashAttention 2 in torch; no shared prompts), flex (torch's
    FlexAttention) or reference (eager); auto: triton on CUDA but for float32, else reference. Results differ by roundings."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    keep_every: int = 0
    """Steps between checkpoints that stay on disk for good; 0: none does."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run that is in `out`, if there is one; never: refuse a folder that holds one."""
    replay: int = 0
    """Run this step of the run in `out` once more, from its newest checkpoint before it, print its losses, write nothing."""
    dry_run: bool = False
    """Check everything, print the plan and a sample, train nothing, write nothing."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    log: LogSettings = field(default_factory=LogSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: name at least one prepared folder ([[sources]] path = ...)")
        for name, least in (("step_size", 1), ("context_length", 1), ("pack_tokens", 0), ("evaluate_every", 0),
                            ("checkpoint_every", 0), ("keep_checkpoints", 1), ("keep_every", 0), ("replay", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every = {self.keep_every}: must be a multiple of checkpoint_every = {self.checkpoint_every}, as there "
                "is no other checkpoint to keep"
            )
        for name in ("steps", "epochs", "heldout_limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} = {value}: must be above 0")
        if self.evaluate_every and not self.heldout:
            raise ValueError("evaluate_every has no effect without heldout; name prepared folders there or leave it out")
        if self.heldout_limit is not None and not self.heldout:
            raise ValueError("heldout_limit has no effect without heldout; name prepared folders there or leave it out")


def check_neftune(alpha: float) -> None:
    """Refuse a negative NEFTune scale."""
    if alpha < 0:
        raise ValueError(f"neftune_alpha = {alpha}: must be 0 (no noise) or more; the paper uses 5 to 15")
