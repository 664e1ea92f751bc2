"""Score again the predictions of llm-jp-eval: MC, NLI, QA, RC and their mean AVR, one line of JSON a model.

    python -m recipes.evaluation.llm_jp --rescore logs.jsonl.gz --json scores.jsonl
    python -m recipes.evaluation.llm_jp --rescore logs.jsonl --ratio difflib --json scores.jsonl

FILE holds a line for each data set of a model, {"model", "record": "dataset", "dataset", "group", "metric", "pred", "gold"}. It
may hold a line {"model", "record": "summary", "published", "char_f1_ratio"}: a model's own char_f1_ratio goes before --ratio.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, get_args

from engine.data.sources import RECORD_SUFFIXES, find_sources
from engine.settings.toml import PathName
from model.folder import write_file
from recipes.command import command
from recipes.evaluation.answer_scores import Ratio, char_f1, exact_match, pearson, spearman

GROUPS = ("MC", "NLI", "QA", "RC")
_SUMMED = ("NLI", "QA", "RC", "MC")
# The group and the metric of each data set of version 1. JSTS counts in no group.
DATASETS = {
    "jcommonsenseqa": ("MC", "exact_match"),
    **dict.fromkeys(("jamp", "janli", "jnli", "jsem", "jsick"), ("NLI", "exact_match")),
    **dict.fromkeys(("jemhopqa", "niilc"), ("QA", "char_f1")),
    "jsquad": ("RC", "char_f1"),
    "jsts": (None, "pearson"),
}
METRICS = ("exact_match", "char_f1", "pearson", "spearman")
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class RescoreSettings:
    """llm-jp-eval's scores, computed again from its logs."""

    rescore: PathName
    """Predictions: .jsonl or .jsonl.gz, a line for each data set of a model."""
    json: PathName
    """Write the scores here, one line of JSON a model."""
    ratio: Ratio = "levenshtein"
    """String ratio of char_f1, for models whose log does not name one: levenshtein (llm-jp-eval with python-Levenshtein
    installed) or difflib (without)."""


@dataclass
class ModelLog:
    """What a file says of a model.

    ratio: the log's own. published: scores to compare with. datasets: by name. unscored: data sets of no group of ours, with
    metrics that are not ours, {name: metric}.
    """

    ratio: Ratio | None = None
    published: dict[str, float] = field(default_factory=dict)
    datasets: dict[str, DatasetLog] = field(default_factory=dict)
    unscored: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetLog:
    """Predictions on a data set. missing: predictions that the log lacks; they count as empty answers."""

    group: str | None
    metric: str
    predictions: list[str]
    golds: list[str]
    published: dict[str, float]
    missing: int

    def score(self, ratio: Ratio, metric: str | None = None) -> float:
        """The data set's score by its metric, or by another one."""
        metric = metric or self.metric
        if metric == "char_f1":
            return char_f1(self.predictions, self.golds, ratio)
        scorer = {"exact_match": exact_match, "pearson": pearson, "spearman": spearman}[metric]
        return scorer(self.predictions, self.golds)


def read_logs(path: str) -> dict[str, ModelLog]:
    """The logs of a file, by model. Raises: ValueError naming file and line of what cannot be read."""
    logs: dict[str, ModelLog] = {}
    for source in find_sources([path], RECORD_SUFFIXES):
        for record in source.records("line"):
            try:
                _read(record.value, logs)
            except ValueError as error:
                raise ValueError(f"{record.place}: {error}") from None
    for name, log in logs.items():
        if not log.datasets:
            raise ValueError(f"{path}: no data set of the model '{name}': its predictions are missing")
    return logs


def _read(value: Any, logs: dict[str, ModelLog]) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("model"), str):
        raise ValueError("not a log's record: must be an object with the fields model, record, dataset, pred, gold")
    log = logs.setdefault(value["model"], ModelLog())
    ratio = value.get("char_f1_ratio")
    if ratio is not None:
        if ratio not in get_args(Ratio):
            raise ValueError(f"char_f1_ratio = {ratio!r}: must be {' or '.join(get_args(Ratio))}")
        log.ratio = ratio
    if value.get("record") == "summary":
        log.published = _published(value)
        return
    name = value.get("dataset")
    if value.get("record", "dataset") != "dataset" or not isinstance(name, str):
        raise ValueError(f"record = {value.get('record')!r}: must be summary, or dataset with a field dataset")
    if name in log.datasets:
        raise ValueError(f"a second log of {name} for the model '{value['model']}': keep one of them")
    known_group, known_metric = DATASETS.get(name, (None, None))
    group, metric = value.get("group") or known_group, value.get("metric") or known_metric
    if metric not in METRICS:
        if group in GROUPS:
            raise ValueError(f"metric = {metric!r} of {name}: must be one of {', '.join(METRICS)}")
        log.unscored[name] = metric
        return
    predictions, golds = value.get("pred"), value.get("gold")
    if not isinstance(predictions, list) or not isinstance(golds, list) or not golds:
        raise ValueError(f"{name}: pred and gold must be lists, and gold must not be empty")
    if len(predictions) > len(golds):
        raise ValueError(f"{name}: {len(predictions)} predictions for {len(golds)} gold answers")
    predictions = predictions + [None] * (len(golds) - len(predictions))
    missing = sum(prediction is None for prediction in predictions)
    log.datasets[name] = DatasetLog(
        group, metric, [_text(each) for each in predictions], [_text(each) for each in golds], _published(value), missing
    )


