"""The dry run of a chain: everything that can be known before it starts. Nothing is written, no weights are fetched."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.sources import HUB, check_hub_access
from engine.estimate.devices import DEVICES
from kernels import padded_to_tiles
from model.config import PRESET, MistralConfig, preset, read_config
from model.hub import check_access, hub_repository
from recipes.chain.markers import Markers
from recipes.chain.stages import Chain, Stage
from recipes.chain.staleness import Verdict, judge, refusal
from recipes.chain.wiring import is_there, wiring_mistakes

if TYPE_CHECKING:
    from recipes.pipeline import PipelineSettings

# Bytes of a token file for each byte of text that it is made from, where it is compressed and where it is not (assumed).
_TOKENS_OF_COMPRESSED, _TOKENS_OF_TEXT = 4.0, 1.2
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(chain: Chain, settings: PipelineSettings, mistakes: Sequence[str], start: str) -> None:
    """Print what each stage will do. All ranks call it; rank 0 prints.

    Args: mistakes: what is wrong with the stages' settings. start: the command that starts the chain.
    Raises: ValueError naming every mistake.
    """
    checker = _Checker(chain, settings, start)
    checker.mistakes += mistakes
    checker.check()
    if checker.mistakes:
        count = "1 mistake" if len(checker.mistakes) == 1 else f"{len(checker.mistakes)} mistakes"
        raise ValueError(f"{count}; nothing was started or written\n" + "\n".join(checker.mistakes))
    checker.say("dry run: no mistake found; nothing was started or written")


class _Checker:
    def __init__(self, chain: Chain, settings: PipelineSettings, start: str) -> None:
        self._chain, self._settings, self._start = chain, settings, start
        self._main = os.environ.get("RANK", "0") == "0"
        self.mistakes: list[str] = []
        self._disk: dict[Path, list[tuple[str, int]]] = {}

    def say(self, line: str) -> None:
        if self._main:
            print(line, flush=True)

    @contextmanager
    def _noted(self, stage: Stage) -> Iterator[None]:
        """Adds what is raised inside to the mistakes."""
        try:
            yield
        except (ValueError, OSError) as error:
            if f"stage {stage.name}: {error}" not in self.mistakes:
                self.mistakes.append(f"stage {stage.name}: {error}")

    def check(self) -> None:
        chain, settings = self._chain, self._settings
        todo = chain.called(settings.only, "--only") if settings.only else list(chain.stages)
        markers = Markers(chain)
        self.mistakes += wiring_mistakes(chain, markers, todo, whole=not self.mistakes)
        again = chain.depending(settings.from_)
        verdicts = judge(chain, markers, todo)
        matter = chain.needed(todo)
        if said := refusal([v for v in verdicts if v.stage in matter and v.stage not in again], self._start):
            self.mistakes.append(said)
        for number, verdict in enumerate(verdicts, 1):
            stage = verdict.stage
            if stage in todo:
                state = "to make again" if stage in again else verdict.state
                self.say(f"[{number}/{len(chain.stages)}] {stage.name}: {state}: {stage.command}")
                for remark in verdict.remarks:
                    self.say(f"    {remark}")
                if state != "finished":
                    self._check_stage(stage, verdict, state == "to make again")
        self._check_disk()

    def _check_stage(self, stage: Stage, verdict: Verdict, again: bool) -> None:
        from engine.inputs import check_writable

        for setting, path in stage.outputs.items():
            self.say(f"    writes {path}")
            with self._noted(stage):
                check_writable(Path(path), setting)
        if stage.recipe.extra and importlib.util.find_spec(stage.recipe.extra) is None:
            self.mistakes.append(f"stage {stage.name}: needs the extra eval: pip install 'komainu[eval]'")
        for setting, path in stage.inputs.items():
            if self._main and self._chain.is_remote(setting, path):
                with self._noted(stage):
                    self._check_remote(path)
        config = None
        with self._noted(stage):
            config = self._shape_made_by(stage)
        self._count_bytes(stage, config)
        if stage.trains and config is not None:
            with self._noted(stage):
                self.say(f"    {self._memory(stage.settings, config)}")
        ready = all(is_there(path) or self._chain.is_remote(setting, path) for setting, path in stage.inputs.items())
        if ready and not again and verdict.state != "stale" and not self._settings.gpu and hasattr(stage.settings, "dry_run"):
            # The stage's own dry run knows the data.
            with self._noted(stage):
                stage.recipe.run(dataclasses.replace(stage.settings, dry_run=True))

    def _check_remote(self, path: str) -> None:
        if path.startswith(PRESET):
            preset(path.removeprefix(PRESET))
        elif path.startswith(HUB):
            check_hub_access(path)
            self.say(f"    {path}: the hub gives it")
        elif hub_repository(path):
            check_access(path)
            self.say(f"    {path}: the hub gives it, or it lies in the cache")

    # Shapes: what a model that is not there yet will look like.

    def _shape_made_by(self, stage: Stage) -> MistralConfig | None:
        """The shape of the model that a stage trains, resizes or exports; None where it makes no model, or nobody can know."""
        settings = stage.settings
        setting = next((name for name in ("model", "from_", "source") if name in stage.inputs), None)
        if setting is None or not (stage.trains or hasattr(settings, "model_out") or setting == "source"):
            return None
        config = self._shape(stage, setting)
        if config is None or not hasattr(settings, "model_out"):
            return config
        pieces = settings.size or config.unpadded_vocab_size + settings.new_pieces
        return dataclasses.replace(config, vocab_size=padded_to_tiles(pieces), unpadded_vocab_size=pieces)

    def _shape(self, stage: Stage, setting: str) -> MistralConfig | None:
        from engine.checkpoint.state import model_folder

        name = stage.inputs[setting]
        if name.startswith(PRESET):
            return preset(name.removeprefix(PRESET))
        if maker := self._chain.maker(stage, name):
            return self._shape_made_by(maker)
        if Path(name).exists():
            return read_config(model_folder(name, weights=False))
        # A mistyped path is a mistake of its own, and was named.
        return self._shape_at_hub(name) if self._chain.is_remote(setting, name) else None

    def _shape_at_hub(self, name: str) -> MistralConfig | None:
        from model.hub import resolve_folder

        try:
            return read_config(resolve_folder(name, weights=False))
        except FileNotFoundError:
            # The hub does not answer, which is a mistake of its own; the shape of one model is known all the same.
            return preset("mistral-7b") if name.partition("@")[0] == "mistralai/Mistral-7B-v0.1" else None

    # Memory and disk.

    def _memory(self, settings: Any, config: MistralConfig) -> str:
        """The planned memory of a training, in a line. Raises: ValueError where it does not fit."""
        import torch

        from engine.environment import choose_device, choose_dtype, host_memory
        from recipes.plan import look_ahead

        processes = int(os.environ.get("WORLD_SIZE", "1"))
        gpus = self._settings.gpus or processes
        remedy = "lower pack_tokens, choose a leaner recompute or optimizer.moments = bfloat16, or use more GPUs"
        if self._settings.gpu or choose_device(settings.device).type == "cuda":
            kind, limit = self._settings.gpu, 0.0
            if not kind:
                # Memory alone is asked here, so the kind matters little.
                kind, limit = "h200", torch.cuda.get_device_properties(0).total_memory / 2**30
            outlook = look_ahead(settings, DEVICES[kind], gpus, limit, config)
            found = f"memory: {outlook.limit - outlook.free:.1f} of {outlook.limit:.1f} GiB on each of {gpus} GPUs"
            if outlook.free < 0:
                raise ValueError(f"{found}, which does not fit: {remedy}")
            return f"{found}, {outlook.free:.1f} free"
        dtype = str(choose_dtype(settings.dtype, torch.device("cpu"))).removeprefix("torch.")
        total, _ = host_memory()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        outlook = look_ahead(dataclasses.replace(settings, dtype=dtype), DEVICES["h200"], gpus, config=config)
        peak = here * outlook.memory.peak / 2**30
        found = f"memory: {peak:.2f} GiB of the host's {total / 2**30:.1f}, on the CPU"
        if total and peak > total / 2**30:
            raise ValueError(f"{found}, which does not fit: {remedy}; --gpu h200 --gpus 8 plans for other machines")
        return found

    def _count_bytes(self, stage: Stage, config: MistralConfig | None) -> None:
        """Add what a stage will leave on the disk, as far as it can be known."""
        from engine.checkpoint.room import bytes_of_checkpoint
        from engine.estimate.account import amount

        settings, size = stage.settings, 0
        if config is not None:
            if stage.trains:
                kept = settings.keep_checkpoints if settings.checkpoint_every else 1
                size = kept * bytes_of_checkpoint(config.parameters, settings.optimizer.moments)
            else:
                size = config.parameters * _ITEM.get(getattr(settings, "dtype", "bfloat16"), 2)
        elif hasattr(settings, "tokenizer"):
            size = int(sum(_token_bytes(path) for name, path in stage.inputs.items() if name.startswith("paths")))
        if size:
            path = Path(next(iter(stage.outputs.values()))).absolute()
            existing = next(folder for folder in (path, *path.parents) if folder.exists())
            self._disk.setdefault(existing, []).append((stage.name, size))
            self.say(f"    about {amount(size)} on the disk")

    def _check_disk(self) -> None:
        """Compare what all stages leave with the room on each disk."""
        from engine.estimate.account import amount

        by_disk: dict[int, tuple[Path, int]] = {}
        for folder, entries in self._disk.items():
            device = folder.stat().st_dev
            _, before = by_disk.get(device, (folder, 0))
            by_disk[device] = folder, before + sum(size for _, size in entries)
        for folder, size in by_disk.values():
            usage = shutil.disk_usage(folder)
            found = f"disk: {amount(size)} to write, {amount(usage.free)} free in {folder}"
            if usage.total and size > usage.free:
                self.mistakes.append(f"{found}: free the disk, or work in another folder (--out)")
            self.say(found + "; data that is not there yet is not counted")


def _token_bytes(path: str) -> float:
    """The size of the tokens of a text file or folder, estimated; 0 where it is not there yet."""
    place = Path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else []
    return sum(
        file.stat().st_size * (_TOKENS_OF_COMPRESSED if file.suffix in (".gz", ".parquet") else _TOKENS_OF_TEXT)
        for file in files
    )
