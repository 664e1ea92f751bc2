"""Preference tuning follows TRL's trainer: same model, same pairs in the same order. Skipped where trl is not installed."""

import json

import pytest
import torch

from engine.run import open_run
from recipes import dpo

STEPS, PAIRS, RATE, BETA = 10, 4, 2e-3, 0.3
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0, "clip_norm": 0.0}
NAMES = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def pairs_in_order(run):
    """The run's pairs, step after step: prompt, chosen and rejected answer as token ids."""
    (data,) = run.datasets
    for step in range(STEPS):
        documents = run.plan.units(step).document.tolist()
        assert len(documents) == 2 * PAIRS
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
            prompt = int(data.prompt_lengths[chosen])
            for side in (chosen, rejected):
                assert data.trained(side).tolist() == [place >= prompt for place in range(len(data.tokens(side)))]
            both = data.tokens(chosen).tolist(), data.tokens(rejected).tolist()
            assert both[0][:prompt] == both[1][:prompt]
            yield {"prompt_ids": both[0][:prompt], "chosen_ids": both[0][prompt:], "rejected_ids": both[1][prompt:]}


def trained_by_trl(model_folder, pairs, out):
    """The logged values of each step of TRL's trainer on tokenised pairs."""
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments, **named):
            return dataset

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    # Rows beyond the pieces are padding, which our softmax leaves out.
    model.resize_token_embeddings(len(tokenizer))
    config = trl.DPOConfig(
        output_dir=str(out),
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta1=ADAMW["beta1"],
        adam_beta2=ADAMW["beta2"],
        adam_epsilon=ADAMW["eps"],
        weight_decay=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        max_length=None,
    )
    trainer = Trainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
def test_margins_follow_trls_trainer(tiny_settings, tiny_model, tmp_path):
    """Within 2 %, as all logged values are. Before the first update every margin is 0."""
    pytest.importorskip("trl", reason="trl is not installed")
    settings = tiny_settings(
        "dpo",
        tmp_path / "run",
        steps=STEPS,
        step_size=PAIRS,
        heldout=[],
        optimizer=ADAMW,
        schedule={"kind": "constant", "peak": RATE},
        preference={"beta": BETA},
        log={"every": 1, "tensorboard": False},
    )
    pairs = list(pairs_in_order(open_run(settings, ("preferences",), share_prompts=True)))
    dpo.run(settings)
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    theirs = trained_by_trl(tiny_model, pairs, tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS
    for line, other in zip(ours, theirs, strict=True):
        print(
            [(round(line[n], 6), round(float(other[n]), 6)) for n in NAMES],
            line["gradient_norm"],
            other["grad_norm"],
            other["learning_rate"],
        )
    for step, (line, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in NAMES:
            assert line[name] == pytest.approx(float(other[name]), rel=0.02, abs=1e-5), (step, name)
    assert abs(ours[0]["rewards/margins"]) < 1e-5
    # The comparison means something: the model has learnt to prefer.
    assert ours[-1]["rewards/margins"] > 0.5
