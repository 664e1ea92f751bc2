"""The report of a quickstart: tables in Markdown, everything in JSON, the losses as a drawing."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.folder import write_file
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt
from model.vocabulary.tokenizer import Tokenizer
from recipes.drawing import new_figure, save_figure
from recipes.example.facts import KINDS, LANGUAGES
from recipes.example.text import Example

if TYPE_CHECKING:
    import torch

    from recipes.example.evaluate import Score

FILES = ("report.md", "report.json", "losses.png")
TRAINED = {"base": "base", "cpt": "CPT", "sft1": "SFT 1", "sft2": "SFT 2", "dpo": "DPO"}  # run folder -> name
LANGUAGE_NAMES = {"en": "English", "ja": "Japanese"}
CELLS = [(language, kind) for language in LANGUAGES for kind in KINDS]

LEAST_EXACT = 0.80  # of each language and kind after SFT 2
MOST_ENGLISH_LOSS = 0.05  # of the exact share, by SFT 2


def machine(device: torch.device) -> str:
    """The device, in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()} CPU ({os.cpu_count()} cores)"


def row(entry: dict[str, Any]) -> str:
    """One line about a model, for the console."""
    scores: dict[tuple[str, str], Score] = entry["held_out"]
    cells = "  ".join(f"{LANGUAGE_NAMES[la]} {kind}s {s.exact:.0%}" for (la, kind), s in scores.items())
    return f"held-out questions answered exactly after {entry['model']}: {cells}"


def language_share(scores: dict[tuple[str, str], Score], language: str, value: str) -> float | None:
    """`exact`: share of the language's questions; `polite`: share of its exact answers, None without exact answers."""
    some = [score for (of, _), score in scores.items() if of == language]
    exact = sum(score.exact * score.questions for score in some)
    if value == "exact":
        return exact / sum(score.questions for score in some)
    return sum((score.polite or 0.0) * score.exact * score.questions for score in some) / exact if exact else None


