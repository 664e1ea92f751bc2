"""Writing checkpoints in the background, all ranks together, through torch.distributed.checkpoint.

Every rank copies its shards to the host and goes on training. Its writing thread then takes part in the same phases as those of
the others, over a process group of their own: the optimizer's shards are written as they are, the weights are first written as
shards, then put together as a Hugging Face folder, one rank a file; everything is fingerprinted, synced and renamed. A failure
on one rank is the failure of all, and leaves nothing under the checkpoint's name.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from engine.checkpoint.staging import Staging
from engine.checkpoint.state import OPTIMIZER, STATE, Fingerprint, TrainingState, checkpoints, point_latest_at
from engine.distributed.ranks import SHARD, Ranks, gather, host_group
from engine.distributed.sharding import local
from engine.optim.adamw import AdamW
from model.config import write_config
from model.folder import complete_folder, write_file
from model.mistral import Mistral
from model.tensor_file import TensorStream
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer
from model.weights import MAX_SHARD_BYTES, hugging_face_rows, hugging_face_shapes, plan_shards, write_tensor_folder

_SHARDS = "shards"
Result = TypeVar("Result")


class Checkpointer:
    """Writes the checkpoints of a run. A context manager; all ranks make and call it alike.

    Args: out: run folder, which all ranks see. keep: newest checkpoints that stay. keep_every: checkpoints whose step it
        divides stay as well; 0 for none.
    """

    def __init__(
        self, out: Path, model: Mistral, optimizer: AdamW, tokenizer: Tokenizer, ranks: Ranks, *, keep: int, keep_every: int = 0
    ) -> None:  # fmt: skip
        self._out, self._ranks, self._tokenizer = out, ranks, tokenizer
        self._keep, self._keep_every = keep, keep_every
        self._config, self._optimizer = model.config, optimizer
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # A rank may hold no row of a tensor.
        mine = {name: local(tensor) for name, tensor in (self._weights | optimizer.state).items()}
        self._staging = Staging({name: tensor for name, tensor in mine.items() if tensor.numel()}, ranks.device)
        # An update must not overwrite what is still being copied.
        optimizer.before_update = self._staging.before_update
        self._group = host_group(ranks)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"meanwhile: {failure}")

    def close(self) -> None:
        """Complete what was begun, and give the copies' memory back. Raises: what `wait` raises."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.close()

    def save(self, state: TrainingState) -> Path:
        """Begin to write `out`/step-N, once the one before is written. Returns its path, which does not exist yet.

        Raises: what `wait` raises.
        """
        self.wait()
        folder = self._out / f"step-{state.step:08d}"
        copies, table = self._staging.copy(), {**asdict(state), "updates": self._optimizer.updates}
        self._job = self._thread.submit(self._write, folder, table, copies)
        return folder

    @property
    def failed(self) -> bool:
        """Whether writing has ended in an error, which `wait` will raise, on this rank so far."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def wait(self) -> None:
        """Wait until what was begun is complete. Raises: OSError, on all ranks, naming what could not be written."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _write(self, folder: Path, table: dict[str, Any], copies: dict[str, Tensor]) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        with ExitStack() as stack:
            # Cycles of references inside torch would keep them alive until garbage is collected.
            stack.callback(copies.clear)
            if self._ranks.device.type == "cuda":
                # This thread's own stream, on which nothing runs: what waits for it does not wait for training.
                torch.cuda.set_device(self._ranks.device)
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self._ranks.device)))
            self._staging.wait()
            opened = stack.enter_context(ExitStack())
            self._together(lambda: self._begin(opened, folder), main=True)
            self._together(lambda: _check_shared(partial))
            self._together(lambda: self._save_shards(partial / OPTIMIZER, self._optimizer.state, copies))
            self._write_model(partial, copies)
            self._together(lambda: shutil.rmtree(partial / _SHARDS, ignore_errors=True), main=True)
            fingerprints = self._together(lambda: self._fingerprints(partial))
            files = dict(sorted(item for found in fingerprints for item in found.items()))
            self._together(lambda: self._finish(opened, folder, {**table, "files": files}), main=True)

    def _begin(self, opened: ExitStack, folder: Path) -> None:
        for debris in self._out.glob(".step-*"):
            # What a killed run was writing or removing; nothing else would free its disk space.
            shutil.rmtree(debris)
        opened.enter_context(complete_folder(folder, overwrite=True))

    def _fingerprints(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Of this rank's share of the files, in the form that the state file has."""
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        mine = files[self._ranks.rank :: self._ranks.ranks]
        return {str(file.relative_to(partial)): asdict(Fingerprint.of(file)) for file in mine}

    def _finish(self, opened: ExitStack, folder: Path, table: dict[str, Any]) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        write_file(partial / STATE, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        opened.close()
        point_latest_at(folder)
        for old in checkpoints(self._out)[: -self._keep]:
            if not self._keep_every or int(old.name.removeprefix("step-")) % self._keep_every:
                # Renamed first: a kill in the middle must not leave half a checkpoint under a complete one's name.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))

    def _save_shards(self, folder: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
        """Write shards of tensors, each rank its own; of equal ones that replicas have, one."""
        shards = 1 if self._ranks.mesh is None else self._ranks.mesh[SHARD].size()
        sizes = {name: -(-len(t) // shards) * math.prod(t.shape[1:]) * t.dtype.itemsize for name, t in tensors.items()}
        # Half, as safetensors holds a file that it serialises twice.
        parts = plan_shards(sizes, MAX_SHARD_BYTES // 2)
        files = {name: number for number, names in enumerate(parts, start=1) for name in names}
        try:
            dcp.save(
                {name: tensor for name, tensor in tensors.items() if name in copies},
                storage_writer=dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True),
                planner=_Copies(copies),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except dcp.api.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: rank {rank} could not write: {cause}; free the disk or choose another out") from None

    def _write_model(self, partial: Path, copies: dict[str, Tensor]) -> None:
        """Write a Hugging Face folder, each rank some of its files."""
        dtype = self._weights["norm.weight"].dtype
        whole: Callable[[str], Tensor] = copies.__getitem__
        if self._group is not None:
            self._together(lambda: self._save_shards(partial / _SHARDS, self._weights, copies))
            whole = _Whole(partial / _SHARDS, self._weights)
        rows = hugging_face_rows(self._config)

        def rows_of(name: str) -> tuple[Tensor]:
            ours, start, stop = rows[name]
            return (whole(ours)[start:stop],)

        def write() -> None:
            shapes = hugging_face_shapes(self._config)
            tensors = {name: TensorStream(shape, dtype, functools.partial(rows_of, name)) for name, shape in shapes.items()}
            share = (self._ranks.rank, self._ranks.ranks)
            write_tensor_folder(partial, tensors, max_shard_bytes=MAX_SHARD_BYTES, share=share)
            if self._ranks.main:
                write_config(partial, self._config, dtype)
                write_tokenizer_folder(partial, self._tokenizer.model_bytes)

        self._together(write)

    def _together(self, action: Callable[[], Result], *, main: bool = False) -> list[Result]:
        """Let every rank do something, or rank 0 alone while the others wait. Returns what each had, rank by rank.

        Raises: what the action raises, and OSError on the other ranks.
        """
        result, failure = None, None
        try:
            if self._ranks.main or not main:
                result = action()
        except Exception as error:
            failure = error
        found = gather([(result, None if failure is None else str(failure))], self._ranks, self._group)
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise OSError(f"rank {rank}: {text}")
        return [result for result, _ in found]


def _check_shared(partial: Path) -> None:
    if not partial.is_dir():
        raise OSError(f"{partial}: this rank does not see it; out must be on a disk that all machines of the run share")


class _Copies(dcp.DefaultSavePlanner):
    """Saves copies in place of the tensors that are planned with."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Whole:
    """Whole tensors out of the shards of all ranks, by name; the last one is kept, as several may be cut from it."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self._folder, self._tensors = folder, tensors
        self._last: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._last:
            self._last.clear()
            self._last[name] = torch.empty(self._tensors[name].shape, dtype=self._tensors[name].dtype)
            dcp.load(self._last, storage_reader=dcp.HuggingFaceStorageReader(str(self._folder)), no_dist=True)
        return self._last[name]
