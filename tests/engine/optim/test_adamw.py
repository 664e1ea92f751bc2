"""AdamW over a model's parameters against torch.optim.AdamW, and its state."""

import pytest
import torch
from torch import nn

import engine.optim.adamw
import engine.optim.offload
from engine.estimate.memory import Training, plan
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from model.config import PRESETS

STEPS = 25
CONFIG = PRESETS["tiny"]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 5), "scale": (7,), "large": (300, 4)}
    return {
        name: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for name, s in shapes.items()
    }


def gradients(step, named):
    """Gradients of very different sizes over the steps: some are clipped, others not."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 4 - 3)
        parameter.grad = gradient.to(parameter.dtype)


def rate(step):
    return 3e-3 * (1 + step) / STEPS


@pytest.mark.parametrize(
    ("settings", "clipped"),
    [
        (OptimizerSettings(), {False, True}),
        (OptimizerSettings(beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.5, clip_norm=0.0), {False}),
        (OptimizerSettings(weight_decay=0.0, clip_norm=0.01), {True}),
    ],
)
def test_updates_equal_torchs_in_float64(settings, clipped):
    """Weight decay acts on matrices only; clipping acts on the whole gradient."""
    ours, theirs = parameters(), parameters(torch.float64)
    optimizer = AdamW(ours.items(), settings)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    seen = set()
    for step in range(STEPS):
        gradients(step, ours)
        gradients(step, theirs)
        norm, skipped = optimizer.step(rate(step))
        assert not skipped
        limit = settings.clip_norm or float("inf")
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
        seen.add(bool(expected > limit))
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        for group in reference.param_groups:
            group["lr"] = rate(step)
        reference.step()
        assert all(parameter.grad is None for parameter in ours.values())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.detach().double(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
    assert seen == clipped


def test_bfloat16_parameters_with_masters_follow_float32_parameters_exactly():
    """Parameter and remainder together are the float32 run's parameter."""
    small, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = {name: nn.Parameter(parameter.detach().float()) for name, parameter in wide.items()}
    optimizers = AdamW(small.items(), OptimizerSettings()), AdamW(wide.items(), OptimizerSettings())
    for step in range(STEPS):
        gradients(step, small)
        for name, parameter in wide.items():
            parameter.grad = small[name].grad.float()
        norms = [optimizer.step(1e-4)[0] for optimizer in optimizers]
        assert norms[0] == norms[1]
    for name, parameter in small.items():
        low = optimizers[0].state[f"{name}.remainder"].int() & 0xFFFF
        high = parameter.detach().view(torch.int16).int() - (low >> 15)
        assert torch.equal(((high << 16) | low).view(torch.float32), wide[name].detach())
        # bfloat16 without masters would not have moved: most updates are below half a rounding step.
        assert not torch.equal(wide[name].detach(), parameters(torch.bfloat16)[name].detach().float())


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_another_optimizer_continues_from_the_state(moments):
    settings = OptimizerSettings(moments=moments)
    runs = []
    for split in (STEPS, 9):
        named = parameters(torch.bfloat16)
        optimizer = AdamW(named.items(), settings, seed=3)
        for step in range(STEPS):
            if step == split:
                saved = {name: tensor.clone() for name, tensor in optimizer.state.items()}
                optimizer, updates = AdamW(named.items(), settings, seed=3), optimizer.updates
                optimizer.load(saved, updates)
            gradients(step, named)
            optimizer.step(rate(step))
        runs.append((named, optimizer.state))
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for name, tensor in runs[0][1].items() if "exp_avg" in name} == {getattr(torch, moments)}


def test_the_rounding_of_bfloat16_moments_depends_on_seed_parameter_and_step():
    def moments(seed, updates=0):
        named = {name: nn.Parameter(torch.ones(500)) for name in ("one", "other")}
        optimizer = AdamW(named.items(), OptimizerSettings(moments="bfloat16"), seed)
        optimizer.updates = updates
        for parameter in named.values():
            parameter.grad = torch.full((500,), 0.0123)
        optimizer.step(1e-3)
        return [optimizer.state[f"{name}.exp_avg"] for name in named]

    found = [*moments(1), *moments(2), *moments(1, updates=1)]
    assert all(torch.equal(one, other) for one, other in zip(moments(1), found, strict=False))
    assert len({tuple(tensor.tolist()) for tensor in found}) == len(found)


def test_bfloat16_moments_train_like_float32_moments():
    runs = []
    for moments in ("float32", "bfloat16"):
        named = parameters()
        optimizer = AdamW(named.items(), OptimizerSettings(moments=moments))
        for step in range(STEPS):
            gradients(step, named)
            optimizer.step(rate(step))
        runs.append(named["large"].detach())
    moved = (runs[0] - parameters()["large"].detach()).norm()
    # The relative error of a bfloat16 moment.
    assert 0 < (runs[1] - runs[0]).norm() < 2**-7 * moved


