"""Writes checkpoints in the background, all ranks together, with torch.distributed.checkpoint.

Every rank copies its shards to the host and goes on training, while its writing thread passes through the same phases as the
other ranks' threads, over a process group of their own:

1. The optimizer's shards are written.
2. The weights are written as shards, then put together as a Hugging Face folder; the ranks share its files.
3. Every file gets a fingerprint; then the folder is synced and renamed.

A failure on one rank fails the checkpoint on all ranks, and leaves nothing under the checkpoint's name. Removing old
checkpoints is housekeeping: what cannot be removed is reported and tried again with the next checkpoint.
"""

import functools
import json
import math
import shutil
import time
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
from engine.distributed.ranks import SHARD, Ranks, host_group
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
    """Writes the checkpoints of a run. A context manager; all ranks construct and call it alike."""

    def __init__(
        self,
        out: Path,  # run folder, on a disk that all ranks see
        model: Mistral,
        optimizer: AdamW,
        tokenizer: Tokenizer,
        ranks: Ranks,
        *,
        keep: int,  # newest checkpoints to keep
        keep_every: int = 0,  # also keep checkpoints whose step this divides; 0 keeps none of them
    ) -> None:
        self._out, self._ranks, self._tokenizer = out, ranks, tokenizer
        self._keep, self._keep_every = keep, keep_every
        self._config, self._optimizer = model.config, optimizer
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # A rank may hold no rows of a tensor.
        mine = {name: local(tensor) for name, tensor in (self._weights | optimizer.state).items()}
        self._staging = Staging({name: tensor for name, tensor in mine.items() if tensor.numel()}, ranks.device)
        # An update must not overwrite tensors that are still being copied.
        optimizer.before_update = self._staging.before_update
        self._group = host_group(ranks)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._remarks: dict[str, bool] = {}  # remark -> whether it was taken

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
        """Finish the checkpoint that was begun, and free the copies. Raises: as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.close()

    def save(self, state: TrainingState) -> Path:
        """Wait for the checkpoint before, copy the tensors and begin to write `out`/step-N.

        Returns: its path, which does not exist yet. Raises: as `wait` does.
        """
        self.wait()
        folder = self._out / f"step-{state.step:08d}"
        copies, table = self._staging.copy(), {**asdict(state), "updates": self._optimizer.updates}
        self._begun = time.perf_counter()
        self._job = self._thread.submit(self._write, folder, table, copies)
        return folder

    @property
    def failed(self) -> bool:
        """Whether writing has failed on this rank so far. `wait` will raise the error."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is complete. Raises: OSError on all ranks, naming file and remedy."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def remarks(self) -> list[str]:
        """What housekeeping could not do, each remark once."""
        new = [remark for remark, taken in self._remarks.copy().items() if not taken]
        self._remarks.update(dict.fromkeys(new, True))
        return new

    def _write(self, folder: Path, table: dict[str, Any], copies: dict[str, Tensor]) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        with ExitStack() as stack:
            # Reference cycles inside torch would keep the copies alive until garbage is collected.
            stack.callback(copies.clear)
            if self._ranks.device.type == "cuda":
                # This thread's own stream is idle, so that its synchronisations do not wait for training.
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
            # A killed run or a removal that failed left these folders; nothing else would free their disk space.
            self._remove(debris)
        opened.enter_context(complete_folder(folder, overwrite=True))

    def _fingerprints(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Fingerprints of this rank's share of the files, as the state file holds them."""
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        mine = files[self._ranks.rank :: self._ranks.ranks]
        return {str(file.relative_to(partial)): asdict(Fingerprint.of(file)) for file in mine}

    def _finish(self, opened: ExitStack, folder: Path, table: dict[str, Any]) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        table["seconds"] = round(time.perf_counter() - self._begun, 1)
        write_file(partial / STATE, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        opened.close()
        point_latest_at(folder)
        for old in checkpoints(self._out)[: -self._keep]:
            if not self._keep_every or int(old.name.removeprefix("step-")) % self._keep_every:
                self._remove(old)

    def _remove(self, old: Path) -> None:
        """Remove a checkpoint's folder. A link stays, and so does the folder that it points to: someone put it elsewhere."""
        if old.is_symlink():
            return
        try:
            # Rename before removing: a kill must not leave half a checkpoint under a complete one's name.
            shutil.rmtree(old if old.name.startswith(".") else old.rename(old.with_name(f".{old.name}.old")))
        except OSError as error:
            remark = f"{old}: could not be removed ({error.strerror or error}); the next checkpoint tries again"
            self._remarks.setdefault(remark, False)

    def _save_shards(self, folder: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
        """Write each rank's shards of some tensors. Replicas hold equal shards: only one of them is written."""
        shards = 1 if self._ranks.mesh is None else self._ranks.mesh[SHARD].size()
        sizes = {name: -(-len(t) // shards) * math.prod(t.shape[1:]) * t.dtype.itemsize for name, t in tensors.items()}
        # Half the limit: safetensors holds a file twice while it serialises it.
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
        """Write the Hugging Face folder, each rank some of its files."""
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
                write_tokenizer_folder(partial, self._tokenizer)

        self._together(write)

    def _together(self, action: Callable[[], Result], *, main: bool = False) -> list[Result]:
        """Run an action on every rank, or on rank 0 while the others wait.

        Returns: the results, in the order of ranks. Raises: the action's own error, and OSError on the other ranks.
        """
        result, failure = None, None
        try:
            if self._ranks.main or not main:
                result = action()
        except Exception as error:
            failure = error
        found = self._ranks.gather([(result, None if failure is None else str(failure))], self._group)
        if isinstance(failure, OSError):
            raise failure
        if failure is not None:
            # All ranks must see the same kind of failure, as they try again together.
            raise OSError(f"{type(failure).__name__}: {failure}") from failure
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise OSError(f"rank {rank}: {text}")
        return [result for result, _ in found]


def _check_shared(partial: Path) -> None:
    if not partial.is_dir():
        raise OSError(f"{partial}: this rank does not see it; out must be on a disk that all machines of the run share")


class _Copies(dcp.DefaultSavePlanner):
    """Plans with the training tensors and writes their copies."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Whole:
    """Whole tensors by name, put together from all ranks' shards on disk.

    Keeps the last tensor: several Hugging Face tensors may be slices of it.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self._folder, self._tensors = folder, tensors
        self._last: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._last:
            self._last.clear()
            self._last[name] = torch.empty(self._tensors[name].shape, dtype=self._tensors[name].dtype)
            dcp.load(self._last, storage_reader=dcp.HuggingFaceStorageReader(str(self._folder)), no_dist=True)
        return self._last[name]
