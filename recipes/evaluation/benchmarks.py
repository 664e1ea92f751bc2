"""Which tasks an evaluation runs: the model card's six, the harness's own by name, and task files that read JSON Lines.

A task file is one of the harness's, in YAML, with `dataset_path: json` and its files in `dataset_kwargs.data_files`. These are
looked for in the user's folder of data, else beside the task file. Beside the harness's keys it may have

    like            an official task file, relative to the harness's tasks, whose keys this one completes or replaces
    shots           {split, first, by}: the first records of a split, for each value of a field, are the examples of the others
                    with that value, and are not asked
    records         a function of this module that makes the harness's fields from a record
    process_results a function of this module
    cluster         the field of records that belong together, such as a passage: they are not independent
    primary         the metric that stands for the task in comparisons; default: the first
"""

import contextlib
import difflib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import jinja2.meta
import yaml
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager, _yaml_loader

from engine.data.sources import RECORD_SUFFIXES, find_sources
from recipes.evaluation import llm_jp_tasks
from recipes.evaluation.answer_scores import char_f1

OWN = Path(__file__).parent / "tasks"
OFFICIAL = Path(_yaml_loader.__file__).parent
# The model card's six: shots and metric. MMLU is a group of 57 subjects.
LEADERBOARD = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "winogrande": (5, "acc"),
    "gsm8k": (5, "exact_match"),
}
_KEYS = ("like", "shots", "records", "cluster", "primary")
_SHOTS = "shots"


@dataclass(frozen=True)
class Suite:
    """The tasks of an evaluation.

    Attributes:
        loaded: tasks and groups as the harness takes them.
        primary: by task or group, the metric that stands for it in comparisons.
        cluster: by task, the field of a record that names its cluster.
    """

    loaded: dict[str, Any]
    primary: dict[str, str]
    cluster: dict[str, str]


class FirstAlike(ContextSampler):
    """Examples for a question: the first that have its value of a field."""

    field: str | None = None
    question: dict[str, Any] | None = None  # the harness names the question only where examples are drawn from the questions

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Any:
        assert self.question is not None
        pool = [doc for doc in self.df if self.field is None or doc[self.field] == self.question[self.field]]
        if len(pool) < n:
            raise ValueError(f"{n} examples are asked for, and there are {len(pool)} for {self.question}")
        return pool[:n]


class LocalTask(ConfigurableTask):
    """A task of the harness that reads JSON Lines; built from a table of settings without a template's keys."""

    def __init__(self, config: dict[str, Any], reader: Callable[[], dict[str, Any]], alike: str | None = None) -> None:
        """Args: reader: gives the splits. alike: the field that a question shares with its examples (`FirstAlike`)."""
        self._reader = reader
        super().__init__(config=config)
        if isinstance(sampler := getattr(self, "sampler", None), FirstAlike):
            sampler.field = alike

    def fewshot_context(self, doc: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sampler := getattr(self, "sampler", None), FirstAlike):
            sampler.question = doc
        return super().fewshot_context(doc, *args, **kwargs)

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        self.dataset = self._reader()


