"""Samples and scores on several ranks: each rank computes its share with whole weights, and training goes on as before."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra eval")

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "the", "it"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_ranks_answer_as_one(run_ranks, tiny_model, tiny_data, tmp_path, dtype):
    """Seventeen prompts: two ranks answer them in one wave, one rank in two; and a run without samples has the same weights."""
    (tmp_path / "prompts.txt").write_text("".join(f"{'the cat ' * (number % 5 + 1)}\n" for number in range(17)))
    (tmp_path / "choice.yaml").write_text(CHOICE)
    questions = [{"question": f"the {'red ' * (number % 7)}dog", "label": number % 3} for number in range(25)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    evaluate = {"prompts": str(tmp_path / "prompts.txt"), "new_tokens": 6, "tasks": [str(tmp_path / "choice.yaml")]}

    def table(name, **changes):
        return {
            "model": str(tiny_model),
            "out": str(tmp_path / name),
            "sources": [{"path": str(tiny_data.conversations)}],
            "heldout": [str(tiny_data.conversations_heldout)],
            "context_length": 64,
            "pack_tokens": 64,
            "step_size": 256,
            "steps": 4,
            "evaluate_every": 2,
            "device": "cpu",
            "dtype": dtype,
            "schedule": {"peak": 1e-3},
            "log": {"every": 1, "tensorboard": False},
            "parallel": {"timeout": 120.0},
            **changes,
        }

    kept = {"parallel": {"timeout": 120.0, "reshard": False}}
    jobs = {
        "one": {"ranks": 1, "runs": [["sft", table("one", evaluate=evaluate)]]},
        "two": {
            "ranks": 2,
            "runs": [
                ["sft", table("two", evaluate=evaluate)],
                ["sft", table("kept", evaluate=evaluate, **kept)],
                ["sft", table("plain")],
            ],
        },
    }
    for job in run_ranks(jobs).values():
        assert not any(job.codes), job.said[-6000:]
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "kept", "plain")
    }
    samples = {name: {line["step"]: line["samples"] for line in found if "samples" in line} for name, found in lines.items()}
    scores = {
        name: {line["step"]: line["scores/choice/acc"] for line in found if "scores/choice/acc" in line}
        for name, found in lines.items()
    }
    assert samples["two"].keys() == scores["two"].keys() == {0, 2, 4}
    # Before the first step the weights are the same whatever the number of ranks.
    assert samples["two"][0] == samples["one"][0]
    assert scores["two"][0] == scores["one"][0]
    assert samples["kept"] == samples["two"]
    if dtype == "float32":
        assert samples["two"] == samples["one"]
        assert scores["two"] == scores["one"]
    weights = "step-00000004/model-00001-of-00001.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    for line, plain in zip(
        (line for line in lines["two"] if "loss" in line), (line for line in lines["plain"] if "loss" in line), strict=True
    ):
        assert (line["loss"], line["gradient_norm"]) == (plain["loss"], plain["gradient_norm"])
