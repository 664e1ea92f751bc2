"""Log-probabilities of a packed micro-batch, the basis of every objective.

Shapes: T tokens, D width, B documents of the batch.
"""

import torch
from torch import Tensor

from engine.data.batch import Batch
from kernels import accumulation_dtype
from kernels.embedding import EmbeddingNoise
from model.mistral import Mistral, attention_by


def token_log_probs(model: Mistral, batch: Batch, noise: EmbeddingNoise | None = None) -> Tensor:
    """Log-probability of each label, float32 [T]; 0 for labels without weight, which never reach the head."""
    return model.log_probs(_hidden(model, batch, noise), batch.labels_T, batch.rows_N)


def mean_nll(model: Mistral, batch: Batch, total_weight: float, noise: EmbeddingNoise | None = None) -> Tensor:
    """sum(weight * -log-probability of the label) / total_weight, a scalar."""
    hidden_TD = _hidden(model, batch, noise)
    # Divide here: the head computes its gradients in the forward pass, before it could know a later factor.
    weight_T = batch.weight_T.to(accumulation_dtype(hidden_TD.dtype)) / total_weight
    return model.nll(hidden_TD, batch.labels_T, batch.rows_N, weight_T)[0]


def _hidden(model: Mistral, batch: Batch, noise: EmbeddingNoise | None) -> Tensor:
    return model(batch.tokens_T, batch.positions_T, attention_by(batch.attention, model.attention_backend), noise)


def document_log_probs(log_prob_T: Tensor, batch: Batch) -> Tensor:
    """Weighted sum over each document's tokens: [B]."""
    return log_prob_T.new_zeros(len(batch.document_B)).index_add(0, batch.document_T, batch.weight_T * log_prob_T)


def answer_lengths(batch: Batch) -> Tensor:
    """Weighted (answer) tokens of each document, at least 1: [B]."""
    return document_log_probs(torch.ones_like(batch.weight_T), batch).clamp(min=1)


def embedding_noise(batch: Batch, *, alpha: float, seed: int, step: int) -> EmbeddingNoise | None:
    """NEFTune noise of a batch at a step, keyed by each token's document and its position there; None for alpha 0.

    A shared prompt gets the chosen side's noise.
    """
    if alpha == 0:
        return None
    return EmbeddingNoise(
        alpha=alpha,
        seed=seed,
        step=step,
        document_T=batch.document_B[batch.document_T],
        position_T=batch.document_start_B[batch.document_T] + batch.positions_T,
        length_T=batch.document_length_B[batch.document_T],
    )