def load_suite(names: Sequence[str], data: Path | None, form: llm_jp_tasks.Form | None = None) -> Suite:
    """The tasks of these names, and of the task files among them.

    Args: data: folder of their data. form: of llm-jp-eval's prompts.
    Raises: ValueError for an unknown name (naming the nearest), a task file that is not right, or data that cannot be had;
        FileNotFoundError for a file of data that is not there.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    suite = Suite({"tasks": {}, "groups": {}, "group_map": {}}, {}, {})
    official: dict[str, tuple[int | None, str | None]] = {}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            for file in _listed(name):
                _add_local(suite, file, data)
        elif name.split("/")[0] == llm_jp_tasks.NAME:
            for task in llm_jp_tasks.load_tasks(name, data, form or llm_jp_tasks.Form()):
                suite.loaded["tasks"][task.task_name] = task
                suite.primary[task.task_name] = next(iter(task.aggregation()))
        elif name == "leaderboard":
            official |= LEADERBOARD
        else:
            official[name] = (None, None)
    if official:
        _add_official(suite, official)
    for task in suite.loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    reset_examples(suite)
    return suite


def reset_examples(suite: Suite) -> None:
    """Let the next evaluation draw the same examples as the first: the harness goes on drawing where it ended."""
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # the harness's own default


def _add_official(suite: Suite, names: Mapping[str, tuple[int | None, str | None]]) -> None:
    manager = TaskManager()
    for name, (shots, primary) in names.items():
        if name not in manager.all_tasks:
            known = {*manager.all_tasks, "leaderboard", llm_jp_tasks.NAME, *(file.name for file in OWN.glob("*.yaml"))}
            near = difflib.get_close_matches(name, sorted(known), n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the harness's"
            raise ValueError(f"task {name}: unknown; {meant}")
        try:
            found = manager.load([name])
        except Exception as error:
            # Whatever a download fails with: the hub's, the network's and the data's own classes of errors.
            raise ValueError(
                f"task {name}: its data set could not be loaded ({type(error).__name__}: {_first_line(error)}); connect to the "
                f"hub, or use a task file of your own data (--tasks {_own_file(name)} --data FOLDER)"
            ) from None
        for part in ("tasks", "groups", "group_map"):
            suite.loaded[part].update(found[part])
        for task in found["tasks"].values():
            if shots is not None:
                task.set_config(key="num_fewshot", value=shots)
        if primary:
            suite.primary.update(dict.fromkeys([name, *found["tasks"]], primary))


def _own_file(name: str) -> str:
    return f"{name}.yaml" if (OWN / f"{name}.yaml").is_file() else "FILE.yaml"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _listed(name: str) -> list[Path]:
    """The task file of a name, ours if there is no other; or the files of a list of task files."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = OWN / path.name if str(path) == path.name else path
    if not path.is_file():
        ours = {file.stem: file.name for file in sorted(OWN.glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, ours, n=1)
        meant = f"did you mean {ours[near[0]]}?" if near else f"ours are {', '.join(ours.values())}"
        raise FileNotFoundError(f"{name}: no such task file; {meant}")
    table = _read_yaml(path)
    if "tasks" not in table:
        return [path]
    return [file for listed in table["tasks"] for file in _listed(str(path.parent / listed))]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        table = _yaml_loader.load_yaml(path, resolve_func=True)
    except (yaml.YAMLError, ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a task file: {_first_line(error)}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a task file: holds no table of settings")
    return table


def _add_local(suite: Suite, path: Path, data: Path | None) -> None:
    table = _read_yaml(path)
    if like := table.get("like"):
        if not (OFFICIAL / like).is_file():
            raise ValueError(f"{path}: like = {like}: the installed harness has no such task file")
        table = _read_yaml(OFFICIAL / like) | table
    name = table.get("task")
    if not isinstance(name, str):
        raise ValueError(f"{path}: names no task; add `task: NAME`")
    if name in suite.loaded["tasks"]:
        raise ValueError(f"task {name}: named twice")
    own = {key: table.pop(key) for key in _KEYS if key in table}
    for key in ("dataset_name", "tag", "include"):
        table.pop(key, None)
    results = table.get("process_results")
    if isinstance(results, str):
        table["process_results"] = _function(results, RESULTS, path)
    files = (table.get("dataset_kwargs") or {}).get("data_files")
    if table.get("dataset_path") != "json" or not isinstance(files, dict):
        raise ValueError(
            f"{path}: a task file reads JSON Lines: give `dataset_path: json` and "
            "`dataset_kwargs: {data_files: {test: FILE}}`"
        )
    made = _function(own["records"], RECORDS, path) if "records" in own else None
    fields = _template_fields(table)
    shots = own.get("shots")
    if shots:
        table["fewshot_config"] = {**(table.get("fewshot_config") or {}), "sampler": FirstAlike}
        table["fewshot_split"] = _SHOTS

    def read() -> dict[str, Any]:
        splits = {split: _records(name, file, path, data, made, fields) for split, file in files.items()}
        _check_examples(splits, table, path)
        if shots:
            splits |= _with_shots(splits[shots["split"]], shots, path)
        return {split: datasets.Dataset.from_list(records) for split, records in splits.items()}

    try:
        task = LocalTask(table, read, shots.get("by") if shots else None)
    except (KeyError, TypeError, IndexError, AttributeError, jinja2.TemplateError) as error:
        raise ValueError(f"{path}: the harness cannot use this task: {type(error).__name__}: {_first_line(error)}") from None
    suite.loaded["tasks"][name] = task
    suite.primary[name] = own.get("primary") or table["metric_list"][0]["metric"]
    if "cluster" in own:
        suite.cluster[name] = own["cluster"]


def _function(name: str, known: Mapping[str, Callable], path: Path) -> Callable:
    if name not in known:
        raise ValueError(f"{path}: {name}: unknown function; there are {', '.join(known)}")
    return known[name]


def _template_fields(table: Mapping[str, Any]) -> set[str]:
    """The fields that every record needs: those of the templates that do not ask whether a field is there.

    None are known where a function makes other records of the file's.
    """
    if table.get("process_docs"):
        return set()
    fields: set[str] = set()
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        template = table.get(key)
        if not isinstance(template, str) or re.search(r"\bis (?:not )?defined\b|\bdefault\b", template):
            continue
        with contextlib.suppress(jinja2.TemplateError):  # the harness names the mistake
            fields |= jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    return fields


def _check_examples(splits: Mapping[str, Sequence[Any]], table: Mapping[str, Any], path: Path) -> None:
    """Raises: ValueError where there are too few records to draw each question's examples from."""
    pool, shots = table.get("fewshot_split", ""), table.get("num_fewshot") or 0
    if pool in splits and len(splits[pool]) < shots + (pool == table.get("test_split")):
        file = table["dataset_kwargs"]["data_files"][pool]
        raise ValueError(
            f"{path}: num_fewshot = {shots}: {file} has {len(splits[pool])} records to draw examples from, which are too few; "
            "use the whole file, or lower num_fewshot"
        )


def _records(
    task: str,
    file: str,
    path: Path,
    data: Path | None,
    made: Callable[[dict[str, Any]], dict[str, Any]] | None,
    fields: set[str],  # that every record needs
) -> list[dict[str, Any]]:
    """The records of a file of data, numbered, in the harness's fields."""
    folder = path.parent if data is None else data
    # `FILE.jsonl` may be stored compressed.
    place = next((found for found in (folder / file, folder / f"{file}.gz") if found.is_file()), None)
    if place is None:
        looked = f"{folder}" if data is not None else f"{folder}, as no --data names another folder"
        raise FileNotFoundError(f"task {task}: no file {file} in {looked}")
    records = []
    for source in find_sources([str(place)], RECORD_SUFFIXES):
        for record in source.records("line"):
            try:
                records.append(made(record.value) if made else record.value)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{record.place}: not a record of {task}: {type(error).__name__}: {error}") from None
            if not isinstance(records[-1], dict):
                raise ValueError(f"{record.place}: not a record of {task}: must be an object")
            if lacking := sorted(fields - records[-1].keys()):
                raise ValueError(f"{record.place}: not a record of {task}: no field {', '.join(lacking)}")
    return records


def _with_shots(records: list[dict[str, Any]], shots: Mapping[str, Any], path: Path) -> dict[str, list[dict[str, Any]]]:
    """The split without the first records of each value of a field, and these as examples."""
    first, by = shots["first"], shots.get("by")
    taken: dict[Any, int] = {}
    examples: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for record in records:
        value = record[by] if by else None
        taken[value] = taken.get(value, 0) + 1
        (examples if taken[value] <= first else rest).append(record)
    if not rest:
        raise ValueError(f"{path}: shots = {dict(shots)}: nothing is left to ask")
    return {_SHOTS: examples, shots["split"]: rest}


def arc_choices(record: dict[str, Any]) -> dict[str, Any]:
    """Question, choices and answer of a record that holds them as an instruction (AGI-Edgerunners/LLM-Adapters)."""
    text = record["instruction"].split("\n\nAnswer format:")[0]
    question, listed = text.split("\n\n", 1) if "\n\nAnswer1:" in text else text.split(" Answer1:", 1)
    choices = re.split(r"\s*Answer\d: ", listed if listed.startswith("Answer1:") else f"Answer1:{listed}")[1:]
    return {
        "question": question.split("question: ", 1)[-1].strip(),
        "choices": [choice.strip() for choice in choices],
        "label": int(record["answer"].removeprefix("answer")) - 1,
    }


def _mc2(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA's mc2: the share of probability that the true answers have among all answers."""
    highest = max(log_likelihood for log_likelihood, _ in results)
    weights = [math.exp(log_likelihood - highest) for log_likelihood, _ in results]
    return {"acc": sum(weights[: len(doc["correct_answers"])]) / sum(weights)}


def _char_f1(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The best of all gold answers, by exact match and by llm-jp-eval's char_f1."""
    said = results[0].strip()
    golds = doc["answers"]
    return {
        "exact_match": float(said in golds),
        "char_f1": max(char_f1([said], [gold]) for gold in golds),
    }


RECORDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"arc_choices": arc_choices}
RESULTS: dict[str, Callable[..., dict[str, float]]] = {"mc2": _mc2, "char_f1": _char_f1}


def clusters_of(suite: Suite, task: str, samples: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The cluster of each sample; None where samples are independent."""
    field = suite.cluster.get(task)
    return None if field is None else [sample["doc"][field] for sample in samples]
