"""A run before its first step: `open_run` opens and checks everything, so that every mistake is reported before work starts."""

import dataclasses
import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.state import TrainingState, checkpoints, model_folder, newest_checkpoint, read_state
from engine.data.batch import Batch, Packing, Step, make_step
from engine.data.chat_template import with_template_of
from engine.data.dataset import TokenDataset
from engine.data.plan import Plan
from engine.data.stream import step_stream
from engine.distributed.agreement import check_same, seen, weights_sample
from engine.distributed.joining import join
from engine.distributed.ranks import Ranks
from engine.distributed.sharding import first_row, local, shard
from engine.environment import choose_device, choose_dtype, use_deterministic_algorithms
from engine.estimate.memory import MemoryPlan, Training, plan
from engine.observe.metrics import check_wandb
from engine.precision import check_fp8, fp8_layers
from engine.settings.toml import defaults, to_table
from engine.settings.training import FREE_ON_RESUME, TrainSettings
from kernels import padded_to_tiles
from kernels.attention.backends import cannot
from kernels.attention.backward import in_one_pass
from model.config import PRESET, MistralConfig, preset
from model.mistral import Mistral, initial_weights
from model.vocabulary.chat import end_id
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_rows

# Paths that may change on resuming: the plan's fingerprint covers the content of data and tokenizer.
_CONTENT_COUNTS = re.compile(r"tokenizer|sources\.\d+\.path")
# What older runs, which did not know a setting, did otherwise than its default says.
_EARLIER = {"optimizer.gradients": "parameter"}
# The memory plan covers the last step and this many steps, evenly spread over the run.
_PLANNED_STEPS = 8


