"""A rolling key/value cache for generation: memory is bounded by the sliding window, whatever the length of the text.

A place sees `sliding_window` places, itself included (`kernels.attention`), so nothing older is kept. Each layer has a ring
that grows by doubling until it holds one window; from then on the newest place overwrites the oldest.

Shapes: P = 2 for key and value, T new tokens, H query heads, K key/value heads, G = H / K query heads of a key/value head,
E head size, J keys that are attended to, C places that a ring has room for.
"""

import torch
from torch import Tensor

from kernels.attention import masked_attention
from model.config import MistralConfig

_FIRST_ROOM = 256


class KeyValueCache:
    """Keys and values of one text; its `attend` is what `Mistral.forward` takes. For use without gradients.

    Tokens come in order, in chunks of any length, each at the positions len(cache), len(cache) + 1, ... A chunk of T tokens
    computes up to T * (window + T) scores a head, so a long prompt takes bounded memory when given in chunks of bounded length.
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
        self._mask_TJ: Tensor | None = None

    def __len__(self) -> int:
        """Tokens that went through all layers, forgotten ones included: the position of the next token."""
        return self._rings[-1].seen

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
        new_PTKE = torch.stack((key_TKE, value_TKE))
        if tokens == 1:
            # The ring then holds exactly what the new place sees; attention does not ask in which order.
            ring.append(new_PTKE)
            key_JKE, value_JKE = ring.stored()
        else:
            key_JKE, value_JKE = torch.cat((ring.newest(self.most - 1), new_PTKE), dim=1)
            ring.append(new_PTKE)
        mask_TJ = self._visible(tokens, key_JKE.shape[0], query_THE.device)
        # The G query heads of a key/value head become G times as many queries of that head, so that no key is copied G times.
        groups = query_THE.shape[1] // key_TKE.shape[1]
        query_KGTE = query_THE.unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
        out_KQE = masked_attention(
            query_KGTE.flatten(1, 2), key_JKE.transpose(0, 1), value_JKE.transpose(0, 1), mask_TJ.repeat(groups, 1)
        )
        return out_KQE.unflatten(1, (groups, tokens)).permute(2, 0, 1, 3).flatten(1, 2)

    def _visible(self, tokens: int, keys: int, device: torch.device) -> Tensor:
        """Which of `keys` consecutive places each of the `tokens` last ones sees. One mask serves all layers."""
        if self._mask_TJ is None or self._mask_TJ.shape != (tokens, keys):
            key_J = torch.arange(keys, device=device)
            age_TJ = key_J[keys - tokens :, None] - key_J
            self._mask_TJ = age_TJ >= 0 if self.window is None else (age_TJ >= 0) & (age_TJ < self.window)
        return self._mask_TJ


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

    def stored(self) -> Tensor:
        """All that is kept, in no particular order: [P, J, K, E]."""
        return self.buffer_PCKE[:, : self.seen]

    def newest(self, places: int) -> Tensor:
        """The last `places` ones, or as many as there are, oldest first: [P, J, K, E]."""
        room = self.buffer_PCKE.shape[1]
        count = min(places, self.seen, room)
        if count == 0:
            return self.buffer_PCKE[:, :0]
        start = (self.seen - count) % room
        end = start + count
        return torch.cat((self.buffer_PCKE[:, start:end], self.buffer_PCKE[:, : max(0, end - room)]), dim=1)

    def _make_room(self, places: int) -> None:
        room = self.buffer_PCKE.shape[1]
        if places <= room:
            return
        # Never more than it may ever hold, so that the last growth ends in a ring whose slots are p % room.
        grown = min(self.most, max(_FIRST_ROOM, 2 * room, places))
        added_PCKE = self.buffer_PCKE.new_empty((2, grown - room, *self.buffer_PCKE.shape[2:]))
        self.buffer_PCKE = torch.cat((self.buffer_PCKE, added_PCKE), dim=1)
