"""A stage's marker: that it has begun, is done, or is to be made again; with the settings and contents that it depends on.

    runs/shisa/pipeline/sft.json

A marker appears whole or not at all. It is written before a stage starts and after it ends, so a killed chain knows on its next
start which results are complete.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.folder import write_file
from recipes.chain.content import Contents, difference
from recipes.chain.stages import Chain, Stage

VERSION = 1


@dataclass(frozen=True)
class Marker:
    """What is known of a stage.

    state: "again" where its results are to be moved aside first. settings: dotted name -> value, of those that change a result.
    inputs: setting -> {"path", "files"}, with `files` as `Contents.of` gives them, None for a preset or the hub.
    outputs: the same of a stage that is done. existed: whether results lay there before the stage began.
    """

    state: Literal["begun", "done", "again"]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    existed: bool = False
    seconds: float = 0.0  # of all starts together
    version: int = VERSION


class Markers:
    """The markers of a chain."""

    def __init__(self, chain: Chain) -> None:
        """Raises: ValueError for a marker that cannot be read, naming the file and the remedy."""
        self._chain = chain
        self._markers = {stage.name: marker for stage in chain.stages if (marker := _read(self._path(stage)))}
        self.contents = Contents()
        for stage in chain.stages:
            marker = self.of(stage)
            for named in () if marker is None else (marker.inputs, marker.outputs):
                for entry in named.values():
                    self.contents.remember(stage.as_now(entry["path"]), entry["files"])

    def of(self, stage: Stage) -> Marker | None:
        return self._markers.get(stage.name)

    def _path(self, stage: Stage) -> Path:
        return self._chain.folder / f"{stage.name}.json"

    def inputs(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """What a stage reads now, but for inputs that change no result. Raises: as `Contents.of`."""
        found = {}
        for name, path in stage.inputs.items():
            if not stage.is_free(name):
                remote = self._chain.is_remote(name, path)
                found[name] = {"path": stage.as_written(path), "files": None if remote else self.contents.of(path)}
        return found

    def outputs(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """What lies now where a stage writes. Raises: as `Contents.of`."""
        return {name: {"path": stage.as_written(path), "files": self.contents.of(path)} for name, path in stage.outputs.items()}

    def begin(self, stage: Stage) -> Marker:
        """Write that a stage begins, or begins anew; results that are to be made again are moved aside.

        Returns: its marker. `existed` says whether results lie there that this chain has not begun.
        """
        marker = self.of(stage)
        if marker is not None and marker.state == "again":
            for path in stage.written:
                _move_aside(path)
        if marker is None or marker.state == "again" or not self.has_begun(stage):
            existed = any(path.exists() for path in stage.written)
            marker = Marker("begun", stage.identity, self.inputs(stage), existed=existed)
            self._write(stage, marker)
        return marker

    def finish(self, stage: Stage, began: float) -> None:
        """Write that a stage is done. began: time.monotonic() at this start."""
        marker = self._with_time(stage, began)
        self._write(stage, Marker(**{**asdict(marker), "state": "done", "outputs": self.outputs(stage)}))

    def interrupt(self, stage: Stage, began: float) -> None:
        """Keep the seconds of a start that did not come to its end."""
        self._write(stage, self._with_time(stage, began))

    def _with_time(self, stage: Stage, began: float) -> Marker:
        marker = self.of(stage)
        assert marker is not None
        return Marker(**{**asdict(marker), "seconds": round(marker.seconds + time.monotonic() - began, 3)})

    def discard(self, stage: Stage) -> None:
        """Write that a stage is to be made again, from the beginning."""
        if self.of(stage) or any(path.exists() for path in stage.written):
            self._write(stage, Marker("again"))

    def _write(self, stage: Stage, marker: Marker) -> None:
        self._chain.folder.mkdir(parents=True, exist_ok=True)
        write_file(self._path(stage), json.dumps(asdict(marker), ensure_ascii=False, indent=1) + "\n")
        self._markers[stage.name] = marker

    def changes(self, stage: Stage) -> list[str]:
        """How a stage that has begun or is done differs from what its settings and inputs now say; empty where it does not.

        Inputs that are not there (any more) are left to the stages that need them.
        Raises: as `Contents.of`.
        """
        marker = self.of(stage)
        if marker is None or not self.has_begun(stage):
            return []
        # In the form in which JSON gives the marker's values back.
        settings = json.loads(json.dumps(stage.identity))
        # A setting that an older version did not know had the effect of its default.
        before = {name: stage.default(name) for name in settings} | marker.settings
        found = [
            f"{name} = {_shown(settings.get(name))}, was {_shown(before.get(name))}"
            for name in sorted({*settings, *before})
            if settings.get(name) != before.get(name)
        ]
        now = self.inputs(stage)
        for name in sorted({*now, *marker.inputs}):
            found += _changes_of_input(stage, name, marker.inputs.get(name), now.get(name))
        outputs = self.outputs(stage) if marker.state == "done" else {}
        for name in sorted({*outputs, *marker.outputs}):
            found += _changes_of_output(stage, name, marker.outputs.get(name), outputs.get(name))
        return found

    def has_begun(self, stage: Stage) -> bool:
        """Whether a stage has a marker and something to go on from. Otherwise its settings may still change."""
        marker = self.of(stage)
        if marker is None or marker.state == "again":
            return False
        if marker.state == "done":
            return True
        if stage.trains:
            from engine.checkpoint.state import newest_checkpoint

            return newest_checkpoint(stage.outputs["out"]) is not None
        return any(path.exists() for path in stage.written)

    def gone(self, stage: Stage) -> list[str]:
        """The results of a finished stage that are not there any more."""
        marker = self.of(stage)
        if marker is None or marker.state != "done":
            return []
        return [path for path in stage.outputs.values() if self.contents.of(path) is None]


def _shown(value: Any) -> str:
    return "left out" if value is None else repr(value)


# A path of this machine with its content (`Contents.of`), or a name on the hub with None.
_Entry = dict[str, Any]


def _changes_of_input(stage: Stage, name: str, before: _Entry | None, now: _Entry | None) -> list[str]:
    if before is None or now is None:
        path = (now or before or {})["path"]
        return [f"{name} = {path!r} is {'new' if before is None else 'left out'}"]
    if before["files"] is not None and now["files"] is not None:
        differing = difference(before["files"], now["files"])
        if differing is None:
            return []
        if before["path"] == now["path"]:
            return [f"{stage.as_now(now['path'])} changed ({name}): {differing}"]
    return [f"{name} = {now['path']!r}, was {before['path']!r}"] if before["path"] != now["path"] else []


def _changes_of_output(stage: Stage, name: str, before: _Entry | None, now: _Entry | None) -> list[str]:
    if before is None or now is None or before["path"] != now["path"]:
        return [f"{name} = {_shown(now and now['path'])}, was {_shown(before and before['path'])}"]
    differing = difference(before["files"], now["files"]) if now["files"] is not None else None
    return [f"{stage.as_now(now['path'])} was changed after the stage had made it: {differing}"] if differing else []


def _move_aside(path: Path) -> None:
    """Rename a result to the first free name `<path>.old`, `<path>.old2` ..."""
    if not path.exists():
        return
    number, target = 1, path.with_name(f"{path.name}.old")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.old{number}")
    path.rename(target)
    print(f"{path}: kept as {target}; delete it when you do not need it")


def _read(path: Path) -> Marker | None:
    """Raises: ValueError naming the file and the remedy."""
    if not path.is_file():
        return None
    remedy = "delete it, and the stage is treated as one that no chain has made"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (
            not isinstance(table, dict)
            or table.get("version") != VERSION
            or table.get("state") not in ("begun", "done", "again")
        ):
            raise ValueError(f"no marker of version {VERSION}")
        return Marker(**table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
