"""Everything that needs a GPU, unattended, in one command, for a GPU that is there for half an hour.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 9] [--parts tests,kernels] [--resume] [--rehearse]

Parts run in order of value, each in a process of its own with a time limit: what is left of the time is divided among the parts
still to run in the proportion of their usual length, so that a part that ends early leaves its time to the later ones. A part
that fails or is cut off takes none of the others with it and leaves the rows it has. The folder is flat and small (at most
8 files), so that it can be carried off as it is: gpu-summary.json, gpu-<part>.json, gpu-log.txt. `--resume` runs what is not
whole in the folder; `--rehearse` runs every part tiny on the CPU, in files of another name. Status 0: all parts were done and
no test failed; 1: not so; 130: interrupted, with what was measured until then kept.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks import rows as of
from engine.environment import DeviceError, choose_device
from model.folder import write_file

# A process that imports torch and wakes a GPU does nothing else in less.
_LEAST_SECONDS = 5.0
_MOST_LOG_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Part:
    """One process of a run."""

    name: str
    seconds: float
    """Usual length; any time is divided in this proportion."""
    in_summary: bool = False
    """Whether its result goes into the summary instead of a file of its own."""
    arguments: Callable[["Part", Path, bool], list[str]] = lambda part, out, rehearse: [
        "-m", "benchmarks.gpu_parts", part.name, str(out), *(["--rehearse"] if rehearse else []),
    ]  # fmt: skip
    """(part, result file, rehearse) -> what its Python process is started with."""


PARTS = (
    Part("environment", 30),
    Part("tests", 80, in_summary=True),
    Part("kernels", 140),
    Part("train", 180),
    Part("finetune", 70),
    Part("checkpoint", 25),
    Part("data", 15),
)


class Run:
    """One call: its folder, its clock, what has been done so far."""

    def __init__(self, out: Path, parts: Sequence[Part], *, seconds: float, resume: bool = False, rehearse: bool = False):
        self.out, self.parts, self.resume, self.rehearse = out, tuple(parts), resume, rehearse
        self.prefix = "rehearsal" if rehearse else "gpu"
        self.seconds, self.start = seconds, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        before = read_json(self.file("summary")) or {}
        self.kept: dict[str, Any] = before.get("results", {})
        self.statuses: dict[str, dict[str, Any]] = {}

    def file(self, name: str) -> Path:
        return self.out / f"{self.prefix}-{name}.json"

    @property
    def log(self) -> Path:
        return self.out / f"{self.prefix}-log.txt"

    def result(self, part: Part) -> dict[str, Any] | None:
        """What a part has left, whole or not."""
        found = read_json(self.file(part.name))
        return self.kept.get(part.name) if found is None and part.in_summary else found

    def run(self) -> bool:
        """Run the parts; True where all of them were done and none of their tests failed."""
        waiting = []
        for part in self.parts:
            content = self.result(part)
            if self.resume and content is not None and is_whole(content):
                self._keep(part, content)
                self.statuses[part.name] = {"status": _judged("done before", content), "commit": content.get("commit")}
            else:
                waiting.append(part)
        while waiting:
            part, *waiting = waiting
            limit = divide(self.seconds - (time.monotonic() - self.start), [part, *waiting])
            self._run_part(part, limit)
            self.write()
        self.write()
        return all(status["status"] in ("done", "done before") for status in self.statuses.values())

    def _run_part(self, part: Part, limit: float) -> None:
        if limit < _LEAST_SECONDS:
            self.statuses[part.name] = {"status": "not started: no time left"}
            return
        # What an earlier call left would read as this one's.
        self.file(part.name).unlink(missing_ok=True)
        self.kept.pop(part.name, None)
        self.say(f"{part.name}: at most {limit:.0f} s")
        start = time.monotonic()
        try:
            arguments = part.arguments(part, self.file(part.name), self.rehearse)
            status, output = measure.run_part(arguments, limit=limit, log=self.log)
        except KeyboardInterrupt:
            self._finish(part, "interrupted", "", start, limit)
            raise
        self._finish(part, status, output, start, limit)

    def _finish(self, part: Part, status: str, output: str, start: float, limit: float) -> None:
        content = read_json(self.file(part.name))
        if content is not None:
            # How to have it again: the part's own command named a passing file.
            content["command"] = f"python -m benchmarks.gpu --parts {part.name}{' --rehearse' if self.rehearse else ''}"
            self._keep(part, content)
        if status == "done":
            status = "failed (left no whole result)" if content is None or not is_whole(content) else _judged("done", content)
        entry = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1)}
        if content is not None:
            entry["rows"] = len(content["rows"])
        if not status.startswith("done"):
            entry["output"] = output.rstrip().splitlines()[-20:]
        self.statuses[part.name] = entry
        self._tidy(part)
        self.say(f"{part.name}: {status}, {entry['seconds']} s")

    def _tidy(self, part: Part) -> None:
        """Leave the folder as small as it is said to be."""
        path = self.file(part.name)
        path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        if self.log.stat().st_size > _MOST_LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-_MOST_LOG_BYTES // 2 :])

    def _keep(self, part: Part, content: dict[str, Any]) -> None:
        if part.in_summary:
            self.kept[part.name] = content
            self.file(part.name).unlink(missing_ok=True)
        else:
            measure.write_result(self.file(part.name), content)

    def write(self) -> None:
        """The summary, as far as the run has come."""
        content = {
            "rehearsal": self.rehearse,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": measure.commit(),
            "seconds": round(time.monotonic() - self.start, 1),
            "of": self.seconds,
            "parts": self.statuses,
            "results": self.kept,
        }
        write_file(self.file("summary"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def say(self, line: str) -> None:
        """To the console and the log."""
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def tables(self) -> str:
        """Every part's rows as text, then what became of each part."""
        blocks = []
        for part in self.parts:
            content = self.result(part)
            if content is not None:
                rows = [{name: _short(value) for name, value in of.flat(row).items()} for row in content["rows"]]
                title = part.name if is_whole(content) else f"{part.name} (not whole)"
                blocks.append(f"{title}\n{measure.table(rows, list(dict.fromkeys(name for row in rows for name in row)))}")
        ends = []
        for name, entry in self.statuses.items():
            output = entry.get("output", [])
            ends.append({"part": name, **entry, "last line of its output": _short(output[-1]) if output else None})
        blocks.append(measure.table(ends, ["part", "status", "seconds", "limit", "rows", "last line of its output"]))
        return "\n\n".join(blocks)


