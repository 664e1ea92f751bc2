"""A run before its first step: `open_run` opens and checks everything, so that every mistake is reported before work starts."""

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from engine.checkpoint.state import (
    Parent,
    TrainingState,
    checkpoints,
    fingerprint_of,
    read_state,
)
from engine.continuing import Past, branch_model, check_branch, check_own_folder, check_same_run, named, parent_of
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
from engine.inputs import check_writable, config_of, folder_of, named_folder, open_dataset, tokenizer_of
from engine.observe.sinks import check_wandb
from engine.precision import check_fp8, fp8_layers
from engine.settings.toml import to_table
from engine.settings.training import TrainSettings
from kernels.attention.backends import cannot
from kernels.attention.backward import in_one_pass
from model.config import PRESET, MistralConfig, preset
from model.mistral import Mistral, initial_weights
from model.vocabulary.chat import end_id
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_rows

# The memory plan covers the last step and this many steps, evenly spread over the run.
_PLANNED_STEPS = 8


@dataclass(frozen=True)
class Run:
    """Everything the loop needs, opened and checked.

    config: the checkpoint's, where there is one. start: steps already done. checkpoint: the folder that holds them; None for a
        fresh run. starting_model: its folder; None for a preset, and where a resumed run or a branch does not find it.
        starting_weights: their fingerprint (`weights_sample`) as the run began; None where unknown.
    parent: of a branch. trial: a trial in `out` that must move aside before this run writes there.
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
    parent: Parent | None = None
    trial: Past | None = None

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
        return max((plan(training) for training in self.trainings), key=lambda found: found.peak)

    @cached_property
    def trainings(self) -> list[Training]:
        """What the memory of this rank's micro-batches depends on, over a sample of the run's steps."""
        last = self.plan.steps - 1
        start = min(self.start, last)
        found = []
        for index in sorted({start + (last - start) * part // _PLANNED_STEPS for part in range(_PLANNED_STEPS + 1)}):
            first, *later = self.step(index).batches
            # No gradients exist during a step's first micro-batch, so a smaller later micro-batch may need more memory.
            # Sharded gradients stay whole until the last micro-batch reduces them.
            found.append(self._training([first], accumulates=bool(later) and self.ranks.ranks > 1))
            if later:
                found.append(self._training(later, accumulates=True))
        return found

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
        contents = {f"sources.{number}.path": data.fingerprint for number, data in enumerate(self.datasets)}
        contents["tokenizer"] = self.tokenizer.fingerprint
        return TrainingState(step, settings, self.plan.fingerprint, self.starting_weights, contents, self.parent)

    @property
    def continued(self) -> Path | None:
        """The checkpoint that the next step goes on from: the run's own, or a new branch's parent; None for any other run."""
        return self.checkpoint or (Path(self.parent.checkpoint) if self.parent else None)

    @property
    def first(self) -> int:
        """Steps that were done before the run's own first step: a branch's parent's, else 0."""
        return self.parent.step if self.parent and self.settings.from_data else 0

    def load_model(self) -> Mistral:
        """This rank's shard of the model to train: the weights of `continued`, or the starting model's."""
        return self.load_initial_model() if self.continued is None else self._load(self.continued)

    def load_initial_model(self) -> Mistral:
        """This rank's shard of the starting model. Preference tuning uses it as the reference. All ranks call it together.

        Raises: FileNotFoundError where a resumed run or a branch does not find the model.
        """
        if not self.settings.model.startswith(PRESET):
            fresh = self.starting_model if self.continued is None else None
            return self._load(fresh or folder_of(self.settings.model, self.ranks, weights=True))
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
    ranks = join(choose_device(settings.device), settings.parallel, dict(named(to_table(settings))))
    if ranks.device.type == "cuda":
        use_deterministic_algorithms()
    check_wandb(settings.log)
    dtype = choose_dtype(settings.dtype, ranks.device)
    problem = cannot(settings.backend, ranks.device, dtype, gradients=True, prefixes=share_prompts)
    if problem:
        raise ValueError(f"backend = {settings.backend!r}: {problem}")
    settings.profile.check(ranks.device.type)
    check_own_folder(settings)
    begun = _begun(settings, ranks)
    run, failure = None, None
    try:
        run = _opened(settings, kinds, ranks, dtype, begun, share_prompts=share_prompts)
    except ValueError as error:
        failure = error
    if begun is not None and begun.is_trial and not settings.replay and ranks.from_main(run is None):
        anew = _opened(settings, kinds, ranks, dtype, None, share_prompts=share_prompts)
        if anew.plan.steps > begun.state.settings["steps"]:
            run, failure = dataclasses.replace(anew, trial=begun), None
    if failure is not None:
        raise failure
    assert run is not None
    _check_same_content(run)
    return run


