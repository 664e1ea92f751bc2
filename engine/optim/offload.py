"""Tensors in the host's memory, brought to the GPU piece by piece, changed there and brought back.

Each direction has a stream of its own, and the GPU two slots of memory: while one slot's piece is computed with and sent back,
the other's piece comes in. So the bus carries both directions at once, and the computation hides behind it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a piece: large enough for the bus's full speed, and a small share of a GPU's memory.
PIECE = 2**25


def pieces_of(numel: int) -> list[slice]:
    """Cut a flat tensor into pieces."""
    return [slice(first, min(first + PIECE, numel)) for first in range(0, numel, PIECE)]


def on_device(
    pieces: Sequence[Sequence[Tensor]],  # each of flat tensors on the host, pinned, of one dtype and at most `PIECE` elements
    device: torch.device,
) -> Iterator[list[Tensor]]:
    """Yields each piece on the device, and writes it back as the caller's current stream leaves it.

    Once the iterator is exhausted, the current stream waits for all copies. Off CUDA the pieces themselves are yielded.
    """
    if device.type != "cuda":
        yield from (list(piece) for piece in pieces)
    elif pieces:
        yield from _streamed(pieces, device)


def _streamed(pieces: Sequence[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    computing = torch.cuda.current_stream(device)
    incoming, outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
    room = max(tensor.numel() for piece in pieces for tensor in piece)
    slots = [[torch.empty(room, dtype=tensor.dtype, device=device) for tensor in pieces[0]] for _ in range(2)]
    emptied: list[torch.cuda.Event | None] = [None, None]

    def fetch(number: int) -> tuple[list[Tensor], torch.cuda.Event]:
        slot = number % 2
        with torch.cuda.stream(incoming):
            if (event := emptied[slot]) is not None:
                incoming.wait_event(event)
            found = [buffer[: host.numel()] for buffer, host in zip(slots[slot], pieces[number], strict=True)]
            for tensor, host in zip(found, pieces[number], strict=True):
                tensor.copy_(host, non_blocking=True)
            return found, incoming.record_event()

    # The slots' memory may have served the current stream until now.
    incoming.wait_stream(computing)
    following = fetch(0)
    for number, piece in enumerate(pieces):
        found, arrived = following
        if number + 1 < len(pieces):
            following = fetch(number + 1)
        computing.wait_event(arrived)
        yield found
        outgoing.wait_stream(computing)
        with torch.cuda.stream(outgoing):
            for tensor, host in zip(found, piece, strict=True):
                host.copy_(tensor, non_blocking=True)
            emptied[number % 2] = outgoing.record_event()
    computing.wait_stream(outgoing)
