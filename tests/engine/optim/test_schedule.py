"""Learning-rate schedules against `transformers`, where the definitions agree, and their properties."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.optim.schedule import learning_rate
from engine.settings.sections import ScheduleSettings

PEAK = 2e-4


def theirs(kind, warmup, steps, final_share=0.0):
    """The learning rates of `transformers` for steps 0, 1, ..., steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if kind == "linear":
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    elif kind == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    elif final_share:
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=final_share)
    else:
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("kind", "final_share"), [("cosine", 0.0), ("cosine", 0.1), ("linear", 0.0), ("constant", 0.0)])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (1, 5), (10, 100), (6, 7)])
def test_rates_equal_transformers_except_for_a_warm_up_one_step_ahead(kind, final_share, warmup, steps):
    """Their warm-up begins with a rate of 0, which wastes a step; ours begins with the next rate."""
    expected = theirs(kind, warmup, steps, final_share)
    chosen = ScheduleSettings(kind=kind, peak=PEAK, warmup_steps=warmup, final_share=final_share)
    found = [learning_rate(chosen, step, steps) for step in range(steps)]
    assert found[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-12)
    assert found[warmup:] == pytest.approx(expected[warmup:steps], rel=1e-12)


def test_a_linear_schedule_ends_at_its_final_share():
    chosen = ScheduleSettings(kind="linear", peak=PEAK, final_share=0.25)
    found = [learning_rate(chosen, step, 4) for step in range(5)]
    assert found == pytest.approx([PEAK * share for share in (1.0, 0.8125, 0.625, 0.4375, 0.25)])


@given(
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    share=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_rates_rise_to_the_peak_then_never_rise_and_stay_positive(kind, warmup, steps, share):
    chosen = ScheduleSettings(kind=kind, peak=PEAK, warmup_steps=warmup, final_share=0.0 if kind == "constant" else share)
    rates = [learning_rate(chosen, step, steps) for step in range(steps)]
    top = min(max(warmup - 1, 0), steps - 1)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    # The warm-up reaches the peak up to rounding.
    assert all(a >= b * (1 - 1e-15) for a, b in itertools.pairwise(rates[top:]))
    assert min(rates) > 0
    assert max(rates) <= PEAK * (1 + 1e-12)
    if steps > warmup:
        assert rates[warmup] == PEAK
    assert min(rates[top:]) >= PEAK * chosen.final_share * (1 - 1e-12) or warmup > steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": 0.0}, "schedule.peak = 0.0"),
        ({"peak": float("nan")}, "schedule.peak = nan"),
        ({"warmup_steps": -1}, "schedule.warmup_steps = -1"),
        ({"final_share": 1.5}, "schedule.final_share = 1.5"),
        ({"kind": "constant", "final_share": 0.5}, "final_share has no effect with a constant schedule"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScheduleSettings(**changes)
