"""A rolling key/value cache for generation: memory is bounded by the sliding window, whatever the length of the text.

A place sees `sliding_window` places, itself included (`kernels.attention`), so nothing older is kept. Each layer has a ring
that grows by doubling until it holds one window; from then on the newest place overwrites the oldest.

Shapes: P = 2 for key and value, T new tokens, H query heads, K key/value heads, E head size, C places that a ring has room for.
"""

import torch
from torch import Tensor

from kernels.attention.decode import decode_attention
from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import AttentionWork, attention_work
from model.config import MistralConfig

_FIRST_ROOM = 256


class KeyValueCache:
    """Keys and values of one text; its `attend` is what `Mistral.forward` takes. For use without gradients.

    Tokens come in order, in chunks of any length, each at the positions len(cache), len(cache) + 1, ... The first chunk is
    attended to as a packed row of one document (`kernels.attention.sliding_window`), later ones beside the ring
    (`kernels.attention.decode`).
    """

    def __init__(
        self, config: MistralConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.window = config.sliding_window
        self.most = config.max_position_embeddings if self.window is None else self.window
        shape = (2, 0, config.num_key_value_heads, config.head_dim)
        self._rings = [
            _Ring(torch.empty(shape, dtype=dtype, device=device), self.most) for _ in range(config.num_hidden_layers)
        ]
        self._work: AttentionWork | None = None

    def __len__(self) -> int:
        """Tokens that went through all layers, forgotten ones included: the position of the next token."""
        return self._rings[-1].seen

    def keep(self, tokens: int) -> int:
        """Forget all but the first tokens, or everything where some of these were overwritten. Returns how many are left."""
        whole = all(ring.seen == tokens or tokens <= ring.seen <= ring.buffer_PCKE.shape[1] for ring in self._rings)
        for ring in self._rings:
            ring.seen = tokens if whole else 0
        return len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all rings: at most 2 * layers * places * K * E * itemsize, places being the window or the maximal length."""
        return sum(ring.buffer_PCKE.nbytes for ring in self._rings)

    def attend(self, layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
        """Attention of T new tokens to those before them and to themselves, within the window; remembers their keys and values.

        Args: query_THE [T, H, E], key_TKE and value_TKE [T, K, E], rotated. Every layer gets the same T, once.
        Returns: [T, H, E] in the dtype of `query_THE`.
        Raises: ValueError when there is no window and the text outgrows max_position_embeddings.
        """
        ring, tokens = self._rings[layer], query_THE.shape[0]
        if self.window is None and ring.seen + tokens > self.most:
            raise ValueError(f"text of {ring.seen + tokens} tokens: the model's max_position_embeddings is {self.most}")
        if ring.seen:
            ring_key_CKE, ring_value_CKE = ring.buffer_PCKE
            out_THE = decode_attention(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, ring.seen, self.window)
        else:
            out_THE = sliding_window_attention(query_THE, key_TKE, value_TKE, work=self._document(tokens, query_THE.device))
        ring.append(torch.stack((key_TKE, value_TKE)))
        return out_THE

    def _document(self, tokens: int, device: torch.device) -> AttentionWork:
        """The lists of one document, made for the first layer and used by all."""
        if self._work is None or self._work.tokens != tokens:
            self._work = attention_work([0, tokens], self.window).to(device)
        return self._work


class _Ring:
    """The newest keys and values of one layer. Once there is room for all that is ever kept, place p lies in slot p % room."""

    def __init__(self, buffer_PCKE: Tensor, most: int) -> None:
        self.buffer_PCKE, self.most, self.seen = buffer_PCKE, most, 0

    def append(self, new_PTKE: Tensor) -> None:
        self._make_room(min(self.seen + new_PTKE.shape[1], self.most))
        room = self.buffer_PCKE.shape[1]
        self.seen += new_PTKE.shape[1]
        kept_PTKE = new_PTKE[:, -room:]
        start = (self.seen - kept_PTKE.shape[1]) % room
        before_end_PTKE, wrapped_PTKE = kept_PTKE[:, : room - start], kept_PTKE[:, room - start :]
        self.buffer_PCKE[:, start : start + before_end_PTKE.shape[1]] = before_end_PTKE
        self.buffer_PCKE[:, : wrapped_PTKE.shape[1]] = wrapped_PTKE

    def _make_room(self, places: int) -> None:
        room = self.buffer_PCKE.shape[1]
        if places <= room:
            return
        # Never more than it may ever hold, so that the last growth ends in a ring whose slots are p % room.
        grown = min(self.most, max(_FIRST_ROOM, 2 * room, places))
        added_PCKE = self.buffer_PCKE.new_empty((2, grown - room, *self.buffer_PCKE.shape[2:]))
        self.buffer_PCKE = torch.cat((self.buffer_PCKE, added_PCKE), dim=1)