def sample_answers(folder: Path, example: Example, device: torch.device) -> list[dict[str, str]]:
    """Greedy answers to two held-out facts and a sum in each language: `language`, `question`, `answer`."""
    from model.generate import generate
    from model.weights import load_model

    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device=device)
    sampling = Sampling(temperature=0.0, max_new_tokens=40)
    answers = []
    for language in LANGUAGES:
        facts, sums = (
            [question for question in example.held_out if (question.language, question.item.kind) == (language, kind)]
            for kind in KINDS
        )
        for text in (facts[0].text, facts[len(facts) // 2].text, sums[len(sums) // 2].text):
            prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
            ids = list(generate(model, prompt, sampling, stop_ids=(tokenizer.eos_id,)))
            answers.append({"language": language, "question": text, "answer": tokenizer.decode(ids).strip()})
    return answers


def collect(
    example: Example,
    models: list[dict[str, Any]],
    *,
    runs: list[Path],
    vocabulary: dict[str, Any],
    seconds: dict[str, float],
    answers: list[dict[str, str]],
    exported: Path,
    device: torch.device,
    full: bool,
) -> dict[str, Any]:
    """The report as JSON values; `missed` lists the missed targets."""
    import torch

    by_name = {entry["model"]: entry for entry in models}
    curves = {run.name: _curve(run / "metrics.jsonl") for run in runs}
    margins = {when: _last_value(curves["dpo"], "rewards/margins", first=when == "before") for when in ("before", "after")}
    kept, polite = _english_exact(by_name), _polite_shares(by_name)
    return {
        "machine": machine(device),
        "torch": torch.__version__,
        "full": full,
        "questions": {"trained": len(example.trained), "held_out": len(example.held_out), "unseen": len(example.unseen)},
        "models": [
            {
                "model": entry["model"],
                "folder": entry["folder"],
                "asked_as": "chat" if entry["chat"] else "plain text",
                **{name: _cells(entry[name]) for name in ("held_out", "unseen")},
            }
            for entry in models
        ],
        "characters_per_token": {
            Path(name).stem: {"before": values["characters_per_token_before"], "after": values["characters_per_token"]}
            for name, values in vocabulary["heldout"].items()
        },
        "pieces": {"before": vocabulary["base_pieces"], "after": vocabulary["pieces"]},
        "english_exact": kept,
        "reward_margin": margins,
        "polite_share": polite,
        "answers": answers,
        "curves": curves,
        "seconds": {**{name: round(value, 1) for name, value in seconds.items()}, "total": round(sum(seconds.values()), 1)},
        "exported": str(exported),
        "missed": missed_targets(by_name),
    }


def _cells(scores: dict[tuple[str, str], Score]) -> dict[str, dict[str, Any]]:
    return {
        f"{language} {kind}": {
            "questions": score.questions,
            "loss": round(score.loss, 4),
            "exact": round(score.exact, 4),
            "polite": None if score.polite is None else round(score.polite, 4),
        }
        for (language, kind), score in scores.items()
    }


def missed_targets(models: dict[str, dict[str, Any]]) -> list[str]:
    """Each missed target, in words. Args: models: name -> {"held_out": scores} of SFT 1, SFT 2 and DPO."""
    missed = []
    for (language, kind), score in models["SFT 2"]["held_out"].items():
        if score.exact < LEAST_EXACT:
            name = f"{LANGUAGE_NAMES[language]} {kind}s"
            missed.append(f"{name} are {score.exact:.1%} exact after SFT 2, below {LEAST_EXACT:.0%}")
    kept = _english_exact(models)
    lost = kept["SFT 1"] - kept["SFT 2"]
    # A loss of exactly the limit must not fail by a rounding error.
    if lost > MOST_ENGLISH_LOSS + 1e-9:
        missed.append(f"English lost {100 * lost:.1f} points in SFT 2, more than {100 * MOST_ENGLISH_LOSS:.0f}")
    for language, share in _polite_shares(models).items():
        if share["before"] is None or share["after"] is None or share["after"] <= share["before"]:
            missed.append(f"the share of polite {LANGUAGE_NAMES[language]} answers did not rise in DPO")
    return missed


def _english_exact(models: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: language_share(models[name]["held_out"], "en", "exact") or 0.0 for name in ("SFT 1", "SFT 2")}


def _polite_shares(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    stages = {"before": "SFT 2", "after": "DPO"}
    return {
        language: {when: language_share(models[name]["held_out"], language, "polite") for when, name in stages.items()}
        for language in LANGUAGES
    }


def _curve(path: Path) -> dict[str, list[dict[str, float]]]:
    """A run's training values and held-out values, by step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    training = [{"step": line["step"], "loss": line["loss"]} for line in lines if "loss" in line]
    heldout = [
        {"step": line["step"], **{key.split("/", 2)[2]: value for key, value in line.items() if key.startswith("eval/")}}
        for line in lines
        if "loss" not in line
    ]
    return {"training": training, "heldout": heldout}


def _last_value(curve: dict[str, list[dict[str, float]]], name: str, *, first: bool) -> float:
    values = [line[name] for line in curve["heldout"] if name in line]
    return values[0 if first else -1]


def write(out: Path, table: dict[str, Any]) -> None:
    """Write report.json, losses.png (with matplotlib) and report.md into `out`."""
    write_file(out / "report.json", json.dumps(table, ensure_ascii=False, indent=1) + "\n")
    drawn = _draw(out / "losses.png", table["curves"])
    write_file(out / "report.md", "\n".join(markdown(table, drawn)) + "\n")


def markdown(table: dict[str, Any], drawn: bool) -> list[str]:
    """The report as Markdown. Args: drawn: whether losses.png exists."""
    lines = [
        "# Quickstart",
        "",
        f"{table['seconds']['total']:.0f} s on {table['machine']}, torch {table['torch']}. "
        f"Held out: {table['questions']['held_out']} combinations of fact or sum, phrasing and language that are in no "
        f"training data. Training has {table['questions']['trained']} other combinations of the same facts and sums.",
        "",
        "## Held-out questions",
        "",
        *_score_table(table, "held_out"),
        "",
        "Exact: greedy decoding gives an accepted answer, end token included. Loss: -log probability of the accepted answers, "
        "nats per answer, which does not depend on the vocabulary. Models up to CPT continue plain text; later models are "
        "asked through the chat template, where both registers are accepted.",
        "",
        "## Sums never seen, facts never asked about",
        "",
        "No target applies here: these sums are nowhere in the training data, these facts only in statements.",
        "",
        *_score_table(table, "unseen"),
        "",
        "## Vocabulary",
        "",
        f"{table['pieces']['before']:,} pieces before the merge, {table['pieces']['after']:,} after it.",
        "",
        "| held-out text | characters per token before | after |",
        "|---|---:|---:|",
        *(
            f"| {name} | {values['before']:.2f} | {values['after']:.2f} |"
            for name, values in table["characters_per_token"].items()
        ),
        "",
        "## Preference tuning",
        "",
        "| held-out pairs | before DPO | after |",
        "|---|---:|---:|",
        f"| reward margin | {table['reward_margin']['before']:.3f} | {table['reward_margin']['after']:.3f} |",
        *(
            f"| polite share of the exact {LANGUAGE_NAMES[language]} answers | {_percent(share['before'])} | "
            f"{_percent(share['after'])} |"
            for language, share in table["polite_share"].items()
        ),
        "",
        "## Answers of the exported model",
        "",
        *(f"- {answer['question']}  \n  **{answer['answer']}**" for answer in table["answers"]),
        "",
        *(["## Losses", "", "![Training and held-out losses of the five training stages](losses.png)", ""] if drawn else []),
        "## Time",
        "",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {name} | {value:.1f} |" for name, value in _grouped(table["seconds"]).items()),
        "",
        f"Exported model: `{table['exported']}` (`AutoModelForCausalLM.from_pretrained`, or "
        f"`python -m recipes.chat --model {table['exported']}`)",
        "",
    ]
    if not table["full"]:
        return [*lines, "Targets: not checked, because this was a smaller run than the full example."]
    return [*lines, f"Targets: {'all reached' if not table['missed'] else 'MISSED: ' + '; '.join(table['missed'])}."]


def _grouped(seconds: dict[str, float]) -> dict[str, float]:
    """All preparations as one entry, in the place of the first."""
    grouped: dict[str, float] = {}
    for name, value in seconds.items():
        key = "prepare" if name.startswith("prepare_") else name
        grouped[key] = grouped.get(key, 0.0) + value
    return grouped


def _score_table(table: dict[str, Any], questions: str) -> list[str]:
    names = [f"{LANGUAGE_NAMES[language]} {kind}s" for language, kind in CELLS]
    lines = [
        "| after | " + " | ".join(f"{name}: exact | loss" for name in names) + " |",
        "|---|" + "---:|" * (2 * len(names)),
    ]
    for entry in table["models"]:
        cells = [entry[questions].get(f"{language} {kind}") for language, kind in CELLS]
        shown = (f"{_percent(cell['exact'])} | {cell['loss']:.2f}" if cell else "- | -" for cell in cells)
        lines.append(f"| {entry['model']} | " + " | ".join(shown) + " |")
    return lines


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def _draw(path: Path, curves: dict[str, Any]) -> bool:
    figure = new_figure(3.2 * len(curves), 3.2)
    if figure is None:
        return False
    for axes, (folder, curve) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.plot([p["step"] for p in curve["training"]], [p["loss"] for p in curve["training"]], lw=0.8, label="training")
        axes.plot([p["step"] for p in curve["heldout"]], [p["loss"] for p in curve["heldout"]], "o--", label="held-out")
        axes.set(title=TRAINED[folder], xlabel="step", ylim=(0, None))
    figure.axes[0].set_ylabel("loss (nats)")
    figure.axes[0].legend()
    save_figure(figure, path)
    return True
