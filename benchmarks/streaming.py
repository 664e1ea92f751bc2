"""A model of full size on its way from folder to folder: seconds, GB/s and resident memory beside a plain copy of its files.

    python -m recipes.vocabulary --text ja_train.txt.gz --new-pieces 88000 --out runs/tokenizer
    python -m benchmarks.streaming --tokenizer runs/tokenizer --folder /data --out FILE

The model has random weights, in bfloat16 and in files of 10 GB, as models are published. It is imported (checked, and written
anew in shards of 1 GiB), resized to the tokenizer, and exported; each in a process of its own, whose largest resident set is
taken, mapped files included. Seconds end when everything is on the disk; before they begin, what is read has been dropped from
the page cache. The last row says whether every weight came through with its bits, and how many new rows are equal. Free disk
needed: 3.2 times the model (46 GB for a full one); what was made is removed.
"""

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.checkpoint import forget_files
from benchmarks.command import benchmark
from engine.settings.toml import to_table
from model.config import MistralConfig, preset, read_config, write_config
from model.folder import complete_folder, sync_all
from model.tensor_file import BLOCK_BYTES, TensorStream
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.resize import Method, resize_model
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import TensorFolder, convert_folder, hugging_face_shapes, write_tensor_folder
from recipes import export
from recipes.export import ExportSettings

COLUMNS = ("operation", "gb_read", "gb_written", "seconds", "gb_per_second", "peak_resident_gib", "missing")
PUBLISHED_SHARD = 10**10
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class StreamingSettings:
    """What passes through, and where."""

    tokenizer: str
    """Folder of the merged tokenizer."""
    preset: str = "mistral-7b"
    """Shape of the model."""
    layers: int = 0
    """Its layers; default: the preset's."""
    method: Method = "weighted"
    """How new rows begin."""
    folder: str = ""
    """Folder on the disk to measure; default: the system's temporary one."""
    limit: float = 1800.0
    """Seconds after which an operation is cut off."""
    out: str = ""
    """Result file; default: print only."""

    @property
    def config(self) -> MistralConfig:
        shape = preset(self.preset)
        return replace(shape, num_hidden_layers=self.layers or shape.num_hidden_layers)


def run(settings: StreamingSettings, command: str = "benchmarks.streaming") -> dict[str, Any]:
    """Measure, print a table; the result, which is also written where `out` is given."""
    rows: list[dict[str, Any]] = []
    needed = 3.2 * 2 * settings.config.parameters
    with tempfile.TemporaryDirectory(prefix="komainu-", dir=settings.folder or None) as name:
        root = Path(name)
        if shutil.disk_usage(root).free < needed:
            raise ValueError(f"{root.parent}: less than the {needed / 1e9:.0f} GB free that this takes; choose another folder")
        rows.append(_apart(settings, "make", root, "source"))
        rows.append(_apart(settings, "copy", root, "source", "copied"))
        shutil.rmtree(root / "copied", ignore_errors=True)
        rows.append(_apart(settings, "import_folder", root, "source", "imported"))
        rows.append(_apart(settings, "resize", root, "imported", "resized"))
        shutil.rmtree(root / "imported", ignore_errors=True)
        rows.append(_apart(settings, "export_folder", root, "resized", "exported"))
        rows.append(_apart(settings, "compare", root, "source", "exported"))
    print(measure.table(rows, [column for column in COLUMNS if any(column in row for row in rows)]), flush=True)
    print({name: value for name, value in rows[-1].items() if name not in COLUMNS})
    result = measure.result("streaming", command, torch.device("cpu"), to_table(settings), rows)
    if settings.out:
        measure.write_result(settings.out, result)
    return result


def _apart(settings: StreamingSettings, operation: str, root: Path, source: str, target: str = "") -> dict[str, Any]:
    arguments = {"settings": asdict(settings), "source": str(root / source), "target": str(root / target)}
    row: dict[str, Any] = {"operation": operation.removesuffix("_folder")}
    try:
        return row | measure.call_apart("benchmarks.streaming", operation, arguments, limit=settings.limit)
    except measure.PartError as error:
        return row | {"missing": str(error)}


