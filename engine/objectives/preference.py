"""Preference tuning without a reward model.

sigmoid: DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7); with label smoothing, conservative DPO
    (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3).
ipo: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; sums of log-probabilities, as in the paper.
ipo-mean: the same on means per answer token, as its authors later advised and other trainers compute under the name of ipo.
hinge: SLiC-HF's rank loss on DPO's margin (Zhao et al. 2023, https://arxiv.org/abs/2305.10425; Liu et al. 2023,
    https://arxiv.org/abs/2309.06657, table 1).

Shapes: T tokens, P pairs, B = 2P documents: the chosen sides at even indices, the rejected sides at odd indices.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batch import Batch, Step
from engine.objectives.scoring import answer_lengths, document_log_probs, embedding_noise, token_log_probs
from engine.settings.sections import PreferenceSettings
from model.mistral import Mistral


def preference_loss(margin_P: Tensor, settings: PreferenceSettings) -> Tensor:
    """Loss of each pair: [P].

    Args: margin_P: the chosen answer's log-ratio of policy to reference, minus the rejected answer's.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss == "sigmoid":
        agree, differ = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
        return -(1 - smoothing) * agree - smoothing * differ
    if settings.loss == "hinge":
        return torch.relu(1 - beta * margin_P)
    return (margin_P - 1 / (2 * beta)).square()


@dataclass(frozen=True, eq=False)
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
        assert batch.pair_B is not None
        loss_P, policy_B, ratio_B = self._scored(model, batch, step)
        # A rank without work runs a filler pair, which must not count.
        real_P = (batch.pair_B[0::2] >= 0).to(ratio_B.dtype)

        def mean(values_P: Tensor) -> Tensor:
            return (values_P * real_P).sum() / step.pairs

        reward_B = self.settings.beta * ratio_B.detach()
        chosen_P, rejected_P = reward_B[0::2], reward_B[1::2]
        return {
            "loss": mean(loss_P),
            "rewards/chosen": mean(chosen_P),
            "rewards/rejected": mean(rejected_P),
            "rewards/margins": mean(chosen_P - rejected_P),
            "rewards/accuracies": mean((chosen_P > rejected_P).to(reward_B.dtype)),
            "logps/chosen": mean(policy_B.detach()[0::2]),
            "logps/rejected": mean(policy_B.detach()[1::2]),
        }

    def losses(self, model: Mistral, batch: Batch, step: Step) -> Tensor:
        """Loss of each pair: [P]."""
        return self._scored(model, batch, step)[0]

    def _scored(self, model: Mistral, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of each pair [P], the policy's log-probability of each document [B], its difference to the reference's [B])."""
        alpha = self.neftune_alpha if model.training else 0.0
        noise = embedding_noise(batch, alpha=alpha, seed=self.seed, step=step.index)
        policy_B = document_log_probs(token_log_probs(model, batch, noise), batch)
        ratio_B = policy_B - self._reference_of(batch)
        scored_B = ratio_B / answer_lengths(batch) if self.settings.loss == "ipo-mean" else ratio_B
        return preference_loss(scored_B[0::2] - scored_B[1::2], self.settings), policy_B, ratio_B

    def _reference_of(self, batch: Batch) -> Tensor:
        """The reference's log-probability of each document, 0 for a filler: [B]."""
        device = batch.document_B.device
        if device not in self._tables:
            # Copied to the device once a run: a look-up on the host would wait for the device in every step.
            self._tables[device] = torch.cat([table.flatten() for table in self.reference]).to(device)
        # A document's id counts through all sources, as the rows and sides of the joined tables do.
        values_B = self._tables[device][batch.document_B.clamp(min=0)]
        return values_B.masked_fill(batch.document_B < 0, 0.0)


def reference_log_probs(
    model: Mistral,
    batches: Iterable[Batch],
    pairs: int,  # of the dataset
    progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Log-probabilities of both answers of each pair under the model: float32 [pairs, 2], NaN for pairs not in `batches`.

    Training scores answers by the same functions, so before the first update every margin is 0 up to rounding.
    """
    table = torch.full((pairs, 2), torch.nan)
    device = model.lm_head.weight.device
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            assert batch.pair_B is not None
            on_device = batch.to(device)
            scores_B = document_log_probs(token_log_probs(model, on_device), on_device)
            pair_P, scores_P2 = batch.pair_B[0::2], scores_B.float().cpu().view(-1, 2)
            real_P = pair_P >= 0  # not a filler
            table[pair_P[real_P]] = scores_P2[real_P]
            progress(batch.tokens)
    model.train(training)
    return table
