"""Next-token prediction: continued pre-training (all tokens) and supervised fine-tuning (assistant tokens)."""

from dataclasses import dataclass

from torch import Tensor

from engine.data.batch import Batch, Step
from engine.objectives.scoring import answer_lengths, document_log_probs, embedding_noise, mean_nll, token_log_probs
from kernels.embedding import EmbeddingNoise
from model.mistral import Mistral


@dataclass(frozen=True)
class NextToken:
    """Mean negative log-likelihood over the weighted tokens of a global step.

    neftune_alpha: NEFTune's scale, 0 for none; only used while the model is in training mode. seed: keys the noise.
    """

    neftune_alpha: float = 0.0
    seed: int = 0

    def __call__(self, model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]:
        """This micro-batch's part of the step's values; parts add up over micro-batches and ranks.

        "loss": sum(weight * -log_prob) / weight of the whole step. Dividing by the step's weight instead of the micro-batch's
        gives the same gradient for any split of the step.
        """
        return {"loss": mean_nll(model, batch, step.weight, self._noise(model, batch, step))}

    def losses(self, model: Mistral, batch: Batch, step: Step) -> Tensor:
        """Mean negative log-likelihood over the weighted tokens of each document, 0 for a document without any: [B]."""
        log_prob_T = token_log_probs(model, batch, self._noise(model, batch, step))
        return -document_log_probs(log_prob_T, batch) / answer_lengths(batch)

    def _noise(self, model: Mistral, batch: Batch, step: Step) -> EmbeddingNoise | None:
        alpha = self.neftune_alpha if model.training else 0.0
        return embedding_noise(batch, alpha=alpha, seed=self.seed, step=step.index)