def make(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """A published folder with random weights."""
    config, folder = StreamingSettings(**settings).config, Path(source)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    # Drawing 14 GB would take longer than all that is measured: beyond the rows, which are to differ, parts of one pool.
    pool = torch.empty(2 * BLOCK_BYTES, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    offsets = itertools.cycle(range(0, BLOCK_BYTES, 4099))
    shapes = hugging_face_shapes(config)

    def blocks(name: str) -> Iterator[Tensor]:
        rows, *row = shapes[name]
        step = max(1, BLOCK_BYTES // math.prod(row, start=2))
        for start in range(0, rows, step):
            shape = (min(step, rows - start), *row)
            if name in MATRICES:
                yield torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            else:
                offset = next(offsets)
                yield pool[offset : offset + math.prod(shape)].view(shape)

    write_config(folder, config, torch.bfloat16)
    tensors = {name: TensorStream(shape, torch.bfloat16, partial(blocks, name)) for name, shape in shapes.items()}
    write_tensor_folder(folder, tensors, max_shard_bytes=PUBLISHED_SHARD)
    write_tokenizer_folder(folder, Tokenizer.load(mistral_tokenizer_path()).model_bytes)
    sync_all(folder)
    return {"gb_written": _gigabytes(folder)}


def copy(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """What the disk and the system give: the same files, copied."""
    del settings

    def work() -> None:
        shutil.copytree(source, target)
        sync_all(Path(target))

    return _measured(work, source, target)


def import_folder(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    del settings

    def work() -> None:
        with complete_folder(target) as folder:
            convert_folder(source, folder)
            write_tokenizer_folder(folder, Tokenizer.load(source).model_bytes)

    return _measured(work, source, target)


def resize(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    chosen = StreamingSettings(**settings)

    def work() -> None:
        base, merged = Tokenizer.load(source), Tokenizer.load(chosen.tokenizer)
        with complete_folder(target) as folder:
            resize_model(source, folder, base, merged, method=chosen.method)

    return _measured(work, source, target)


def export_folder(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    del settings
    return _measured(lambda: export.run(ExportSettings(source=source, out=target)), source, target)


def compare(settings: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """Whether the weights at the end have the bits of those at the start, and how many of the new rows are equal."""
    del settings
    config, resized = read_config(source), read_config(target)
    found: dict[str, Any] = {"rows": resized.vocab_size, "changed_weights": 0, "changed_base_rows": 0, "equal_new_rows": 0}
    with TensorFolder(source) as before, TensorFolder(target) as after:
        for name in before.check(config):
            if name not in MATRICES:
                pairs = zip(before.blocks(name), after.blocks(name), strict=True)
                found["changed_weights"] += sum(not torch.equal(_bits(old), _bits(new)) for old, new in pairs)
                continue
            pieces, end = config.unpadded_vocab_size, resized.unpadded_vocab_size
            keys = []
            for start in range(0, end, 1024):
                rows = after.rows(name, start, min(start + 1024, end))
                if start < pieces:
                    same = (_bits(rows)[: pieces - start] == _bits(before.rows(name, start, min(start + 1024, pieces)))).all(1)
                    found["changed_base_rows"] += int((~same).sum())
                keys += [row.numpy().tobytes() for row in _bits(rows)[max(0, pieces - start) :, :64]]
            # Rows that begin with the same 64 values count as equal.
            found["equal_new_rows"] += len(keys) - len(set(keys))
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def _measured(work: Any, source: str, target: str) -> dict[str, Any]:
    sync_all(Path(source))
    forget_files(Path(source))
    measure.reset_peak_resident()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu
    read, written = _gigabytes(Path(source)), _gigabytes(Path(target))
    return {
        "gb_read": read, "gb_written": written, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "gb_per_second": (read + written) / seconds,
        "peak_resident_gib": measure.peak_memory(torch.device("cpu"))["resident_gib"],
    }  # fmt: skip


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(StreamingSettings, run, argv, "streaming")


if __name__ == "__main__":
    main()
