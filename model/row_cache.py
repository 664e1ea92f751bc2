"""Keys and values of many texts at once, each in its own row, for batched generation.

Every layer has one buffer of all rows. A row is a ring of at most one window, as in `model.cache`: position p lies in slot
p % slots, and rings grow, all together, until they hold a window. The rows in use are always the first ones, so that one
operator reads them without gathering: the last row moves into the place of a row that ends.

Shapes: P = 2 for key and value, R rows, C slots of a row, B rows in use, T tokens of a pack, N listed tokens, H query heads, K
key/value heads, E head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention.choice import Backend
from kernels.attention.decode_rows import decode_rows_attention
from kernels.attention.work import AttentionWork
from model.config import MistralConfig
from model.mistral import Attend, attention_by

_FIRST_SLOTS = 256


class RowCache:
    """A cache for up to `rows` texts. For inference only.

    A text enters by `reading` (its prompt), goes on by `writing` (a token at a time) and leaves by `remove`.
    """

    def __init__(
        self,
        config: MistralConfig,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.rows, self.window = rows, config.sliding_window
        self.capacity = config.max_position_embeddings if self.window is None else self.window
        self.lengths: list[int] = []  # tokens of the text in each row in use
        shape = (2, rows, 0, config.num_key_value_heads, config.head_dim)
        self._buffers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def __len__(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self._buffers[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: at most 2 * layers * rows * capacity * K * E * itemsize."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def reading(
        self,
        work: AttentionWork,  # of the pack, on the cache's device
        places: Sequence[Tensor],  # int64: the places in the pack of each new text's tokens
        backend: Backend = "auto",
    ) -> Attend:
        """Attention within a pack of new texts, which get the next rows: an argument of `Mistral.forward`."""
        assert len(self) + len(places) <= self.rows, "more texts than rows"
        first, lengths = len(self), [len(own) for own in places]
        self._grow(max(lengths))
        self.lengths += lengths
        # Of a text longer than the ring, the newest tokens.
        kept = [min(length, self.slots) for length in lengths]
        place_N = torch.cat([own[-count:] for own, count in zip(places, kept, strict=True)])
        slot_N = torch.cat(
            [torch.arange(length - count, length) % self.slots for length, count in zip(lengths, kept, strict=True)]
        )
        row_N = torch.arange(first, len(self)).repeat_interleave(torch.tensor(kept))
        place_N, slot_N, row_N = (index.to(self._buffers[0].device) for index in (place_N, slot_N, row_N))
        attended = attention_by(work, backend)

        def attend(layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
            self._buffers[layer][:, row_N, slot_N] = torch.stack((key_TKE[place_N], value_TKE[place_N]))
            return attended(layer, query_THE, key_TKE, value_TKE)

        return attend

    def writing(self) -> Attend:
        """Attention of one new token of each row in use, at position `lengths` of its text, in the order of the rows.

        Tokens behind the rows in use are padding: they see nothing.
        Raises: ValueError where there is no window and a text outgrows max_position_embeddings.
        """
        longest = max(self.lengths) + 1
        if self.window is None and longest > self.capacity:
            raise ValueError(
                f"text of {longest} tokens: the model's max_position_embeddings is {self.capacity}; shorten the text"
            )
        self._grow(longest)
        rows, device = len(self), self._buffers[0].device
        position_B = torch.tensor(self.lengths)
        row_B, slot_B = torch.arange(rows).to(device), (position_B % self.slots).to(device)
        count_B = (position_B + 1).clamp(max=self.slots).int().to(device)
        most = min(longest, self.slots)
        self.lengths = [length + 1 for length in self.lengths]

        def attend(layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
            buffer_PRCKE = self._buffers[layer]
            buffer_PRCKE[:, row_B, slot_B] = torch.stack((key_TKE[:rows], value_TKE[:rows]))
            key_BCKE, value_BCKE = buffer_PRCKE[:, :rows]
            out_BHE = decode_rows_attention(query_THE[:rows], key_BCKE, value_BCKE, count_B, most)
            return torch.cat((out_BHE, torch.zeros_like(query_THE[rows:])))

        return attend

    def remove(self, row: int) -> None:
        """Forget a row's text; the last row in use moves into its place."""
        last = len(self) - 1
        used = min(self.lengths[last], self.slots)
        if row != last:
            for buffer_PRCKE in self._buffers:
                buffer_PRCKE[:, row, :used] = buffer_PRCKE[:, last, :used]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def _grow(self, needed: int) -> None:
        """Grow to at least `needed` slots, or the capacity. Rings below their capacity never wrap, so p % slots stays true."""
        needed = min(needed, self.capacity)
        if needed <= self.slots:
            return
        grown = min(self.capacity, max(_FIRST_SLOTS, 2 * self.slots, needed))
        for layer, buffer_PRCKE in enumerate(self._buffers):
            # Zeros: where slots hold nothing yet, masked products must not meet what memory happened to hold.
            larger = buffer_PRCKE.new_zeros((*buffer_PRCKE.shape[:2], grown, *buffer_PRCKE.shape[3:]))
            larger[:, :, : buffer_PRCKE.shape[2]] = buffer_PRCKE
            self._buffers[layer] = larger
