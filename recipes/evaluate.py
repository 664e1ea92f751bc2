"""Score a model on benchmark tasks with lm-evaluation-harness: every score with its interval, shared prompts computed once.

    python -m recipes.evaluate --model runs/dpo --tasks leaderboard --out runs/eval/dpo
    python -m recipes.evaluate --model runs/dpo --tasks jmmlu.yaml jsquad.yaml --data bench --out runs/eval/dpo-ja --chat
    python -m recipes.evaluate --model runs/dpo --tasks leaderboard --out runs/eval/dpo --compare runs/eval/sft

The folder gets results.json in the harness's form, samples_TASK.jsonl, report.md with a drawing, and journal.jsonl. The same
command goes on from the journal where it was stopped, and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.settings.toml import PathName
from recipes.command import command

if TYPE_CHECKING:
    from recipes.evaluation.benchmarks import Suite
    from recipes.evaluation.comparison import Items, Row
    from recipes.evaluation.harness import KomainuLM


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Scores of a model on benchmark tasks."""

    model: PathName
    """Run folder (its newest checkpoint), Hugging Face folder, or hub repository owner/name."""
    tasks: tuple[str, ...]
    """`leaderboard` (the model card's six, with its shots), task files FILE.yaml, or the harness's tasks and groups by name."""
    out: PathName
    """Folder to write. An evaluation that was stopped goes on in it."""
    data: PathName | None = None
    """Folder of the files that task files read; default: each task file's own."""
    compare: PathName | None = None
    """Folder of another model's evaluation, to compare with on the same items."""
    limit: int | None = None
    """Only the first items of each task."""
    template: PathName | None = None
    """File with the prompt of llm-jp-eval's tasks: a text with {instruction}, {examples} and {input}; default: our own."""
    legacy_bos: bool = False
    """llm-jp-eval's tasks with the beginning-of-sequence token before the instruction, as in Shisa 7B's published scores."""
    chat: bool = False
    """Ask through the model's chat template, examples as earlier turns."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the parameters; auto: bfloat16 on CUDA, float32 on the CPU."""
    pack_tokens: int | None = None
    """Places that are scored at once; default: 16,384 on CUDA, 8,192 on the CPU."""
    rows: int = 32
    """Answers that are generated at once."""
    seed: int = 0
    """Seed of sampled answers; answers are greedy unless a task says otherwise."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: name at least one, such as leaderboard")
        if self.legacy_bos and self.chat:
            raise ValueError("legacy_bos has no effect with chat, whose template places the token; leave one of them out")
        for name, value in (("limit", self.limit), ("pack_tokens", self.pack_tokens), ("rows", self.rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")


def run(settings: EvaluateSettings) -> Path:
    """Evaluate and write the folder. Returns: its path."""
    try:
        import lm_eval  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: evaluations need the extra eval, pip install -e '.[eval]'") from None
    from lm_eval.evaluator import evaluate

    from engine.checkpoint.state import model_folder
    from engine.distributed.agreement import weights_sample
    from engine.environment import choose_device, choose_dtype
    from engine.inference.scoring import default_pack_tokens
    from model.vocabulary.fitting import fitted_config
    from model.vocabulary.tokenizer import Tokenizer
    from model.weights import load_model
    from recipes.evaluation.benchmarks import load_suite
    from recipes.evaluation.harness import KomainuLM
    from recipes.evaluation.ledger import Ledger
    from recipes.evaluation.llm_jp_tasks import TEMPLATE, Form, read_template

    if settings.compare is not None and not (Path(settings.compare) / "results.json").is_file():
        raise FileNotFoundError(f"{settings.compare}: holds no finished evaluation (results.json) to compare with")
    device = choose_device(settings.device)
    folder = model_folder(settings.model)
    tokenizer = Tokenizer.load(folder)
    if settings.chat:
        check_chat_template(folder)
    form = Form(read_template(settings.template) if settings.template else TEMPLATE, settings.legacy_bos)
    suite = load_suite(settings.tasks, None if settings.data is None else Path(settings.data), form)
    dtype = choose_dtype(settings.dtype, device)
    pack_tokens = settings.pack_tokens or default_pack_tokens(device)
    identity = {
        "model": weights_sample(folder),
        "tokenizer": tokenizer.fingerprint,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "pack_tokens": pack_tokens,
        "rows": settings.rows,
        "seed": settings.seed,
        "chat": settings.chat,
    }
    out = Path(settings.out)
    with Ledger(out / "journal.jsonl", identity) as ledger:
        model = load_model(folder, dtype=dtype, device=device, config=fitted_config(folder, tokenizer))
        model.eval()
        lm = KomainuLM(
            model, tokenizer, ledger, pack_tokens=pack_tokens, rows=settings.rows, chat=settings.chat, seed=settings.seed
        )
        # Without the harness's bootstrap, which draws items as if they were independent; and without its caches.
        found: dict[str, Any] = evaluate(
            lm=lm,
            task_dict=suite.loaded,
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
        )
    return _write(settings, suite, found, lm, identity)


def check_chat_template(folder: Path) -> None:
    """Check that a model's folder has a chat template. Raises: ValueError naming the folder."""
    from model.config import read_json

    config = folder / "tokenizer_config.json"
    named = config.is_file() and read_json(config).get("chat_template") is not None
    if not named and not (folder / "chat_template.jinja").is_file():
        raise ValueError(f"{folder}: has no chat template (chat_template.jinja): evaluate a base model without --chat")


