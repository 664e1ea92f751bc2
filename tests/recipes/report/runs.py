"""Run folders made for tests of the report."""

import json
import math
import random
from pathlib import Path

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>日本語"


def write_run(folder: Path, steps=40, *, seed=0, peak=1e-3, older=False, pairs=False) -> Path:
    """A run with evaluations every 10 steps, a step that is not finite (5), a spike (7) and a last line that is cut short.

    older: without the fields that tell tokens, time and epoch.
    """
    rng, lines = random.Random(seed), []
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        lost = step == 5
        line = {
            "step": step,
            "learning_rate": peak * (1 - step / steps),
            "tokens": 100,
            "loss": None if lost else 1 + 8 / step + 0.1 * rng.random() + 3 * (step == 7),
            "gradient_norm": None if lost else 0.5 + rng.random(),
            "tokens_per_second": 50.0,
            "tokens_per_second_per_gpu": 50.0,
            "step_seconds": 2.0,
            "mfu": None,
            "of_ceiling": None,
            "memory_peak_rss_gib": 0.5,
            "memory_planned_gib": 0.25,
        }
        if lost:
            line["skipped"] = 1.0
        if pairs:
            margin = rng.random() * step / steps
            line |= {"rewards/chosen": margin, "rewards/rejected": 0.0, "rewards/margins": margin, "rewards/accuracies": 0.75}
        if not older:
            line |= {"tokens_seen": 100 * step, "wall_seconds": 3.0 * step, "epoch": step / steps}
        lines.append(line)
        if step == 1 or step % 10 == 0:
            at = 0 if step == 1 else step
            values = {"eval/chat-heldout/loss": 2 + 5 * math.exp(-at / 10), "scores/sums/exact": at / steps}
            lines.append({"step": at, **values})
            lines.append(
                {"step": at, "samples": [{"prompt": EVIL, "answer": f"{EVIL} {at}"}, {"prompt": "2 + 3?", "answer": "5"}]}
            )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 41, "lo', encoding="utf-8")
    documents = [{"source": "data/chat", "document": number, "start": 0, "tokens": 20} for number in range(3)]
    spikes = [
        {"step": 5, "loss": None, "gradient_norm": None, "median": None, "deviations": None, "documents": documents},
        {"step": 7, "loss": 5.2, "gradient_norm": 1.0, "median": 2.1, "deviations": 12.5, "documents": documents},
    ]
    (folder / "spikes.jsonl").write_text("".join(json.dumps(spike) + "\n" for spike in spikes), encoding="utf-8")
    settings = (
        f'model = "preset:tiny"\nseed = {seed}\nsteps = {steps}\n[optimizer]\nclip_norm = 1.0\n[schedule]\npeak = {peak}\n'
    )
    (folder / "config.toml").write_text(settings + '[[sources]]\npath = "data/chat"\n', encoding="utf-8")
    return folder