@dataclass(frozen=True)
class Run:
    """Everything the loop needs, opened and checked.

    config: the checkpoint's, where there is one. start: steps already done. checkpoint: the folder that holds them; None for a
        fresh run. starting_model: its folder; None for a preset, and where a resumed run does not find it any more.
        starting_weights: their fingerprint (`weights_sample`) as the run began; None where unknown.
    """

    settings: TrainSettings
    ranks: Ranks
    dtype: torch.dtype
    config: MistralConfig
    tokenizer: Tokenizer
    datasets: list[TokenDataset]
    heldout: dict[str, TokenDataset]
    plan: Plan
    checkpoint: Path | None
    start: int
    starting_model: Path | None
    starting_weights: str | None = None

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def pack_tokens(self) -> int:
        sides = 2 if self.plan.paired else 1
        return self.settings.pack_tokens or sides * self.settings.context_length

    @property
    def packing(self) -> Packing:
        """The cut of this rank's steps into micro-batches."""
        return Packing(
            window=self.config.sliding_window,
            pack_tokens=self.pack_tokens,
            rank=self.ranks.rank,
            ranks=self.ranks.ranks,
            pad=self.device.type == "cuda",
        )

    def step(self, index: int) -> Step:
        """This rank's part of a step."""
        return make_step(self.plan, index, self.packing)

    def stream(self) -> Generator[Step, None, None]:
        """This rank's part of each step from `start` on, made and copied to the device some steps ahead."""
        return step_stream(self.plan, self.start, self.packing, device=self.device)

    @cached_property
    def planned(self) -> MemoryPlan:
        """The largest memory plan of this rank over a sample of the run's steps."""
        last = self.plan.steps - 1
        start = min(self.start, last)
        plans = []
        for index in sorted({start + (last - start) * part // _PLANNED_STEPS for part in range(_PLANNED_STEPS + 1)}):
            first, *later = self.step(index).batches
            # No gradients exist during a step's first micro-batch, so a smaller later micro-batch may need more memory.
            # Sharded gradients stay whole until the last micro-batch reduces them.
            plans.append(plan(self._training([first], accumulates=bool(later) and self.ranks.ranks > 1)))
            if later:
                plans.append(plan(self._training(later, accumulates=True)))
        return max(plans, key=lambda found: found.peak)

    @property
    def fp8_layers(self) -> range:
        """The layers whose matrix products run in FP8 while training."""
        return fp8_layers(self.settings, self.config)

    def _training(self, batches: Sequence[Batch], *, accumulates: bool) -> Training:
        """The facts that a step's memory depends on, with the largest of these micro-batches."""
        settings = self.settings
        largest = max(batches, key=lambda batch: len(batch.tokens_T))
        return Training(
            self.config,
            self.dtype,
            settings.optimizer,
            settings.recompute,
            tokens=len(largest.tokens_T),
            rows=max(int((batch.rows_N >= 0).sum()) for batch in batches),
            accumulates=accumulates,
            log_probs=self.plan.paired,
            kernels=self.device.type == "cuda" and self.dtype == torch.bfloat16,
            shards=self.ranks.ranks // settings.parallel.replicas,
            reshard=settings.parallel.reshard,
            reduce_once=settings.parallel.reduce_once,
            fp8_layers=self.fp8_layers,
            keep_codes=settings.fp8.keep_weights and self.ranks.mesh is None,
            one_pass=in_one_pass(self.device, self.dtype),
            documents=largest.attention,
        )

    def state(self, step: int) -> TrainingState:
        """The state that a checkpoint after this many steps records."""
        # The resolved dtype: `auto` may mean another dtype on another machine, which would lose the masters' low bits.
        dtype = str(self.dtype).removeprefix("torch.")
        settings = {**to_table(self.settings), "dtype": dtype}
        return TrainingState(step, settings, self.plan.fingerprint, self.starting_weights)

    def load_model(self) -> Mistral:
        """This rank's shard of the model to train: the checkpoint's weights, or the starting model's in a fresh run."""
        return self.load_initial_model() if self.checkpoint is None else self._load(self.checkpoint)

    def load_initial_model(self) -> Mistral:
        """This rank's shard of the starting model. Preference tuning uses it as the reference. All ranks call it together.

        Raises: FileNotFoundError where a resumed run does not find the model any more.
        """
        if not self.settings.model.startswith(PRESET):
            fresh = self.starting_model if self.checkpoint is None else None
            return self._load(fresh or _folder(self.settings.model, self.ranks, weights=True))
        model = self.empty_model()
        parameters = dict(model.named_parameters())
        for name, values in initial_weights(model, self.settings.seed):
            first = first_row(parameters[name])
            mine = local(parameters[name]).detach()
            mine.copy_(values[first : first + len(mine)])
        return model

    def _load(self, folder: Path) -> Mistral:
        model = self.empty_model()
        targets = {name: (local(parameter).detach(), first_row(parameter)) for name, parameter in model.named_parameters()}
        load_rows(folder, self.config, targets)
        return model

    def empty_model(self) -> Mistral:
        """The model with uninitialised weights, configured by the settings.

        Sharding comes before allocation, so no rank ever needs memory for the whole model.
        """
        with torch.device("meta"):
            model = Mistral(self.config)
        model = shard(model.to(self.dtype), self.ranks, self.settings.parallel).to_empty(device=self.device)
        model.recompute = self.settings.recompute
        model.attention_backend = self.settings.backend
        model.fp8_layers = self.fp8_layers
        model.weight_codes.keep = self.settings.fp8.keep_weights and self.ranks.mesh is None
        return model


def open_run(settings: TrainSettings, kinds: tuple[str, ...], *, share_prompts: bool = False) -> Run:
    """Open the model's configuration, the tokenizer, the datasets and the plan, and find the steps already done.

    Args: kinds: dataset kinds that the objective can train on. share_prompts: compute the common prompt of a pair once.
    Raises: FileNotFoundError or ValueError naming what is missing or does not fit, and the remedy.
    """
    if not settings.replay:
        check_writable(Path(settings.out), "out")
    ranks = join(choose_device(settings.device), settings.parallel, dict(_named(to_table(settings))))
    if ranks.device.type == "cuda":
        use_deterministic_algorithms()
    check_wandb(settings.log)
    dtype = choose_dtype(settings.dtype, ranks.device)
    problem = cannot(settings.backend, ranks.device, dtype, gradients=True, prefixes=share_prompts)
    if problem:
        raise ValueError(f"backend = {settings.backend!r}: {problem}")
    settings.profile.check(ranks.device.type)
    _check_model(settings)
    begun = _begun(settings, ranks)
    model = None if settings.model.startswith(PRESET) else _named_folder("model", settings, ranks, begun)
    tokenizer = _tokenizer(settings, ranks, model, begun)
    config = _config(settings, model, tokenizer) if begun is None else fitted_config(begun.checkpoint, tokenizer)
    datasets = [_open_dataset(source.path, kinds, tokenizer) for source in settings.sources]
    heldout = {Path(path).name: _open_dataset(path, kinds, tokenizer) for path in settings.heldout}
    if len(heldout) < len(settings.heldout):
        raise ValueError(f"heldout = {list(settings.heldout)}: two folders share a name, and metrics are named after folders")
    tokenizer = with_template_of([*datasets, *heldout.values()], tokenizer)
    config = config.ending_with(end_id(tokenizer))
    plan = plan_of(settings, datasets, share_prompts=share_prompts)
    weights = None if model is None else weights_sample(model)
    run = Run(settings, ranks, dtype, config, tokenizer, datasets, heldout, plan, None, 0, model, weights)
    _check_sizes(run)
    if begun is not None:
        run = _resumed(run, begun)
    run = with_chosen_gradients(run)
    if settings.replay > run.plan.steps:
        raise ValueError(f"replay = {settings.replay}: the run has {run.plan.steps} steps")
    _check_same_content(run)
    return run


def _check_model(settings: TrainSettings) -> None:
    """Refuse a model that cannot be meant."""
    if settings.model.startswith(PRESET):
        preset(settings.model.removeprefix(PRESET))
    elif not settings.model:
        raise ValueError("model is empty: name a folder, a hub repository owner/name, or preset:NAME")
    elif Path(settings.out).resolve() == Path(settings.model).expanduser().resolve():
        raise ValueError(f"out and model are both {settings.out}: the run would write into its starting model; change out")


def plan_of(settings: TrainSettings, datasets: list[TokenDataset], *, share_prompts: bool) -> Plan:
    """The data order that the settings ask for."""
    return Plan(
        datasets,
        list(settings.sources),
        seed=settings.seed,
        context_length=settings.context_length,
        step_size=settings.step_size,
        steps=settings.steps,
        epochs=settings.epochs,
        share_prompts=share_prompts,
    )


def with_chosen_gradients(run: Run) -> Run:
    """The run with `optimizer.gradients` decided, where it is "auto": the same dtype for any number of ranks."""
    bfloat16 = run.dtype == torch.bfloat16
    chosen = run.settings.optimizer.chosen_gradients(run.plan.mean_step_places, run.pack_tokens, bfloat16=bfloat16)
    return _with_gradients(run, chosen)


def _with_gradients(run: Run, gradients: str) -> Run:
    """The run with this `optimizer.gradients`."""
    optimizer = dataclasses.replace(run.settings.optimizer, gradients=gradients)  # type: ignore[arg-type]
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, optimizer=optimizer))