def _write(settings: EvaluateSettings, suite: Suite, found: dict[str, Any], lm: KomainuLM, identity: Mapping[str, Any]) -> Path:
    from recipes.evaluation.comparison import compared
    from recipes.evaluation.report import write_report, write_results, write_samples

    out = Path(settings.out)
    samples = found.pop("samples")
    rows = [*_llm_jp_rows(found, samples), *_rows(suite, found, samples)]
    _write_llm_jp_log(settings, samples)
    intervals: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = {"low": row.interval.low, "high": row.interval.high, "confidence": 0.95, "method": row.method}
        intervals.setdefault(row.name, {})[f"{row.metric},{row.filter}"] = entry
    found["config"] = {"model": settings.model, "limit": settings.limit, "bootstrap_iters": 0, **identity}
    found["intervals"] = intervals
    found["counts"] = asdict(lm.counts)
    remarks = _remarks(settings, lm)
    if settings.compare is None:
        write_samples(out, samples)
        write_results(out, found)
        text = write_report(out, model=settings.model, rows=rows, remarks=remarks)
    else:
        ours = _compared_items(suite, rows, samples)
        theirs = _compared_items(suite, rows, _other_samples(Path(settings.compare), samples))
        comparisons = compared(ours, {name: items for name, (_, items) in theirs.items()})
        left_out = [name for name in ours if name not in {one.name for one in comparisons}]
        found["comparison"] = {"other": settings.compare, "tasks": [asdict(one) for one in comparisons]}
        write_samples(out, samples)
        write_results(out, found)
        text = write_report(
            out,
            model=settings.model,
            rows=rows,
            remarks=remarks,
            other=settings.compare,
            comparisons=comparisons,
            left_out=left_out,
        )
    print(text, end="")
    return out


