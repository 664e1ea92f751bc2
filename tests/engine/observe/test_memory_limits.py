"""A plan above the device's memory is refused with settings that fit; out of memory, a run ends with one message."""

import re

import pytest
import torch

import engine.loop
from engine.distributed.ranks import Ranks
from engine.observe import memory_limits
from engine.observe.memory_limits import check_memory
from engine.run import open_run
from recipes import dpo, pretrain, sft
from recipes.command import command
from recipes.pretrain import PretrainSettings

PROPOSAL = re.compile(r"([a-z_.0-9]+) = (\"?[\w.]+\"?)")


@pytest.fixture
def run_of(tiny_settings, tmp_path):
    def run(stage="pretrain", **changes):
        kinds = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}
        return open_run(tiny_settings(stage, tmp_path / "run", **changes), (kinds[stage],))

    return run


@pytest.fixture
def memory(monkeypatch):
    """memory(bytes): let this machine have so much."""
    return lambda size: monkeypatch.setattr(memory_limits, "host_memory", lambda: (size, size))


def test_a_plan_above_the_machines_memory_is_refused_with_settings_that_fit(run_of, memory):
    run = run_of(recompute="none", pack_tokens=512)
    peak = run.planned.peak
    memory(peak)
    assert check_memory(run) == []
    limit = int(peak * 0.8)
    memory(limit)
    with pytest.raises(
        ValueError, match=r"the memory plan takes .* MiB, this machine's memory has .* MiB: activations"
    ) as refused:
        check_memory(run)
    text = str(refused.value)
    assert "\n" not in text
    assert "or start anyway (--force)" in text
    proposals = text.split("these would fit: ")[1].split("; or start")[0].split(", or ")
    assert proposals
    for proposal in proposals:
        changes = {"recompute": "none", "pack_tokens": 512}
        for name, value in PROPOSAL.findall(proposal):
            section, _, key = name.rpartition(".")
            given = int(value) if value.isdigit() else value.strip('"')
            changes |= {section: {key: given}} if section else {key: given}
        assert run_of(**changes).planned.peak <= limit, proposal


def test_force_starts_all_the_same(run_of, memory):
    memory(1000)
    (line,) = check_memory(run_of(force=True))
    assert line.startswith("warning    the memory plan takes")
    assert "going on because of force" in line
    with pytest.raises(ValueError, match="no setting is lean enough: use more GPUs"):
        check_memory(run_of())
    memory(0)
    assert check_memory(run_of()) == [], "an unknown limit refuses nothing"


def test_the_refusal_comes_at_a_dry_run_too_and_after_the_plan(tiny_settings, tmp_path, memory, capsys):
    memory(1000)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="the memory plan takes"):
            pretrain.run(tiny_settings("pretrain", tmp_path / "run", dry_run=dry_run))
        assert "memory     " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_ranks_of_a_machine_share_its_memory_and_all_refuse(run_of, memory, monkeypatch):
    run = run_of()
    memory(run.planned.peak * 2 - 1)
    assert check_memory(run) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the memory plan takes"):
        check_memory(run)
    memory(run.planned.peak * 2)
    # This rank has enough, another has not.
    monkeypatch.setattr(Ranks, "gather", lambda ranks, mine: [*mine, (5, 2**30, 2**30 - 5)])
    with pytest.raises(ValueError, match=r"the memory plan takes 1.0 GiB"):
        check_memory(run)


def test_a_gpus_limit_is_what_it_has_free_and_what_this_process_holds(run_of, monkeypatch):
    run = run_of()
    object.__setattr__(run, "ranks", Ranks(torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 23)
    assert memory_limits._limit(run) == 123


ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
    "numpy": lambda: MemoryError("Unable to allocate 8.00 EiB"),
    "cpu": None,
}


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("pretrain", "cuda"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("pretrain", "cpu"), ("pretrain", "numpy"), ("dpo", "cuda"))
        ),
    ],
)
def test_out_of_memory_ends_with_the_plan_and_what_would_fit(tiny_settings, tmp_path, monkeypatch, kind, stage):
    accumulate = engine.loop.accumulate

    def exhausted(model, objective, step):
        if step.index == 3:
            raise ERRORS[kind]() if ERRORS[kind] else _refused_by_torch()
        return accumulate(model, objective, step)

    def _refused_by_torch():
        try:
            torch.empty(2**60)
        except RuntimeError as error:
            return error

    monkeypatch.setattr(engine.loop, "accumulate", exhausted)
    recipe = {"pretrain": pretrain, "dpo": dpo}[stage]
    settings = tiny_settings(
        stage, tmp_path / "run", heldout=[], checkpoint_every=2, recompute="none", log={"tensorboard": False}
    )
    with pytest.raises(MemoryError) as ended:
        recipe.run(settings)
    text = str(ended.value)
    assert re.match(r"out of memory on this machine's memory \(.+\); the plan takes .* MiB in the .*: ", text)
    assert "these would fit: " in text
    assert "the last complete checkpoint is intact: start again to continue from it" in text
    # The run has begun: it cannot change its moments any more.
    assert "optimizer.moments" not in text
    assert "\n" not in text
    monkeypatch.setattr(engine.loop, "accumulate", accumulate)
    assert recipe.run(settings).name == "step-00000006"


def test_the_command_prints_the_message_without_a_traceback(tmp_path, tiny_settings):
    def run(settings):
        raise MemoryError("out of memory on a GPU")

    from engine.settings.toml import to_toml

    file = tmp_path / "run.toml"
    file.write_text(to_toml(tiny_settings("pretrain", tmp_path / "run")), encoding="utf-8")
    with pytest.raises(SystemExit, match="error: out of memory on a GPU"):
        command(PretrainSettings, run, [str(file)], "prog")


def test_other_errors_keep_their_own_words(tiny_settings, tmp_path, monkeypatch):
    def broken(model, objective, step):
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine.loop, "accumulate", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        sft.run(tiny_settings("sft", tmp_path / "run", heldout=[]))
