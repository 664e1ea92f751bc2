"""Copies of a rank's tensors on the host, from which a checkpoint is written while training goes on."""

import warnings

import torch
from torch import Tensor


class Staging:
    """Takes the copies. On a CUDA device they go to page-locked memory, beside the computation, and that memory is kept.

    Args: tensors: of one device, by name; the same memory at every `copy`.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._buffer: Tensor | None = None
        self._locked = False

    def copy(self) -> dict[str, Tensor]:
        """Copies by name, each with a storage of its own. On CUDA they are complete only after `wait`."""
        if self._stream is None:
            return {name: tensor.clone() for name, tensor in self._tensors.items()}
        copies = self._page_locked()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in self._tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
        self._copied = self._stream.record_event()
        return copies

    def before_update(self) -> None:
        """Let the device, not the host, wait until everything is copied: the next kernels may overwrite it."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Let the host wait until everything is copied."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Give the memory back."""
        if self._locked and self._buffer is not None:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._locked = None, False

    def _page_locked(self) -> dict[str, Tensor]:
        # torch's own page-locked allocations are rounded up to powers of two; this is as large as the tensors.
        sizes = {name: -(-tensor.nbytes // 256) * 256 for name, tensor in self._tensors.items()}
        if self._buffer is None:
            self._buffer = torch.empty(sum(sizes.values()), dtype=torch.uint8)
            failed = int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), len(self._buffer), 0))
            self._locked = not failed
            if failed:
                warnings.warn(
                    f"checkpoints: {len(self._buffer) / 2**30:.1f} GiB could not be page-locked (CUDA error {failed}), so "
                    "training waits for the copies; see ulimit -l",
                    stacklevel=2,
                )
        copies, begin = {}, 0
        for name, tensor in self._tensors.items():
            # By way of NumPy, as a view of the buffer would share its storage, which writers then copy once more.
            part = torch.from_numpy(self._buffer.numpy()[begin : begin + tensor.nbytes])
            copies[name] = part.view(tensor.dtype).view(tensor.shape)
            begin += sizes[name]
        return copies
