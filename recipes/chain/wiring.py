"""Whether a chain's stages fit one another: each path that a stage reads is there or made before, no result is made twice."""

import glob
from collections.abc import Sequence
from pathlib import Path

from recipes.chain.markers import Markers
from recipes.chain.stages import Chain, Stage, makes


def wiring_mistakes(
    chain: Chain,
    markers: Markers,
    todo: Sequence[Stage],  # that are to run
    *,
    whole: bool = True,  # whether all stages of the file are in the chain: one that could not be read makes what nobody knows
) -> list[str]:
    """Every mistake in the paths of a chain, one line each."""
    mistakes = []
    writers: dict[Path, str] = {}
    for stage in chain.stages:
        for setting, path in stage.outputs.items():
            other = writers.setdefault(Path(path).absolute(), stage.name)
            if other != stage.name:
                mistakes.append(f"stage {stage.name}: {setting} = {path}: stage {other} writes it, too; give each its own")
    for stage in todo:
        marker = markers.of(stage)
        if marker is None or marker.state != "done":
            mistakes += [f"stage {stage.name}: {mistake}" for mistake in _of_inputs(chain, markers, todo, stage, whole)]
    return mistakes


def _of_inputs(chain: Chain, markers: Markers, todo: Sequence[Stage], stage: Stage, whole: bool) -> list[str]:
    mistakes = []
    for setting, path in stage.inputs.items():
        if is_there(path):
            continue
        maker = chain.maker(stage, path)
        if maker is not None:
            marker = markers.of(maker)
            if maker not in todo:
                mistakes.append(f"{setting} = {path}: not there yet; stage {maker.name} makes it")
            elif marker is not None and marker.state == "done" and not markers.gone(maker):
                mistakes.append(f"{setting} = {path}: not among the results of stage {maker.name}, which is finished")
        elif not chain.is_remote(setting, path) and (whole or not makes(str(chain.folder.parent), path)):
            later = [other.name for other in chain.stages if any(makes(out, path) for out in other.outputs.values())]
            told = f"only the later stage {later[0]} makes it: put that one first" if later else "and no earlier stage makes it"
            mistakes.append(f"{setting} = {path}: no such file or folder, {told}")
    return mistakes


def is_there(path: str) -> bool:
    """Whether a path exists, or a file matches it as a pattern."""
    return Path(path).exists() or bool(glob.glob(path, recursive=True))