def test_gradients_of_micro_batches_add_up_in_float32():
    sums = {}
    for dtype in ("parameter", "float32"):
        named = {"weight": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
        AdamW(named.items(), OptimizerSettings(gradients=dtype))
        for value in (1.0, *[2.0**-9] * 8):
            (named["weight"] * value).sum().backward()
        sums[dtype] = named["weight"].grad
    # bfloat16 has 8 bits: adding a small gradient to 1 changes nothing.
    assert torch.equal(sums["parameter"], torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(sums["float32"], torch.full((4,), 1 + 2.0**-6))


def test_steps_take_float32_gradients_of_bfloat16_parameters():
    named = parameters(torch.bfloat16)
    optimizer = AdamW(named.items(), OptimizerSettings(gradients="float32"))
    for _ in range(2):
        sum(parameter.float().square().sum() for parameter in named.values()).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in named.values())
        optimizer.step(1e-2)
    assert all(not torch.equal(named[name], start) for name, start in parameters(torch.bfloat16).items() if name != "scale")


def test_a_torch_without_float32_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(engine.optim.adamw, "hasattr", lambda *_: False, raising=False)
    AdamW(parameters().items(), OptimizerSettings(gradients="float32"))
    with pytest.raises(ValueError, match=r"optimizer.gradients = float32 of bfloat16 parameters needs torch 2.10, this is 2"):
        AdamW(parameters(torch.bfloat16).items(), OptimizerSettings(gradients="float32"))


@pytest.mark.parametrize(
    ("dtype", "changes", "size"),
    [
        (torch.bfloat16, {}, 14),
        (torch.bfloat16, {"moments": "bfloat16"}, 10),
        (torch.bfloat16, {"moments": "bfloat16", "gradients": "float32"}, 12),
        (torch.float32, {"gradients": "float32"}, 16),
        (torch.float32, {"moments": "bfloat16"}, 12),
    ],
)
def test_the_planned_bytes_a_parameter_equal_the_states(dtype, changes, size):
    settings = OptimizerSettings(**changes)
    named = parameters(dtype)
    optimizer = AdamW(named.items(), settings)
    sum(parameter.sum() for parameter in named.values()).backward()
    tensors = [*optimizer.state.values(), *named.values(), *(parameter.grad for parameter in named.values())]
    elements = sum(parameter.numel() for parameter in named.values())
    assert sum(tensor.nbytes for tensor in tensors) == size * elements
    items = plan(
        Training(CONFIG, dtype, settings, "light", tokens=128, rows=128, accumulates=True, log_probs=False, kernels=True)
    ).items
    assert items["weights"] + items["optimizer"] + items["gradients"] == size * CONFIG.parameters


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_offloaded_moments_give_the_same_bits(moments, device, monkeypatch):
    ends = []
    monkeypatch.setattr(engine.optim.offload, "PIECE", 64)
    for offload in ("none", "moments"):
        named = {name: nn.Parameter(parameter.detach().to(device)) for name, parameter in parameters(torch.bfloat16).items()}
        optimizer = AdamW(named.items(), OptimizerSettings(moments=moments, offload=offload), seed=3)
        for step in range(5):
            gradients(step, named)
            for parameter in named.values():
                parameter.grad = parameter.grad.to(device)
            optimizer.step(rate(step))
        ends.append(
            {**{name: p.detach().cpu() for name, p in named.items()}, **{n: t.cpu() for n, t in optimizer.state.items()}}
        )
        held = {tensor.device.type for name, tensor in optimizer.state.items() if not name.endswith("remainder")}
        assert held == {"cpu" if offload == "moments" else device.type}
    for name, expected in ends[0].items():
        assert torch.equal(ends[1][name], expected), name


def test_state_that_does_not_fit_is_named():
    optimizer = AdamW(parameters(torch.bfloat16).items(), OptimizerSettings())
    whole = dict(optimizer.state)
    for change, message in [
        ({"scale.exp_avg": None}, r"optimizer state scale.exp_avg: missing, the model needs \[7\] torch.float32"),
        ({"matrix.exp_avg_sq": torch.zeros(5, 6)}, r"optimizer state matrix.exp_avg_sq: \[5, 6\]"),
        ({"large.remainder": torch.zeros(300, 4)}, r"optimizer state large.remainder: .* torch.float32, .* torch.int16"),
    ]:
        state = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            optimizer.load(state, 3)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"matrix is torch.float64: the optimizer trains float32 and bfloat16"):
        AdamW(parameters(torch.float64).items(), OptimizerSettings())


@pytest.mark.parametrize(
    ("name", "value"), [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("weight_decay", -0.1), ("clip_norm", -1.0)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"optimizer.{name} = {value}"):
        OptimizerSettings(**{name: value})