def _short(value: Any) -> Any:
    if of.why_missing(value) is not None:
        return "missing"
    return value.replace("\n", " ")[:80] if isinstance(value, str) else value


def divide(remaining: float, parts: Sequence[Part]) -> float:
    """The seconds that the first of the parts still to run may take."""
    return max(0.0, remaining) * parts[0].seconds / sum(part.seconds for part in parts)


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
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Everything that needs a GPU, in one command."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default runs/gpu)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    parser.add_argument("--parts", default=",".join(names), help=f"which, separated by commas (default {','.join(names)})")
    parser.add_argument("--resume", action="store_true", help="only parts of which the folder has no whole result")
    parser.add_argument("--rehearse", action="store_true", help="every part tiny and on the CPU")
    parsed = parser.parse_args(argv)
    chosen = [name.strip() for name in parsed.parts.split(",")]
    for name in chosen:
        if name not in names:
            parser.error(f"--parts: unknown part '{name}'; there are {', '.join(names)}")
    if not parsed.minutes > 0:
        parser.error(f"--minutes {parsed.minutes}: must be above 0")
    parsed.parts = [part for part in PARTS if part.name in chosen]
    return parsed


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    parsed = _arguments(argv)
    if not parsed.rehearse:
        try:
            choose_device("cuda")
        except DeviceError as error:
            raise SystemExit(f"error: {error}; --rehearse tries every part on the CPU") from None
    run = Run(parsed.out, parsed.parts, seconds=60 * parsed.minutes, resume=parsed.resume, rehearse=parsed.rehearse)
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
