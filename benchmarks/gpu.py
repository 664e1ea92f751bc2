"""Everything that needs a GPU, unattended, in one command, for a GPU that is there for half an hour.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 9] [--parts tests,kernels] [--resume] [--rehearse [DEVICE]]

Tasks run in order of value. Each is a process of its own with a time limit: one and a half times its usual length, more where
time is plenty, what is left where it is short; the last ones may not start. One that fails or is cut off takes no other with it
and leaves the rows it has. The folder is flat and small (at most 8 files), so that it can be carried off as it is:
gpu-summary.json, gpu-<part>.json, gpu-log.txt. `--resume` runs the tasks that the folder does not have whole; `--rehearse` runs
every part tiny, on the CPU or on another device that it names, in files of another name. Status 0: all was done and no test
failed; 1: not so; 130: interrupted, with what was measured until then kept. Where the files were copied without their
repository, KOMAINU_COMMIT says which commit they are.
"""

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks import rows as of
from benchmarks.report import VIEWS, grouped
from engine.environment import DeviceError, choose_device
from model.folder import write_file

# A process that imports torch and wakes a GPU does nothing else in less.
_LEAST_SECONDS = 5.0
_MOST_LOG_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Task:
    """One process of a part: what it is started with, before its result file.

    seconds: that it usually takes. name: tells it from the part's other tasks; empty where it is the only one.
    """

    part: str
    seconds: float
    name: str = ""
    module: tuple[str, ...] = ("-m", "benchmarks.gpu_parts")

    @property
    def label(self) -> str:
        return f"{self.part} {self.name}".strip()

    def arguments(self, out: Path, rehearsal: str) -> list[str]:
        return [*self.module, self.part, self.name, str(out), *([rehearsal] if rehearsal else [])]


TASKS = (
    Task("environment", 15),
    Task("tests", 120),
    Task("train", 75, "whole"),
    Task("train", 85, "next-token"),
    Task("kernels", 100),
    Task("train", 75, "sft"),
    Task("train", 75, "dpo"),
    Task("train", 100, "ladder"),
    Task("train", 80, "compiled"),
    Task("checkpoint", 40),
    Task("data", 15),
    Task("finetune", 60),
)
# Outcomes of tests are no benchmark's result: they stand in the summary instead of a file of their own.
IN_SUMMARY = frozenset({"tests"})


