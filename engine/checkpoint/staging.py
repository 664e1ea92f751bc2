"""Copies of a rank's tensors on the host. A checkpoint is written from the copies while training goes on."""

import warnings

import torch
from torch import Tensor


class Staging:
    """Copies a fixed set of tensors to the host, again and again.

    On a CUDA device the copies go to page-locked memory, which is allocated once and kept, and run beside the computation.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],  # by name, all on `device`; their memory stays the same between copies
        device: torch.device,
    ) -> None:
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
        """Make the device wait for the copies before later kernels overwrite the tensors. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Make the host wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Free the page-locked memory."""
        if self._locked and self._buffer is not None:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._locked = None, False

    def _page_locked(self) -> dict[str, Tensor]:
        # torch rounds its own page-locked allocations up to powers of two; this buffer is as large as the tensors.
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
            # Through NumPy: a torch view would share the whole buffer's storage, and writers would copy it once more.
            part = torch.from_numpy(self._buffer.numpy()[begin : begin + tensor.nbytes])
            copies[name] = part.view(tensor.dtype).view(tensor.shape)
            begin += sizes[name]
        return copies
