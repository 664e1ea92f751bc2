"""Preference tuning without a reward model.

sigmoid: DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7); with label smoothing, conservative DPO
    (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3).
sigmoid-mean: the same on means per answer token (length-normalised DPO; Meng et al. 2024, table 3).
robust: DPO whose expectation over flipped labels is the loss of the true labels (Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409, equation 12).
ipo: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; sums of log-probabilities, as in the paper.
ipo-mean: the same on means per answer token, as its authors later advised and other trainers compute under the name of ipo.
hinge: SLiC-HF's rank loss on DPO's margin (Zhao et al. 2023, https://arxiv.org/abs/2305.10425; Liu et al. 2023,
    https://arxiv.org/abs/2309.06657, table 1).
apo-zero, apo-down: anchored preference optimization (D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266). zero raises
    the chosen answer and lowers the rejected one; down lowers both, the rejected one more.
simpo: Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6; means per answer token, no reference model.

The SFT term, for each of them: Pang et al. 2024, https://arxiv.org/abs/2404.19733, equation 1, per answer token.

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


def preference_loss(
    chosen_P: Tensor,  # log-ratio of policy to reference; without a reference, the policy's log-probability
    rejected_P: Tensor,
    settings: PreferenceSettings,
) -> Tensor:
    """Loss of each pair without the SFT term: [P]. Where `settings.averages`, the arguments are means per answer token."""
    beta, smoothing, margin_P = settings.beta, settings.label_smoothing, chosen_P - rejected_P
    match settings.loss:
        case "ipo" | "ipo-mean":
            return (margin_P - 1 / (2 * beta)).square()
        case "hinge":
            return torch.relu(1 - beta * margin_P)
        case "apo-zero":
            return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)
        case "apo-down":
            return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(beta * margin_P)
    lead_P = beta * margin_P - settings.target_margin
    agree_P, differ_P = F.logsigmoid(lead_P), F.logsigmoid(-lead_P)
    if settings.loss == "robust":
        return (smoothing * differ_P - (1 - smoothing) * agree_P) / (1 - 2 * smoothing)
    return -(1 - smoothing) * agree_P - smoothing * differ_P


@dataclass(frozen=True, eq=False)
class Preference:
    """Mean preference loss over the pairs of a global step.

    reference: for each source of the run, [pairs, 2] float32 log-probabilities of (chosen, rejected) of all its pairs under the
    frozen reference model, computed once before training (`engine.objectives.reference`). Losses without a reference ignore it.
    """

    settings: PreferenceSettings
    reference: Sequence[Tensor] = ()
    neftune_alpha: float = 0.0
    seed: int = 0
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]:
        """This micro-batch's part of the step's values; parts add up over micro-batches and ranks.

        "loss", and TRL's metrics: rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}, means over pairs; with
        an SFT term also "nll", its part before the weight.
        """
        assert batch.pair_B is not None
        loss_P, nll_P, policy_B, reward_B = self._scored(model, batch, step)
        # A rank without work runs a filler pair, which must not count.
        real_P = (batch.pair_B[0::2] >= 0).to(reward_B.dtype)

        def mean(values_P: Tensor) -> Tensor:
            return (values_P * real_P).sum() / step.pairs

        chosen_P, rejected_P = reward_B[0::2], reward_B[1::2]
        nll = {"nll": mean(nll_P.detach())} if self.settings.sft_weight else {}
        return nll | {
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

    def _scored(self, model: Mistral, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss of each pair [P], NLL a token of its chosen answer [P], the policy's log-probability of each document [B], the
        document's reward without a gradient [B])."""
        alpha = self.neftune_alpha if model.training else 0.0
        noise = embedding_noise(batch, alpha=alpha, seed=self.seed, step=step.index)
        policy_B = document_log_probs(token_log_probs(model, batch, noise), batch)
        lengths_B = answer_lengths(batch)
        ratio_B = policy_B - self._reference_of(batch) if self.settings.has_reference else policy_B
        scored_B = ratio_B / lengths_B if self.settings.averages else ratio_B
        loss_P = preference_loss(scored_B[0::2], scored_B[1::2], self.settings)
        nll_P = -policy_B[0::2] / lengths_B[0::2]
        if self.settings.sft_weight:
            loss_P = loss_P + self.settings.sft_weight * nll_P
        # TRL's rewards are of sums; those of SimPO are of means.
        reward_B = scored_B if not self.settings.has_reference else ratio_B
        return loss_P, nll_P, policy_B, self.settings.beta * reward_B.detach()

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