def _opened(
    settings: TrainSettings,
    kinds: tuple[str, ...],
    ranks: Ranks,
    dtype: torch.dtype,
    begun: Past | None,  # the run's own newest checkpoint; None to begin anew
    *,
    share_prompts: bool,
) -> Run:
    past = begun or (parent_of(settings, ranks) if settings.from_ else None)
    if settings.from_ and past is not None and not settings.model:
        settings = dataclasses.replace(settings, model=branch_model(settings, past))
    _check_model(settings)
    model = None if settings.model.startswith(PRESET) else named_folder("model", settings, ranks, past)
    tokenizer = tokenizer_of(settings, ranks, model, past)
    config = config_of(settings, model, tokenizer) if past is None else fitted_config(past.checkpoint, tokenizer)
    datasets = [open_dataset(source.path, kinds, tokenizer) for source in settings.sources]
    heldout = {Path(path).name: open_dataset(path, kinds, tokenizer) for path in settings.heldout}
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
    elif past is not None:
        run = _branched(run, past)
    run = with_chosen_gradients(run)
    if settings.replay and not run.start < settings.replay <= run.plan.steps:
        raise ValueError(f"replay = {settings.replay}: the run has the steps {run.start + 1} to {run.plan.steps}")
    if begun is None and settings.schedule.start > run.start:
        raise ValueError(f"schedule.start = {settings.schedule.start}: the run begins after step {run.start}; lower it")
    return run


def _check_model(settings: TrainSettings) -> None:
    """Refuse a model that cannot be meant."""
    if settings.model.startswith(PRESET):
        preset(settings.model.removeprefix(PRESET))
    elif not settings.model:
        raise ValueError(
            "model is empty: name a folder, a hub repository owner/name, or preset:NAME; or set from, for a branch"
        )
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


def _begun(settings: TrainSettings, ranks: Ranks) -> Past | None:
    """The run's newest checkpoint and its state; None for a fresh run."""
    # Rank 0 decides for all ranks, because the folder may change between two reads.
    name = ranks.from_main(_starting_point(settings))
    if name is None:
        return None
    if settings.resume == "never" and not settings.replay:
        raise FileExistsError(f"{settings.out}: holds a run already ({name}); choose another out, or resume = auto")
    checkpoint = seen(Path(settings.out) / name, ranks)
    return Past(checkpoint, read_state(checkpoint))


def _resumed(run: Run, begun: Past) -> Run:
    """The run, continued from its newest checkpoint."""
    state, run = begun.state, _with_past_gradients(run, begun)
    before = run.plan.unmerged()
    same_length = all(state.settings.get(name) == getattr(run.settings, name) for name in ("steps", "epochs"))
    if same_length and state.plan == before.fingerprint:
        run = dataclasses.replace(run, plan=before)
    _say(run, check_same_run(run.settings, run.state(0), run.plan, begun))
    changes = _changes_of_model(run, state)
    _say(run, changes and f"{run.settings.model}: {changes}; the run keeps its own")
    return dataclasses.replace(
        run, checkpoint=begun.checkpoint, start=state.step, starting_weights=state.model, parent=state.parent
    )


def _branched(run: Run, past: Past) -> Run:
    """A fresh run that goes on from another run's checkpoint."""
    state, settings, run = past.state, run.settings, _with_past_gradients(run, past)
    weights = run.starting_weights
    if settings.model == state.settings["model"]:
        weights = state.model
    elif not hasattr(settings, "preference") and (state.model is None or weights != state.model):
        raise ValueError(
            f"model = {settings.model}: a branch begins with the weights of from = {settings.from_}, whose own run began with "
            f"{state.settings['model']}; leave model out"
        )
    _say(run, check_branch(settings, run.state(0), run.plan, past))
    return dataclasses.replace(
        run,
        start=state.step if settings.from_data else 0,
        starting_weights=weights,
        parent=Parent(str(past.checkpoint), state.step, fingerprint_of(past.checkpoint)),
    )


def _say(run: Run, note: str) -> None:
    if note and run.ranks.main:
        print(f"note       {note}")


def _with_past_gradients(run: Run, past: Past) -> Run:
    """The run with its past's `optimizer.gradients`: another micro-batch size must not change the dtype of the sums midway."""
    if run.settings.optimizer.gradients != "auto":
        return run
    return _with_gradients(run, past.settings_of(type(run.settings))["optimizer.gradients"])


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
        "parent": str(run.parent),
        **{f"data {source.path}": data.fingerprint for source, data in zip(run.settings.sources, run.datasets, strict=True)},
        **{f"heldout {name}": data.fingerprint for name, data in run.heldout.items()},
    }
    if run.continued is not None:
        facts[f"weights {run.continued}"] = weights_sample(run.continued)
    elif run.starting_model is not None:
        facts[f"weights {run.starting_model}"] = run.starting_weights
    check_same(run.ranks, facts, "copy the same files to all machines, or use a disk that they share")


def _starting_point(settings: TrainSettings) -> str | None:
    """Name of the newest checkpoint (for a replay, the newest before the replayed step), or None."""
    names = [path.name for path in checkpoints(settings.out)]
    if settings.replay:
        names = [name for name in names if name < f"step-{settings.replay:08d}"]
    return names[-1] if names else None
