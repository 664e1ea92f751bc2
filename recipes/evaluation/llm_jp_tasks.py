"""llm-jp-eval's data sets (version 1) as tasks of the harness: MC, NLI, QA, RC, whose mean is AVR, and JSTS beside them.

A data set is a file NAME.json in llm-jp-eval's own form, as its preparation writes it: `instruction`, `output_length` (most
tokens of an answer), `few_shots` and `samples`, both lists of {"input", "output"}. Where a file has no examples, those of
`train/NAME.json` are taken. The first four examples stand in the prompt, the first hundred samples are asked.

The prompt has version 1's form: a preamble, the instruction, the examples, then the input. The preamble is our own sentence, or
the user's (`--template`). An answer is greedy, ends at an empty line, and is compared after NFKC and without outer spaces.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from recipes.evaluation.answer_scores import char_f1, pearson, spearman
from recipes.evaluation.encoding import BOS_HERE
from recipes.evaluation.llm_jp import DATASETS, GROUPS

NAME = "llm-jp-eval"
SHOTS = 4
SAMPLES = 100
TEMPLATE = """次の指示は課題を、入力はその材料を示します。指示に従い、入力に対する回答だけを書いてください。
### 指示
{instruction}

{examples}### 入力：
{input}
### 回答：
"""
_EXAMPLE = "### 入力：\n{input}\n### 回答：\n{output}\n\n"


@dataclass(frozen=True)
class Form:
    """How the prompts are made. legacy_bos: the beginning-of-sequence token before the instruction, as the original had it."""

    template: str = TEMPLATE
    legacy_bos: bool = False


class LlmJpTask(ConfigurableTask):
    """A data set of llm-jp-eval."""

    def __init__(self, name: str, table: Mapping[str, Any], form: Form) -> None:
        group, metric = DATASETS[name]
        self._table, self._form = table, form
        self.group = group
        metrics = [metric, "spearman"] if metric == "pearson" else [metric]
        aggregations = {"exact_match": "mean", "char_f1": "mean", "pearson": _pearson, "spearman": _spearman}
        super().__init__(
            config={
                "task": f"{NAME}/{name}",
                "dataset_path": "json",
                "test_split": "test",
                "num_fewshot": 0,
                "output_type": "generate_until",
                # Functions, not methods: the harness copies what a configuration holds.
                "doc_to_text": lambda doc: self.prompt_of(doc),
                "doc_to_target": "{{output}}",
                "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": int(table["output_length"])},
                "process_results": lambda doc, results: self.scores_of(doc, results),
                "metric_list": [
                    {"metric": name, "aggregation": aggregations[name], "higher_is_better": True} for name in metrics
                ],
                "metadata": {"version": 1.0},
            }
        )
        self.set_config(key="num_fewshot", value=SHOTS)

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        records = [{"input": _text(sample["input"]), "output": _text(sample["output"])} for sample in self._table["samples"]]
        self.dataset = {"test": datasets.Dataset.from_list(records)}

    def fewshot_context(self, doc: Any, num_fewshot: int, *args: Any, **kwargs: Any) -> str:
        """The examples are a part of the prompt."""
        return super().fewshot_context(doc, 0, *args, **kwargs)

    def prompt_of(self, doc: Mapping[str, str]) -> str:
        examples = "".join(_filled(_EXAMPLE, shot) for shot in self._table["few_shots"])
        bos = BOS_HERE if self._form.legacy_bos else ""
        return _filled(
            self._form.template,
            {"instruction": bos + self._table["instruction"], "examples": examples, "input": doc["input"]},
        )

    def scores_of(self, doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
        said, gold = _normal(results[0]), _normal(doc["output"])
        names = list(self.aggregation())
        if names[0] == "exact_match":
            return {"exact_match": float(said == gold)}
        if names[0] == "char_f1":
            return {"char_f1": char_f1([said], [gold])}
        return dict.fromkeys(names, (said, gold))


def load_tasks(name: str, data: Path | None, form: Form) -> list[LlmJpTask]:
    """The data sets of `llm-jp-eval`, or the one of `llm-jp-eval/NAME`, from the files in a folder.

    Raises: ValueError for an unknown data set, without a folder, and for a file of another form; FileNotFoundError for a file
        that is not there.
    """
    chosen = list(DATASETS) if name == NAME else [name.removeprefix(f"{NAME}/")]
    if chosen[0] not in DATASETS:
        raise ValueError(f"task {name}: unknown; llm-jp-eval's data sets are {', '.join(DATASETS)}")
    if data is None:
        raise ValueError(f"task {name}: reads llm-jp-eval's files NAME.json: name their folder, --data FOLDER")
    return [LlmJpTask(each, _read(each, data), form) for each in chosen]


def _read(name: str, data: Path) -> dict[str, Any]:
    path = next((found for found in (data / f"{name}.json", data / "test" / f"{name}.json") if found.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"task {NAME}/{name}: no file {name}.json in {data} or {data / 'test'}")
    table = _json(path)
    train = data / "train" / path.name
    shots = table.get("few_shots") or (_json(train).get("samples", []) if train.is_file() else [])
    if len(shots) < SHOTS:
        raise ValueError(f"{path}: has {len(shots)} few_shots, {SHOTS} are needed; or give {train}")
    missing = [key for key in ("instruction", "output_length", "samples") if not table.get(key)]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}: not a data set of llm-jp-eval")
    for number, sample in enumerate([*shots[:SHOTS], *table["samples"]]):
        if not isinstance(sample, dict) or not {"input", "output"} <= sample.keys():
            raise ValueError(f"{path}: record {number} has no input and output: not a data set of llm-jp-eval")
    return table | {"few_shots": shots[:SHOTS], "samples": table["samples"][:SAMPLES]}


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds a JSON {type(table).__name__}, not a data set of llm-jp-eval")
    return table


def read_template(path: str | Path) -> str:
    """A prompt template: a text with {instruction}, {examples} and {input}. Raises: ValueError where one is missing."""
    text = Path(path).expanduser().read_text(encoding="utf-8")
    for name in ("{instruction}", "{examples}", "{input}"):
        if name not in text:
            raise ValueError(f"{path}: the template lacks {name}")
    return text


def item_scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """The scores of a data set's items, by each data set that counts in a mean. samples: by task, as the harness keeps them."""
    return {
        name: [sample[metric] for sample in samples[f"{NAME}/{name}"]]
        for name, (group, metric) in DATASETS.items()
        if group and f"{NAME}/{name}" in samples
    }


