"""A rolling key/value cache for generation: the sliding window bounds its memory, however long the text.

A token sees `sliding_window` tokens, itself included (`kernels.attention`), so the cache keeps nothing older. Each layer has a
ring buffer, which doubles until it holds one window; from then on the newest token overwrites the oldest.

Shapes: P = 2 for key and value, T new tokens, H query heads, K key/value heads, E head size, C slots of a ring.
"""

import torch
from torch import Tensor

from kernels.attention.decode import decode_attention
from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import AttentionWork, attention_work
from model.config import MistralConfig

_FIRST_SLOTS = 256


class KeyValueCache:
    """Keys and values of one text. Its `attend` is an argument of `Mistral.forward`. For inference only.

    Tokens come in order, in chunks of any length, at positions len(cache), len(cache) + 1, ... The first chunk is attended to
    as one packed document (`kernels.attention.sliding_window`), later chunks read the ring (`kernels.attention.decode`).
    """

    def __init__(
        self,
        config: MistralConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.window = config.sliding_window
        self.capacity = config.max_position_embeddings if self.window is None else self.window
        empty_PCKE = torch.empty((2, 0, config.num_key_value_heads, config.head_dim), dtype=dtype, device=device)
        self._rings = [_Ring(empty_PCKE, self.capacity) for _ in range(config.num_hidden_layers)]
        self._work: AttentionWork | None = None

    def __len__(self) -> int:
        """Tokens that went through all layers, also the overwritten tokens: the position of the next token."""
        return self._rings[-1].seen

    def keep(self, tokens: int) -> int:
        """Forget all but the first tokens; forget everything if some of the first are overwritten. Returns the tokens left."""
        intact = all(ring.seen == tokens or tokens <= ring.seen <= ring.slots for ring in self._rings)
        for ring in self._rings:
            ring.seen = tokens if intact else 0
        return len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all rings: at most 2 * layers * capacity * K * E * itemsize; capacity is the window or, without one,
        max_position_embeddings."""
        return sum(ring.buffer_PCKE.nbytes for ring in self._rings)

    def attend(self, layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
        """Attention of T new tokens to the text so far and to themselves, within the window; stores their keys and values.

        Args: query_THE, key_TKE, value_TKE: queries and keys rotated. Each layer is called once with the same T.
        Returns: [T, H, E] in the dtype of `query_THE`.
        Raises: ValueError when there is no window and the text outgrows max_position_embeddings.
        """
        ring, tokens = self._rings[layer], query_THE.shape[0]
        if self.window is None and ring.seen + tokens > self.capacity:
            raise ValueError(
                f"text of {ring.seen + tokens} tokens: the model's max_position_embeddings is {self.capacity}; shorten the text"
            )
        if ring.seen:
            ring_key_CKE, ring_value_CKE = ring.buffer_PCKE
            out_THE = decode_attention(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, ring.seen, self.window)
        else:
            out_THE = sliding_window_attention(query_THE, key_TKE, value_TKE, work=self._document(tokens, query_THE.device))
        ring.append(torch.stack((key_TKE, value_TKE)))
        return out_THE

    def _document(self, tokens: int, device: torch.device) -> AttentionWork:
        """The work lists of one document; the first layer makes them, the others reuse them."""
        if self._work is None or self._work.tokens != tokens:
            self._work = attention_work([0, tokens], self.window).to(device)
        return self._work


class _Ring:
    """The newest keys and values of one layer: position p lies in slot p % slots."""

    def __init__(self, buffer_PCKE: Tensor, capacity: int) -> None:
        self.buffer_PCKE, self.capacity, self.seen = buffer_PCKE, capacity, 0

    @property
    def slots(self) -> int:
        return self.buffer_PCKE.shape[1]

    def append(self, new_PTKE: Tensor) -> None:
        self._grow(min(self.seen + new_PTKE.shape[1], self.capacity))
        self.seen += new_PTKE.shape[1]
        kept_PTKE = new_PTKE[:, -self.slots :]
        start = (self.seen - kept_PTKE.shape[1]) % self.slots
        before_end_PTKE, wrapped_PTKE = kept_PTKE[:, : self.slots - start], kept_PTKE[:, self.slots - start :]
        self.buffer_PCKE[:, start : start + before_end_PTKE.shape[1]] = before_end_PTKE
        self.buffer_PCKE[:, : wrapped_PTKE.shape[1]] = wrapped_PTKE

    def _grow(self, needed: int) -> None:
        """Grow to at least `needed` slots. A ring below its capacity never wraps, so p % slots stays true."""
        if needed <= self.slots:
            return
        grown = min(self.capacity, max(_FIRST_SLOTS, 2 * self.slots, needed))
        added_PCKE = self.buffer_PCKE.new_empty((2, grown - self.slots, *self.buffer_PCKE.shape[2:]))
        self.buffer_PCKE = torch.cat((self.buffer_PCKE, added_PCKE), dim=1)