def _check_sizes(run: Run) -> None:
    settings, plan, limit = run.settings, run.plan, run.config.max_position_embeddings
    if run.fp8_layers:
        check_fp8(run.device, run.dtype)
    if settings.context_length > limit:
        raise ValueError(f"context_length = {settings.context_length} is above the model's max_position_embeddings = {limit}")
    if run.pack_tokens < plan.longest_unit:
        unit = "both sides of the longest pair" if plan.paired else "the longest document or part of one"
        raise ValueError(
            f"pack_tokens = {run.pack_tokens} is below {unit} ({plan.longest_unit} tokens); raise it, or leave it out"
        )


@dataclass(frozen=True)
class _Begun:
    """A run that is to go on."""

    checkpoint: Path
    state: TrainingState


def _begun(settings: TrainSettings, ranks: Ranks) -> _Begun | None:
    """The run's newest checkpoint and its state; None for a fresh run."""
    # Rank 0 decides for all ranks, because the folder may change between two reads.
    name = ranks.from_main(_starting_point(settings))
    if name is None:
        return None
    if settings.resume == "never" and not settings.replay:
        raise FileExistsError(f"{settings.out}: holds a run already ({name}); choose another out, or resume = auto")
    checkpoint = seen(Path(settings.out) / name, ranks)
    return _Begun(checkpoint, read_state(checkpoint))


def _resumed(run: Run, begun: _Begun) -> Run:
    """The run, continued from its newest checkpoint."""
    state = begun.state
    if run.settings.optimizer.gradients == "auto":
        # Another micro-batch size must not change the dtype of the sums midway.
        run = _with_gradients(run, {**_EARLIER, **dict(_named(state.settings))}["optimizer.gradients"])
    before = run.plan.unmerged()
    if state.plan == before.fingerprint:
        run = dataclasses.replace(run, plan=before)
    _check_same_run(run, state)
    changes = _changes_of_model(run, state)
    if changes and run.ranks.main:
        print(f"note       {run.settings.model}: {changes}; the run keeps its own")
    return dataclasses.replace(run, checkpoint=begun.checkpoint, start=state.step, starting_weights=state.model)


def _changes_of_model(run: Run, state: TrainingState) -> str:
    """How the starting model has changed since the run began, as far as a resumed run can see."""
    if run.starting_model is None:
        return ""
    try:
        differing = _differences(fitted_config(run.starting_model, run.tokenizer), run.config)
    except (OSError, ValueError) as error:
        return f"cannot be read any more ({error})"
    if differing:
        return f"its configuration changed since the run began: {differing}"
    return "its weights changed since the run began" if _other_weights(run, state) else ""


def _other_weights(run: Run, state: TrainingState) -> bool:
    """Whether the starting model now has other weights than the run began with, as far as both are known."""
    return None not in (run.starting_weights, state.model) and run.starting_weights != state.model


def _differences(now: MistralConfig, began: MistralConfig) -> str:
    """The fields in which two configurations differ, with both values."""
    names = [field.name for field in dataclasses.fields(now) if getattr(now, field.name) != getattr(began, field.name)]
    return ", ".join(f"{name} = {getattr(now, name)}, was {getattr(began, name)}" for name in names)