def means(scores: Mapping[str, float]) -> dict[str, float]:
    """MC, NLI, QA, RC, and AVR where all four are there: means of the data sets' scores, then of these.

    Args: scores: by data set.
    """
    found = {}
    for group in GROUPS:
        own = [score for name, score in scores.items() if DATASETS[name][0] == group]
        if own:
            found[group] = sum(own) / len(own)
    return {"AVR": sum(found.values()) / len(GROUPS), **found} if len(found) == len(GROUPS) else found


def weights(names: Sequence[str], mean: str) -> list[float]:
    """The weight of each data set in one of `means`."""
    sizes = {group: sum(DATASETS[name][0] == group for name in names) for group in GROUPS}
    found = []
    for name in names:
        group = DATASETS[name][0]
        counts = group is not None and mean in (group, "AVR")
        found.append(1 / sizes[group] / (len(GROUPS) if mean == "AVR" else 1) if group is not None and counts else 0.0)
    return found


def log_lines(model: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The predictions in the form that `recipes.evaluation.llm_jp --rescore` reads."""
    lines = []
    for task, own in samples.items():
        name = task.removeprefix(f"{NAME}/")
        group, metric = DATASETS[name]
        predictions, golds = (
            [_normal(sample["resps"][0][0]) for sample in own],
            [_normal(sample["doc"]["output"]) for sample in own],
        )
        entry = {"model": model, "record": "dataset", "dataset": name, "group": group, "metric": metric}
        lines.append(json.dumps(entry | {"pred": predictions, "gold": golds}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _pearson(pairs: Sequence[tuple[str, str]]) -> float:
    return pearson([said for said, _ in pairs], [gold for _, gold in pairs])


def _spearman(pairs: Sequence[tuple[str, str]]) -> float:
    return spearman([said for said, _ in pairs], [gold for _, gold in pairs])


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields; braces elsewhere, also in the values, stay."""
    parts = [template]
    for name, value in values.items():
        marked = "{" + name + "}"
        split: list[str] = []
        for number, part in enumerate(parts):
            if number % 2:
                split.append(part)
                continue
            pieces = part.split(marked)
            for place, piece in enumerate(pieces):
                split += [piece] if place == 0 else [_text(value), piece]
        parts = split
    return "".join(parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()