def _text(answer: Any) -> str:
    if isinstance(answer, (list, dict)):
        raise ValueError(f"an answer is {json.dumps(answer, ensure_ascii=False)[:60]}: must be a text or a number")
    return "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)


def _published(value: Mapping[str, Any]) -> dict[str, float]:
    scores = value.get("published") or {}
    try:
        return {name: float(score) for name, score in scores.items() if score is not None}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"published = {json.dumps(scores)[:60]}: must be an object of numbers") from None


def rescore(log: ModelLog, ratio: Ratio = "levenshtein") -> dict[str, float | None]:
    """AVR, MC, NLI, QA and RC; a group without data sets is None, and AVR with it. The log's own ratio goes before `ratio`."""
    ratio = log.ratio or ratio
    found: dict[str, list[float]] = {group: [] for group in GROUPS}
    for dataset in log.datasets.values():
        if dataset.group in found:
            found[dataset.group].append(dataset.score(ratio))
    groups = {group: mean(scores) if scores else None for group, scores in found.items()}
    # A sum of floats in this order gives the published fourth digit where the mean lies halfway between two.
    summed = [score for group in _SUMMED if (score := groups[group]) is not None]
    return {"AVR": sum(summed) / len(GROUPS) if len(summed) == len(GROUPS) else None, **groups}


def differences(log: ModelLog, ratio: Ratio = "levenshtein") -> list[str]:
    """The published scores of a log that the scorer does not give to four digits, in words."""
    ratio = log.ratio or ratio
    pairs = [(name, score, log.published.get(name)) for name, score in rescore(log, ratio).items()]
    for name, dataset in log.datasets.items():
        given = {metric: score for metric, score in dataset.published.items() if metric in METRICS}
        pairs += [(f"{name} {metric}", dataset.score(ratio, metric), score) for metric, score in given.items()]
    return [
        f"{name} {score:.{DIGITS}f}, published {published:.{DIGITS}f}"
        for name, score, published in pairs
        if score is not None and published is not None and round(score, DIGITS) != round(published, DIGITS)
    ]


def run(settings: RescoreSettings) -> None:
    """Score all models of a file; print the table and write the lines of JSON."""
    logs = read_logs(settings.rescore)
    lines = []
    width = max(len(name) for name in logs)
    print(f"{'model':<{width}}" + "".join(f"{name:>8}" for name in ("AVR", *GROUPS)))
    for name, log in logs.items():
        scores = rescore(log, settings.ratio)
        shown = {key: None if score is None else round(score, DIGITS) for key, score in scores.items()}
        lines.append(json.dumps({"model": name, **shown}, ensure_ascii=False) + "\n")
        print(
            f"{name:<{width}}" + "".join(f"{'-' if score is None else f'{score:.{DIGITS}f}':>8}" for score in scores.values())
        )
        for remark in _remarks(log, scores, settings.ratio):
            print(f"  {remark}")
    write_file(settings.json, "".join(lines))


def _remarks(log: ModelLog, scores: Mapping[str, float | None], ratio: Ratio) -> list[str]:
    absent = [group for group in GROUPS if scores[group] is None]
    remarks = [f"no data set of {', '.join(absent)}, so no AVR"] if absent else []
    expected = {name for name, (group, _) in DATASETS.items() if group not in (None, *absent)}
    if lacking := sorted(expected - set(log.datasets)):
        remarks.append(f"without {', '.join(lacking)}: the means are of the other data sets")
    remarks += [f"{name} left out: {metric} is no metric of version 1" for name, metric in log.unscored.items()]
    remarks += [
        f"{name}: {dataset.missing} of {len(dataset.golds)} predictions are missing, and count as empty answers"
        for name, dataset in log.datasets.items()
        if dataset.missing
    ]
    return remarks + differences(log, ratio)


def main(argv: Sequence[str] | None = None) -> None:
    command(RescoreSettings, run, argv, "python -m recipes.evaluation.llm_jp")


if __name__ == "__main__":
    main()
