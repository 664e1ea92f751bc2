"""Settings that are proposed for a run that does not fit: they fit, they are few, and the run may change them."""

from dataclasses import replace

import pytest
import torch

from engine.estimate.fitting import PACK, fitting_settings
from engine.estimate.memory import Training, plan
from engine.settings.sections import OptimizerSettings
from kernels import TILE
from model.config import preset

GIB = 2**30


def shisa(**changes) -> Training:
    """A micro-batch of 8,192 tokens of Shisa 7B on a GPU."""
    usual = {
        "config": preset("shisa-7b"),
        "dtype": torch.bfloat16,
        "optimizer": OptimizerSettings(gradients="float32"),
        "recompute": "light",
        "tokens": 8192,
        "rows": 8192,
        "accumulates": True,
        "log_probs": False,
        "kernels": True,
    }
    return Training(**{**usual, **changes})


def within(limit: int):
    return lambda found: found.peak <= limit


def planned_again(training: Training, settings: dict[str, str]) -> int:
    """The peak under proposed settings, each put in its place by hand."""
    for name, text in settings.items():
        value = text.strip('"')
        if name == PACK:
            tokens = int(value)
            training = replace(training, tokens=tokens, rows=tokens, accumulates=True)
        elif name.startswith("optimizer."):
            training = replace(training, optimizer=replace(training.optimizer, **{name.split(".")[1]: value}))
        elif name == "recompute":
            training = replace(training, recompute=value)
        elif name == "fp8.keep_weights":
            training = replace(training, keep_codes=False)
        elif name == "parallel.reshard":
            training = replace(training, reshard=True)
        else:
            assert (name, value) == ("parallel.reduce_once", "false")
            training = replace(training, reduce_once=False)
    return plan(training).peak


@pytest.mark.parametrize(
    ("training", "gib", "expected"),
    [
        # Moments in bfloat16 or on the host save 29.7 GiB and 59.3 GiB; recomputing alone saves less than 20 GiB.
        (shisa(), 120, ["optimizer.offload", "optimizer.moments"]),
        (shisa(), 79, ["optimizer.offload"]),
        (shisa(shards=8, reshard=False), 45, ["parallel.reshard"]),
        (shisa(shards=8, reduce_once=True), 45, ["parallel.reduce_once"]),
        (shisa(fp8_layers=range(1, 31), optimizer=OptimizerSettings(moments="bfloat16")), 105, ["fp8.keep_weights"]),
    ],
    ids=["120", "79", "reshard", "once", "fp8"],
)
def test_proposals_fit_and_the_ones_that_must_be_there_are(training, gib, expected):
    assert plan(training).peak > gib * GIB
    found = fitting_settings([training], within(gib * GIB), least=4096, fresh=True)
    assert set(expected) <= {name for fitting in found for name in fitting.settings}
    assert 1 <= len(found) <= 3
    for fitting in found:
        assert fitting.peak <= gib * GIB
        assert planned_again(training, fitting.settings) == fitting.peak


def test_no_proposal_changes_more_than_is_needed():
    """79 GiB need no more than two changes; nothing is proposed that one of its parts would do."""
    for gib in (130, 110, 90, 79, 70):
        found = fitting_settings([shisa()], within(gib * GIB), least=4096, fresh=True)
        for fitting in found:
            for name in fitting.settings:
                fewer = {other: value for other, value in fitting.settings.items() if other != name}
                assert planned_again(shisa(), fewer) > gib * GIB, (gib, fitting)


def test_the_micro_batch_is_the_largest_that_fits():
    training = shisa(optimizer=OptimizerSettings(moments="bfloat16", gradients="float32"), tokens=16384, rows=16384)
    limit = plan(replace(training, tokens=12288, rows=12288)).peak
    (fitting,) = [
        found for found in fitting_settings([training], within(limit), least=4096, fresh=False) if [*found.settings] == [PACK]
    ]
    assert int(fitting.settings[PACK]) == 12288
    larger = 12288 + TILE
    assert plan(replace(training, tokens=larger, rows=larger)).peak > limit


def test_a_run_that_goes_on_keeps_its_moments():
    found = fitting_settings([shisa()], within(110 * GIB), least=8192, fresh=False)
    assert found
    for fitting in found:
        assert not {"optimizer.moments", "optimizer.gradients", PACK} & fitting.settings.keys()


def test_nothing_is_proposed_where_nothing_is_lean_enough():
    assert fitting_settings([shisa()], within(20 * GIB), least=4096, fresh=True) == []
