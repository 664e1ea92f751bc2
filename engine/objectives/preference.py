"""Preference tuning without a reward model.

sigmoid: DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7); with label smoothing, conservative DPO
    (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3).
ipo: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; sums of log-probabilities, as in the paper.
ipo-mean: the same on means per answer token, as its authors later advised and other trainers compute under the name of ipo.
hinge: SLiC-HF's rank loss on DPO's margin (Zhao et al. 2023, https://arxiv.org/abs/2305.10425; Liu et al. 2023,
    https://arxiv.org/abs/2309.06657, table 1).

Shapes: P pairs, D = 2P documents: chosen at even places, rejected at odd ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batches import Batch, Step
from engine.objectives.scoring import answer_lengths, document_log_probs, embedding_noise, token_log_probs
from engine.settings.sections import PreferenceSettings
from model.mistral import Mistral


def preference_loss(margin_P: Tensor, settings: PreferenceSettings) -> Tensor:
    """Loss of each pair: [P].

    Args: margin_P: log-ratio of policy to reference of the chosen answer, less that of the rejected one.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss == "sigmoid":
        agree, differ = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
        return -(1 - smoothing) * agree - smoothing * differ
    if settings.loss == "hinge":
        return torch.relu(1 - beta * margin_P)
    return (margin_P - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class Preference:
    """Mean preference loss over the pairs of a global step.

    reference: for each source of the run, [pairs, 2] float32 log-probabilities of (chosen, rejected) of all its pairs under the
    frozen reference model, computed once before training (`engine.objectives.reference`).
    """

    settings: PreferenceSettings
    reference: Sequence[Tensor]
    neftune_alpha: float = 0.0
    seed: int = 0
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]:
        """This micro-batch's part of the step's values; parts add up over micro-batches and ranks.

        "loss", and TRL's metrics: rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}, means over pairs.
        """
        assert batch.pair_D is not None
        loss_P, policy_D, ratio_D = self._scored(model, batch, step)
        # A filler pair, which a rank without work runs, has no weight and must not count.
        real_P = (batch.pair_D[0::2] >= 0).to(ratio_D.dtype)

        def mean(values_P: Tensor) -> Tensor:
            return (values_P * real_P).sum() / step.pairs

        reward_D = self.settings.beta * ratio_D.detach()
        chosen_P, rejected_P = reward_D[0::2], reward_D[1::2]
        return {
            "loss": mean(loss_P),
            "rewards/chosen": mean(chosen_P),
            "rewards/rejected": mean(rejected_P),
            "rewards/margins": mean(chosen_P - rejected_P),
            "rewards/accuracies": mean((chosen_P > rejected_P).to(reward_D.dtype)),
            "logps/chosen": mean(policy_D.detach()[0::2]),
            "logps/rejected": mean(policy_D.detach()[1::2]),
        }

    def losses(self, model: Mistral, batch: Batch, step: Step) -> Tensor:
        """Loss of each pair: [pairs of the batch]."""
        return self._scored(model, batch, step)[0]

    def _scored(self, model: Mistral, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair [P]; the policy's log-probability of each document, and less that of the reference [D]."""
        alpha = self.neftune_alpha if model.training else 0.0
        noise = embedding_noise(batch, alpha=alpha, seed=self.seed, step=step.index)
        policy_D = document_log_probs(token_log_probs(model, batch, noise), batch)
        ratio_D = policy_D - self._reference_of(batch)
        scored_D = ratio_D / answer_lengths(batch) if self.settings.loss == "ipo-mean" else ratio_D
        return preference_loss(scored_D[0::2] - scored_D[1::2], self.settings), policy_D, ratio_D

    def _reference_of(self, batch: Batch) -> Tensor:
        """The reference's log-probability of each document, 0 for a filler's: [D]."""
        device = batch.document_D.device
        if device not in self._tables:
            # On the device once for the whole run: a look-up on the host would wait for the device in every step.
            self._tables[device] = torch.cat([table.flatten() for table in self.reference]).to(device)
        # Documents are numbered through the sources as the rows and sides of these tables are.
        values_D = self._tables[device][batch.document_D.clamp(min=0)]
        return values_D.masked_fill(batch.document_D < 0, 0.0)


def reference_log_probs(
    model: Mistral, batches: Sequence[Batch], pairs: int, progress: Callable[[int], object] = lambda tokens: None
) -> Tensor:
    """Log-probabilities of both answers of each pair under the model as it is: float32 [pairs, 2], NaN where not in `batches`.

    The same functions as in training score them, so before the first update every margin is 0 up to rounding.
    """
    table = torch.full((pairs, 2), torch.nan)
    device = model.lm_head.weight.device
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            assert batch.pair_D is not None
            on_device = batch.to(device)
            scores_D = document_log_probs(token_log_probs(model, on_device), on_device)
            pair_P, scores_P2 = batch.pair_D[0::2], scores_D.float().cpu().view(-1, 2)
            # A filler's pair is none.
            table[pair_P[pair_P >= 0]] = scores_P2[pair_P >= 0]
            progress(batch.tokens)
    model.train(training)
    return table
