"""The optimizer: AdamW with float32 masters over a model's parameters."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.distributed.sharding import first_row, local, sum_over_shards
from engine.optim.offload import on_device, pieces_of
from engine.settings.sections import OptimizerSettings
from kernels.adamw import adamw_
from kernels.gradient_norm import gradient_norm

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    The state holds two moments of every parameter. For a bfloat16 parameter it also holds the 16 bits that rounding cut off:
    together they are an exact float32 master. State is sharded as its parameter is. The numbers do not depend on the number of
    shards, except for the order in which the squares of the gradient's norm are added.

    Args: parameters: all of the model's, by name; their order keys the stochastic rounding of moments.
        settings: gradients = auto means parameter here; `open_run` makes the choice. seed: of the rounding.
    Raises: ValueError for a parameter that is neither float32 nor bfloat16, and for float32 gradients of bfloat16 parameters
        with a torch that lacks them.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed
        self.parameters = dict(parameters)
        self.state: dict[str, Tensor] = {}
        self.updates = 0
        self.before_update: Callable[[], None] = lambda: None
        self._stopped: Tensor | None = None
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is {parameter.dtype}: the optimizer trains float32 and bfloat16 parameters")
            for moment in MOMENTS:
                self.state[f"{name}.{moment}"] = self._moment(parameter)
            if parameter.dtype == torch.bfloat16:
                self.state[f"{name}.remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
                if settings.gradients == "float32" and not isinstance(parameter, DTensor):
                    _accumulate_in_float32(parameter)

    @torch.no_grad()
    def step(self, learning_rate: float, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip and clear the gradients and update the parameters. Skips the update if the gradients or `loss` are not finite.

        Args: loss: the step's loss over all ranks.
        Returns: (gradient norm before clipping, 1 if the update was skipped, else 0): float32 scalars on the parameters'
            device.
        """
        parameters = list(self.parameters.values())
        norm = norm_of_gradients(parameters)
        scale, skipped = self._scale(norm, loss)
        self.updates += 1
        self.before_update()
        pieces = self._pieces()
        moments = [[self._flat(f"{name}.{moment}")[part] for moment in MOMENTS] for _, name, part in pieces]
        offloaded = self.settings.offload == "moments"
        # The moments come first, so that the loop's end brings the last of them back.
        for brought, (number, name, part) in zip(
            on_device(moments, norm.device) if offloaded else moments, pieces, strict=True
        ):
            parameter, gradient = self.parameters[name], self.parameters[name].grad
            assert gradient is not None
            adamw_(
                local(parameter).view(-1)[part],
                self._flat(f"{name}.remainder")[part] if f"{name}.remainder" in self.state else None,
                local(gradient).reshape(-1)[part],
                *brought,
                learning_rate=learning_rate,
                betas=(self.settings.beta1, self.settings.beta2),
                eps=self.settings.eps,
                weight_decay=self.settings.weight_decay if parameter.ndim > 1 else 0.0,
                step=self.updates,
                gradient_scale=scale,
                seed=self.seed,
                parameter_id=number,
                first_index=first_row(parameter) * (parameter.numel() // len(parameter)) + part.start,
            )
        for parameter in parameters:
            parameter.grad = None
        if offloaded and norm.is_cuda:
            # A checkpoint reads the moments on the host and would not wait for these copies.
            torch.cuda.current_stream(norm.device).synchronize()
        return norm, skipped

    def _flat(self, name: str) -> Tensor:
        """This rank's part of a tensor of the state, as one row."""
        return local(self.state[name]).view(-1)

    def _pieces(self) -> list[tuple[int, str, slice]]:
        """(number and name of a parameter, part of its elements that is updated at once), in order."""
        found = []
        for number, (name, parameter) in enumerate(self.parameters.items()):
            assert parameter.grad is not None, f"{name} took no part in the step"
            elements = local(parameter).numel()
            parts = pieces_of(elements) if self.settings.offload == "moments" else [slice(0, elements)] if elements else []
            found += [(number, name, part) for part in parts]
        return found

    def _moment(self, parameter: nn.Parameter) -> Tensor:
        dtype = getattr(torch, self.settings.moments)
        if self.settings.offload == "none":
            return torch.zeros_like(parameter, dtype=dtype)
        if isinstance(parameter, DTensor):
            raise ValueError(
                "optimizer.offload = 'moments' is for one rank: several ranks hold a part of the moments each; leave it out"
            )
        # Pinned memory: copies run at the bus's speed and do not block the host.
        return torch.zeros(parameter.shape, dtype=dtype, device="cpu", pin_memory=parameter.is_cuda)

    def _scale(self, norm: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        """(factor of the gradients, -1 to skip the update; 1 if skipped, else 0)."""
        limit = self.settings.clip_norm
        scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        bad = ~norm.isfinite() if loss is None else ~(norm.isfinite() & loss.isfinite())
        if self.settings.nonfinite == "stop":
            bad = self._stopped = bad if self._stopped is None else bad | self._stopped
        return torch.where(bad, -1.0, scale), bad.float()

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Load saved moments and remainders. Raises: ValueError naming a tensor that is missing or does not fit."""
        for name, tensor in self.state.items():
            saved = state.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                found = "missing" if saved is None else f"{list(saved.shape)} {saved.dtype}"
                raise ValueError(f"optimizer state {name}: {found}, the model needs {list(tensor.shape)} {tensor.dtype}")
            tensor.copy_(saved)
        self.updates = updates


def norm_of_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of the whole gradient over all ranks: a float32 scalar on the parameters' device."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    sharded = parameters[0]
    norm = gradient_norm(gradients, sharded.device)
    return sum_over_shards(norm.double().square(), sharded).sqrt().float() if isinstance(sharded, DTensor) else norm


def _accumulate_in_float32(parameter: nn.Parameter) -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise ValueError(f"optimizer.gradients = float32 of bfloat16 parameters needs torch 2.10, this is {torch.__version__}")
    parameter.grad_dtype = torch.float32