def _check_same_content(run: Run) -> None:
    """Every rank proves that it reads the same as rank 0."""
    if run.ranks.mesh is None or run.settings.dry_run:
        return
    facts = {
        "tokenizer": run.tokenizer.fingerprint,
        "plan": run.plan.fingerprint,
        "model configuration": str(run.config),
        "steps done": run.start,
        **{f"data {source.path}": data.fingerprint for source, data in zip(run.settings.sources, run.datasets, strict=True)},
        **{f"heldout {name}": data.fingerprint for name, data in run.heldout.items()},
    }
    if run.checkpoint is not None:
        facts[f"weights {run.checkpoint}"] = weights_sample(run.checkpoint)
    elif run.starting_model is not None:
        facts[f"weights {run.starting_model}"] = run.starting_weights
    check_same(run.ranks, facts, "copy the same files to all machines, or use a disk that they share")


def _starting_point(settings: TrainSettings) -> str | None:
    """Name of the newest checkpoint (for a replay, the newest before the replayed step), or None."""
    names = [path.name for path in checkpoints(settings.out)]
    if settings.replay:
        names = [name for name in names if name < f"step-{settings.replay:08d}"]
    return names[-1] if names else None


def check_writable(folder: Path, setting: str) -> None:
    """Refuse a setting's folder that cannot be created or written, before hours of work depend on it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder}: cannot be written: {existing} is not a folder; choose another {setting}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written: no permission for {existing}; choose another {setting}")


def _folder(name: str, ranks: Ranks, *, weights: bool) -> Path:
    """The folder of a model's name. Rank 0 decides which checkpoint of a run folder is the newest."""
    newest = ranks.decided(lambda: str(newest_checkpoint(name) or ""))
    return seen(Path(newest), ranks) if newest else model_folder(name, weights=weights)


def _named_folder(setting: str, settings: TrainSettings, ranks: Ranks, begun: _Begun | None) -> Path | None:
    """The folder that `model` or `tokenizer` names; None where a run that is to go on has lost it: its checkpoint is enough."""
    name = getattr(settings, setting)
    kept = begun is not None and begun.state.settings.get(setting) == name
    try:
        return _folder(name, ranks, weights=setting == "model" and not (kept or settings.dry_run))
    except FileNotFoundError:
        if kept:
            return None
        raise


def _tokenizer(settings: TrainSettings, ranks: Ranks, model: Path | None, begun: _Begun | None) -> Tokenizer:
    if not settings.tokenizer and settings.model.startswith(PRESET):
        raise ValueError(f"model = {settings.model}: a preset has no tokenizer; name its folder as tokenizer")
    folder = _named_folder("tokenizer", settings, ranks, begun) if settings.tokenizer else model
    if folder is None:
        assert begun is not None
        folder = begun.checkpoint
    return Tokenizer.load(folder)


def _config(settings: TrainSettings, model: Path | None, tokenizer: Tokenizer) -> MistralConfig:
    if model is None:
        return dataclasses.replace(
            preset(settings.model.removeprefix(PRESET)),
            vocab_size=padded_to_tiles(tokenizer.vocab_size),
            unpadded_vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=end_id(tokenizer),
        )
    return fitted_config(model, tokenizer)


def _open_dataset(path: str, kinds: tuple[str, ...], tokenizer: Tokenizer) -> TokenDataset:
    dataset = TokenDataset.open(path)
    if dataset.kind not in kinds:
        raise ValueError(f"{path}: holds {dataset.kind}, this recipe trains on {' or '.join(kinds)}")
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path}: was prepared with another tokenizer than the model's; prepare it again with recipes.prepare")
    return dataset


def _check_same_run(run: Run, state: TrainingState) -> None:
    now = run.state(0)
    asked, began = (dict(_named(table)) for table in (now.settings, state.settings))
    # A setting that an older version did not know had the effect of its default.
    began = dict(_named(defaults(type(run.settings)))) | _EARLIER | began
    for name in sorted({*asked, *began}):
        if name in asked and name in began and _CONTENT_COUNTS.fullmatch(name):
            continue
        if name == "model" and state.model is not None and state.model == run.starting_weights:
            # The same weights, moved or copied.
            continue
        if asked.get(name) != began.get(name) and not {name, name.split(".")[0]} & FREE_ON_RESUME:
            others = ", which has other weights" if name == "model" and _other_weights(run, state) else ""
            raise ValueError(
                f"{run.out}: holds a run with {name} = {began.get(name)!r}, the settings now say {asked.get(name)!r}{others}; "
                "choose another out, or restore the settings that the run began with"
            )
    if now.plan != state.plan:
        raise ValueError(f"{run.out}: the prepared data changed since this run began; restore it or choose another out")


def _named(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested tables and lists, with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named(inner, f"{prefix}{key}.")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _named(inner, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix("."), value