def _rows(suite: Suite, found: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Every metric of every group and task; a group's tasks come after it."""
    import numpy as np
    from lm_eval.api.registry import get_aggregation

    from recipes.evaluation.benchmarks import clusters_of
    from recipes.evaluation.comparison import Row, interval_of, items_of
    from recipes.evaluation.statistics import bootstrap_weighted_means

    def add(name: str, tasks: Sequence[str], metric: str, filter: str, score: float, aggregate: Any) -> None:
        own = {task: samples[task] for task in tasks}
        items = items_of(own, metric, filter, lambda task, chosen: clusters_of(suite, task, chosen))
        if not items.values or (aggregate is None and not items.numeric):
            return
        if len(tasks) > 1 and abs(float(np.mean(items.values)) - score) > 1e-9:
            # A mean of the tasks' means, which every task moves alike.
            strata = [[sample[metric] for sample in samples[task] if sample["filter"] == filter] for task in tasks]
            interval = bootstrap_weighted_means(strata, [1 / len(tasks)] * len(tasks))
            method = "bootstrap in each task"
        else:
            interval, method = interval_of(items, aggregate)
        rows.append(
            Row(
                name=name,
                shots=found["n-shot"].get(name),
                metric=metric,
                filter=filter,
                score=score,
                interval=interval,
                method=method,
                items=len(items.values),
                clusters=None if items.clusters is None else len(set(items.clusters)),
                primary=_primary(suite, name) == metric and filter == _first_filter(samples[tasks[0]]),
            )
        )

    rows: list[Row] = []
    mean = get_aggregation("mean")
    for name, scores in found.get("groups", {}).items():
        group = suite.loaded["groups"][name]
        tasks = [task.task_name for task in group.get_all_tasks()]
        for key, score in scores.items():
            metric, _, filter = key.partition(",")
            if filter and not metric.endswith("_stderr") and isinstance(score, float):
                add(name, tasks, metric, filter, score, None)
    for name, task in suite.loaded["tasks"].items():
        aggregations = task.aggregation()
        for key, score in found["results"][name].items():
            metric, _, filter = key.partition(",")
            if filter and metric in aggregations:
                add(name, [name], metric, filter, score, None if aggregations[metric] is mean else aggregations[metric])
    return rows


def _llm_jp_rows(found: dict[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The means of llm-jp-eval's data sets; they are added to the results too."""
    from recipes.evaluation.comparison import Row
    from recipes.evaluation.llm_jp import DATASETS
    from recipes.evaluation.llm_jp_tasks import NAME, SHOTS, item_scores, means, weights
    from recipes.evaluation.statistics import bootstrap_weighted_means

    own = item_scores(samples)
    names = list(own)
    if not names:
        return []
    found[NAME] = means({name: sum(values) / len(values) for name, values in own.items()})
    return [
        Row(
            name=f"{NAME} {mean}",
            shots=SHOTS,
            metric="mean",
            filter="none",
            score=score,
            interval=bootstrap_weighted_means(list(own.values()), weights(names, mean)),
            method="bootstrap in each data set",
            items=sum(len(own[name]) for name in names if mean in ("AVR", DATASETS[name][0])),
            clusters=None,
            primary=mean == "AVR",
        )
        for mean, score in found[NAME].items()
    ]


def _write_llm_jp_log(settings: EvaluateSettings, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The predictions of llm-jp-eval's data sets, for `recipes.evaluation.llm_jp --rescore`."""
    from model.folder import write_file
    from recipes.evaluation.llm_jp_tasks import NAME, log_lines

    own = {task: found for task, found in samples.items() if task.startswith(f"{NAME}/")}
    if own:
        write_file(Path(settings.out) / "llm_jp_eval.jsonl", log_lines(settings.model, own).encode("utf-8", "backslashreplace"))


def _primary(suite: Suite, name: str) -> str:
    if name in suite.primary:
        return suite.primary[name]
    if name in suite.loaded["groups"]:
        name = suite.loaded["groups"][name].get_all_tasks()[0].task_name
    return next(iter(suite.loaded["tasks"][name].aggregation()))


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> str:
    return samples[0]["filter"]


def _compared_items(
    suite: Suite, rows: Sequence[Row], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, tuple[str, Items]]:
    """(metric, items) of every group, and of every task that is in no group, by its primary metric."""
    from recipes.evaluation.benchmarks import clusters_of
    from recipes.evaluation.comparison import items_of

    groups = {name: [task.task_name for task in group.get_all_tasks()] for name, group in suite.loaded["groups"].items()}
    grouped = {task for tasks in groups.values() for task in tasks}
    chosen = {}
    for row in rows:
        tasks = groups.get(row.name, [row.name])
        if row.primary and (row.name in groups or row.name not in grouped) and all(task in samples for task in tasks):
            own = {task: samples[task] for task in tasks}
            items = items_of(own, row.metric, row.filter, lambda task, found: clusters_of(suite, task, found))
            chosen[row.name] = (row.metric, items)
    return chosen


def _other_samples(folder: Path, tasks: Mapping[str, Any]) -> dict[str, Any]:
    from recipes.evaluation.comparison import read_samples

    found = {task: read_samples(folder, task) for task in tasks}
    return {task: samples for task, samples in found.items() if samples is not None}


def _remarks(settings: EvaluateSettings, lm: KomainuLM) -> list[str]:
    counts = lm.counts
    limited = "" if settings.limit is None else f"; the first {settings.limit} items of a task"
    remarks = [f"{counts.requests:,} requests{limited}"]
    if counts.places:
        remarks.append(
            f"{counts.places:,} places computed for log-likelihoods, {counts.places_alone / counts.places:.2f} times fewer "
            f"than one request at a time ({counts.places_alone:,})"
        )
    remarks.append(f"{counts.joined:,} continuations whose first piece would have joined the context: encoded alone")
    remarks.append(f"{counts.truncated:,} contexts cut on the left, as they are longer than the model's positions")
    if settings.chat:
        remarks.append("asked through the chat template")
    return remarks


def main(argv: Sequence[str] | None = None) -> None:
    command(EvaluateSettings, run, argv, "python -m recipes.evaluate")


if __name__ == "__main__":
    main()
