"""Prints a run's plan before it starts."""

from engine.data.batch import Batch, Packing, make_step
from engine.optim.schedule import learning_rate
from engine.run import Run
from engine.settings.sections import ScheduleSettings
from model.vocabulary.chat import template_name

_SHOWN_DOCUMENTS, _SHOWN_TOKENS = 3, 160


def describe(run: Run) -> list[str]:
    """The run's model, memory, data and schedule, one line each."""
    chat = "" if all(data.kind == "text" for data in run.datasets) else f", chat template: {template_name(run.tokenizer)}"
    config, schedule, steps = run.config, run.settings.schedule, run.plan.steps
    return [
        f"model      {run.settings.model}: {config.parameters:,} parameters, {_precision(run)} on {run.device}",
        f"vocabulary {config.unpadded_vocab_size:,} pieces, {config.vocab_size:,} rows{chat}",
        f"memory     {_planned(run)}",
        *(f"data       {line}" for line in run.plan.describe(run.pack_tokens)),
        f"schedule   {_scheduled(schedule, steps, run.first)}",
        *_branch(run),
        *_trial(run),
        f"start      step {run.start} of {steps}" + (f", from {run.checkpoint}" if run.checkpoint else ""),
    ]


def _branch(run: Run) -> list[str]:
    """What a branch has from its parent."""
    if run.parent is None:
        return []
    taken = {"the optimizer's moments": run.settings.from_optimizer, "the data order": run.settings.from_data}
    lines = [f"branch     of {run.parent.checkpoint}, step {run.parent.step}: weights"]
    lines += [f"{name} {'taken over' if given else 'begun anew'}" for name, given in taken.items()]
    reference = f"; the reference is {run.settings.model}" if run.plan.paired else ""
    return [", ".join(lines) + reference]


def _trial(run: Run) -> list[str]:
    if run.trial is None:
        return []
    steps = run.trial.state.settings["steps"]
    return [f"trial      {run.out} holds a trial of {steps} steps that this longer run cannot continue; it moves aside"]


def _precision(run: Run) -> str:
    """The parameters' dtype, and the layers that multiply in FP8."""
    layers, dtype = run.fp8_layers, str(run.dtype).removeprefix("torch.")
    return f"{dtype}, FP8 products in layers {layers[0]} to {layers[-1]}," if layers else dtype


def _scheduled(schedule: ScheduleSettings, steps: int, begin: int) -> str:
    """The learning rate's course from step `begin` on, and whether the run ends before its warm-up does."""
    first, last = (learning_rate(schedule, step, steps) for step in (begin, steps - 1))
    warmed = schedule.start + schedule.warmup_steps
    if warmed > steps:
        return (
            f"learning rate {first:.2e} to {last:.2e}: the run's {steps:,} steps end within schedule.warmup_steps = "
            f"{schedule.warmup_steps:,}, at {last / schedule.peak:.1%} of the peak; lower warmup_steps to reach it"
        )
    warm = learning_rate(schedule, max(begin, min(warmed, steps - 1)), steps)
    return f"{schedule.kind}: learning rate {first:.2e}, {warm:.2e} after warm-up, {last:.2e} at last"


def _planned(run: Run) -> str:
    """The planned memory peak of this rank's device and its parts, largest first."""
    found = run.planned
    parts = sorted(((size, name) for name, size in found.items.items() if size), reverse=True)
    unit, scale = ("GiB", 2**30) if found.peak >= 2**30 else ("MiB", 2**20)
    text = ", ".join(f"{name} {size / scale:.2f}" for size, name in parts)
    return f"{found.peak / scale:.2f} {unit} at most, in the {found.moment}: {text}"


def sample(run: Run) -> list[str]:
    """The beginning of the first micro-batch as text. Brackets mark the trained tokens."""
    batch = make_step(run.plan, 0, Packing(run.config.sliding_window, run.pack_tokens)).batches[0]
    lines = [f"sample     first micro-batch: {batch.tokens} tokens, {int((batch.rows_N >= 0).sum())} trained on"]
    return lines + [f"           {text}" for text in _marked(run, batch)]


def _marked(run: Run, batch: Batch) -> list[str]:
    texts = []
    names = run.tokenizer.pieces()
    for places in _documents(batch)[:_SHOWN_DOCUMENTS]:
        pieces: list[str] = []
        trained = False
        for place in places[:_SHOWN_TOKENS]:
            # A place's weight belongs to the token that it predicts.
            weighted = bool(batch.weight_T[place])
            pieces.append("[" if weighted and not trained else "]" if trained and not weighted else "")
            pieces.append(names[int(batch.labels_T[place])])
            trained = weighted
        texts.append("".join(pieces).replace("▁", " ") + ("]" if trained else ""))
    return texts


def _documents(batch: Batch) -> list[list[int]]:
    """The places of each document. A shared prompt stands before each answer that continues it."""
    segments = batch.attention.segments
    prefixes = {prefix for *_, prefix in segments}
    found = []
    for number, (start, end, prefix) in enumerate(segments):
        if number not in prefixes:
            prompt = range(*segments[prefix][:2]) if prefix >= 0 else range(0)
            found.append([*prompt, *range(start, end)])
    return found