class Run:
    """One call: its folder, its clock, what has been done so far."""

    def __init__(self, out: Path, tasks: Sequence[Task], *, seconds: float, resume: bool = False, rehearsal: str = ""):
        self.out, self.tasks, self.resume, self.rehearsal = out, tuple(tasks), resume, rehearsal
        self.parts = list(dict.fromkeys(task.part for task in tasks))
        self.prefix = "rehearsal" if rehearsal else "gpu"
        self.seconds, self.start = seconds, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        before = read_json(self.file("summary")) or {}
        self.kept: dict[str, Any] = before.get("results", {})
        self.before: dict[str, dict[str, Any]] = before.get("tasks", {})
        self.statuses: dict[str, dict[str, Any]] = {}
        self.begun: set[str] = set()

    def file(self, name: str) -> Path:
        return self.out / f"{self.prefix}-{name}.json"

    @property
    def log(self) -> Path:
        return self.out / f"{self.prefix}-log.txt"

    def result(self, part: str) -> dict[str, Any] | None:
        """What a part has left, whole or not."""
        return self.kept.get(part) if part in IN_SUMMARY else read_json(self.file(part))

    def run(self) -> bool:
        """Run the tasks; True where all of them were done and no test failed."""
        waiting = []
        for task in self.tasks:
            if self._is_done(task):
                entry = self.before[task.label]
                ended = entry["status"].removeprefix("done before").removeprefix("done")
                self.statuses[task.label] = {**entry, "status": f"done before{ended}"}
            else:
                waiting.append(task)
        while waiting:
            task, *waiting = waiting
            remaining = self.seconds - (time.monotonic() - self.start)
            self._run_task(task, limit_of(remaining, [task, *waiting]))
            self.write()
        self.write()
        return all(status["status"] in ("done", "done before") for status in self.statuses.values())

    def _is_done(self, task: Task) -> bool:
        """Whether the folder has a task's rows from an earlier call, which are to stay."""
        content = self.result(task.part)
        return self.resume and content is not None and self.before.get(task.label, {}).get("status", "").startswith("done")

    def _run_task(self, task: Task, limit: float) -> None:
        if limit < _LEAST_SECONDS:
            self.statuses[task.label] = {"status": "not started: no time left"}
            return
        if task.part not in self.begun:
            self.begun.add(task.part)
            self._forget(task.part)
        self.say(f"{task.label}: at most {limit:.0f} s")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="komainu-", ignore_cleanup_errors=True) as scratch:
            file, status, output = Path(scratch) / "result.json", "interrupted", ""
            try:
                # What a task that is cut off leaves behind, weights among it, must not fill the disk.
                temporary = {"TMPDIR": scratch}
                arguments = task.arguments(file, self.rehearsal)
                status, output = measure.run_part(arguments, limit=limit, log=self.log, environment=temporary)
            finally:
                content = read_json(file)
                if status == "done":
                    whole = content is not None and is_whole(content)
                    status = _judged("done", content) if content and whole else "failed (left no whole result)"
                entry = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1)}
                if content is not None:
                    entry["rows"] = len(content["rows"])
                if not status.startswith("done"):
                    entry["output"] = output.rstrip().splitlines()[-20:]
                self.statuses[task.label] = entry
                if content is not None:
                    content["settings"].pop("out", None)
                    self._keep(task, content)
                self._shorten_log()
        self.say(f"{task.label}: {status}, {entry['seconds']} s")

    def _forget(self, part: str) -> None:
        """Drop what an earlier call left of a part, which would read as this one's: all but the rows of tasks that stay."""
        content = self.result(part)
        names = {task.name for task in self.tasks if task.part == part and task.label in self.statuses}
        rows = [row for row in content["rows"] if row.get("task") in names] if content is not None else []
        self.file(part).unlink(missing_ok=True)
        self.kept.pop(part, None)
        if content is not None and rows:
            settings = {name: value for name, value in content["settings"].items() if name in names}
            self._write_part(part, {**content, "rows": rows, "settings": settings})

    def _keep(self, task: Task, content: dict[str, Any]) -> None:
        """Add a task's rows to those of its part, which is whole once all of its tasks were."""
        if task.name:
            content["settings"] = {task.name: content["settings"]}
            content["rows"] = [{"task": task.name, **row} for row in content["rows"]]
        before = self.result(task.part)
        if before is not None:
            content["settings"] = before["settings"] | content["settings"]
            content["rows"] = before["rows"] + content["rows"]
        statuses = [self.statuses.get(other.label, {}).get("status", "") for other in self.tasks if other.part == task.part]
        content["complete"] = all(status.startswith("done") for status in statuses)
        # How to have it again: the task's own command names a file that is gone.
        rehearsal = f" --rehearse {self.rehearsal}" if self.rehearsal else ""
        content["command"] = f"python -m benchmarks.gpu --parts {task.part}{rehearsal}"
        self._write_part(task.part, content)

    def _write_part(self, part: str, content: dict[str, Any]) -> None:
        if part in IN_SUMMARY:
            self.kept[part] = content
        else:
            measure.write_result(self.file(part), content)

    def _shorten_log(self) -> None:
        if self.log.stat().st_size > _MOST_LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-_MOST_LOG_BYTES // 2 :])

    def write(self) -> None:
        """The summary, as far as the run has come."""
        content = {
            "rehearsal": self.rehearsal,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": measure.commit(),
            "seconds": round(time.monotonic() - self.start, 1),
            "of": self.seconds,
            # Those of parts that this call leaves alone stay, as their files do.
            "tasks": {
                **{label: entry for label, entry in self.before.items() if label.split()[0] not in self.parts},
                **self.statuses,
            },
            "results": self.kept,
        }
        write_file(self.file("summary"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def say(self, line: str) -> None:
        """To the console and the log."""
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def tables(self) -> str:
        """Every part's rows as text, then what became of each task."""
        blocks = []
        for part in self.parts:
            content = self.result(part)
            if content is not None:
                title = part if is_whole(content) else f"{part} (not whole)"
                blocks.append(f"{title}\n{_table(part, content['rows'])}")
        ends = []
        for label, entry in self.statuses.items():
            output = entry.get("output", [])
            ends.append({"task": label, **entry, "last line of its output": _short(output[-1]) if output else None})
        blocks.append(measure.table(ends, ["task", "status", "seconds", "limit", "rows", "last line of its output"]))
        return "\n\n".join(blocks)


def _table(part: str, rows: Sequence[dict[str, Any]]) -> str:
    """The columns that matter most, where the benchmark says which, and of what tells rows apart those that differ."""
    view = VIEWS.get(part)
    flat = [{name: _short(value) for name, value in of.flat(row).items()} for row in rows]
    tables = []
    for heading, some in grouped(view, flat):
        names = dict.fromkeys(name for row in some for name in row)
        if view and view.brief:
            differing = [name for name in of.KEYS.get(part, ()) if len({repr(row.get(name)) for row in some}) > 1]
            names = dict.fromkeys(name for name in (*differing, *view.brief, "missing") if name in names)
        columns = [name for name in names if any(row.get(name) not in (None, "") for row in some)]
        tables.append((f"{heading}\n" if heading else "") + measure.table(some, columns))
    return "\n".join(tables)


def _short(value: Any) -> Any:
    if of.why_missing(value) is not None:
        return "missing"
    return value.replace("\n", " ")[:80] if isinstance(value, str) else value


def limit_of(remaining: float, tasks: Sequence[Task]) -> float:
    """The seconds that the first of the tasks still to run may take: its share of what remains, in proportion to the usual
    lengths, but not less than one and a half times its own, as a task that is cut off has cost its time for little."""
    first = tasks[0].seconds
    share = remaining * first / sum(task.seconds for task in tasks)
    return max(0.0, min(remaining, max(share, 1.5 * first)))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None where there is none that is whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_whole(content: dict[str, Any]) -> bool:
    """Whether a result has all of its rows."""
    return "rows" in content and content.get("complete", True) is True


def _judged(status: str, content: dict[str, Any]) -> str:
    failed = sum(row.get("outcome") == "failed" for row in content["rows"])
    return f"{status}, but {failed} of {len(content['rows'])} tests failed" if failed else status


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = list(dict.fromkeys(task.part for task in TASKS))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Everything that needs a GPU, at once.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default runs/gpu)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    parser.add_argument("--parts", default=",".join(names), help=f"which, separated by commas (default {','.join(names)})")
    parser.add_argument("--resume", action="store_true", help="only parts of which the folder has no whole result")
    parser.add_argument(
        "--rehearse", nargs="?", const="cpu", default="", choices=("cpu", "cuda"), help="every part tiny, by default on the CPU"
    )
    parsed = parser.parse_args(argv)
    chosen = [name.strip() for name in parsed.parts.split(",")]
    for name in chosen:
        if name not in names:
            parser.error(f"--parts: unknown part '{name}'; there are {', '.join(names)}")
    if not parsed.minutes > 0:
        parser.error(f"--minutes {parsed.minutes}: must be above 0")
    parsed.tasks = [task for task in TASKS if task.part in chosen]
    return parsed


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    parsed = _arguments(argv)
    if parsed.rehearse != "cpu":
        try:
            choose_device("cuda")
        except DeviceError as error:
            raise SystemExit(f"error: {error}; --rehearse tries every part on the CPU") from None
    run = Run(parsed.out, parsed.tasks, seconds=60 * parsed.minutes, resume=parsed.resume, rehearsal=parsed.rehearse)
    # What stops a machine's command ends the part that is running, too, and leaves the summary.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        whole = run.run()
    except KeyboardInterrupt:
        run.write()
        run.say(run.tables())
        raise SystemExit(130) from None
    run.say(run.tables())
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
