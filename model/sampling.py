"""How generation chooses the next token, as settings: loads without torch. `model.generate` applies them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """Divides the scores; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k highest scores, ties with the last included; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751); 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the positive scores, and multiplies the negative scores, of tokens in the prompt or the answer so far
    (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1); 1 changes nothing."""
    max_new_tokens: int = 512
    """Maximal length of the answer."""
    seed: int = 0
    """Seed of the random draws."""

    def __post_init__(self) -> None:
        # Dividing the scores by less would leave the range of float32.
        if not (self.temperature == 0 or 1e-4 <= self.temperature < math.inf):
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or at least 0.0001")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be positive, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}: must lie in [0, 1]; 0 keeps all tokens")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}: must be a positive number; 1 changes nothing")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: must lie in 0 .. 2^63 - 1")
        if self.temperature == 0:
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name} = {getattr(self, name)} has no effect with temperature = 0, which takes the most likely "
                        f"token; leave it at {neutral} or raise the temperature"
                    )
