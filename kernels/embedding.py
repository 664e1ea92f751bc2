"""Embedding look-up with NEFTune noise (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

While training, NEFTune adds uniform noise on (-1, 1) times alpha / sqrt(L D) to the embedding of each token of an L-token
document. L is the document's own length, not the packed row's: scaling by the row makes the noise several times too weak.

Shapes: T tokens, V vocabulary, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import accumulation_dtype
from kernels.philox import philox, uniform_symmetric


@dataclass(frozen=True)
class EmbeddingNoise:
    """NEFTune noise of one micro-batch, keyed by what each token is and not by where it lies.

    alpha: the paper's scale (5, 10 or 15). seed, step: the run's seed and optimizer step, 32 bits of each are used.
    document_T int64: stable id of the document. position_T int64: place in the whole document (below 2^32).
    length_T int64: tokens of the whole document.
    """

    alpha: float
    seed: int
    step: int
    document_T: Tensor
    position_T: Tensor
    length_T: Tensor

    def scale_T(self, width: int) -> Tensor:
        """alpha / sqrt(L D) of each token, float32."""
        return (self.alpha / math.sqrt(width) * self.length_T.to(torch.float64).rsqrt()).to(torch.float32)


def embedding(tokens_T: Tensor, weight_VD: Tensor, noise: EmbeddingNoise | None = None) -> Tensor:
    """Rows of the embedding matrix, with NEFTune noise where given.

    Args: tokens_T integer [T], 0 <= token < V; weight_VD floating [V, D].
    Returns: [T, D] in the dtype of `weight_VD`; noise is added in float32 and the sum rounded once. The noise has no gradient.
    """
    return embedding_reference(tokens_T, weight_VD, noise)


def embedding_reference(tokens_T: Tensor, weight_VD: Tensor, noise: EmbeddingNoise | None = None) -> Tensor:
    hidden_TD = F.embedding(tokens_T, weight_VD)
    if noise is None:
        return hidden_TD
    wide = hidden_TD.to(accumulation_dtype(hidden_TD.dtype))
    return (wide + noise_reference(noise, weight_VD.shape[1])).to(hidden_TD.dtype)


def noise_reference(noise: EmbeddingNoise, width: int) -> Tensor:
    """The noise itself, float32 [T, D]. Word w of counter (column / 4, position, document low, document high) under the key
    (seed, step) is the noise of column 4 * (column / 4) + w."""
    group = torch.arange((width + 3) // 4, dtype=torch.int64, device=noise.position_T.device)[None, :]
    document_T, mask = noise.document_T.to(torch.int64)[:, None], 0xFFFFFFFF
    position_T = noise.position_T.to(torch.int64)[:, None]
    words = philox((group, position_T, document_T & mask, (document_T >> 32) & mask), (noise.seed & mask, noise.step & mask))
    uniform_TD = uniform_symmetric(torch.stack(words, dim=-1).flatten(1)[:, :width])
    return uniform_TD * noise.scale_T(width)[:, None]
