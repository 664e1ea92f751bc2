"""Data is made before a real server, with faults between, and trained on. The models are small: their words do not matter."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from engine.checkpoint.state import checkpoints
from engine.data.dataset import TokenDataset
from recipes import dpo, pairs, prepare, sft, translate, validate
from tests.engine.inference.servers import FaultProxy, served

pytest.importorskip("openai", reason="openai comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXPORT = ROOT / "runs" / "quickstart" / "export"
TINY = ROOT / "recipes" / "tiny"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """The quickstart's export, told to sample."""
    if not EXPORT.is_dir():
        pytest.skip(f"no {EXPORT}: make quickstart")
    folder = shutil.copytree(EXPORT, tmp_path_factory.mktemp("served") / "export")
    table = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(table | {"do_sample": True}))
    return folder


@pytest.fixture(scope="module")
def server(export, tmp_path_factory):
    with served(export, tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read(path: Path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def train(recipe, config: str, folder: Path, export: Path, *more: str) -> None:
    data = ["--sources.0.path", f"{folder}/data", "--heldout", f"{folder}/data"]
    run = ["--model", str(export), "--out", f"{folder}/run", "--steps", "20", "--device", "cpu"]
    recipe.main([str(TINY / config), *data, *run, *more])
    assert checkpoints(folder / "run")
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(step.get("step", 0) for step in steps) == 20


def test_translated_conversations_are_validated_prepared_and_trained_on(export, server, tmp_path):
    countries = ["France", "Italy", "Japan", "Spain", "Egypt", "Peru", "Kenya", "Norway", "Chile", "India"]
    records = [
        {
            "id": number,
            "messages": [
                {"role": "user", "content": f"What is the capital of {country}? See https://example.org/{number}."},
                {"role": "assistant", "content": f"`capital({country!r})` gives the answer."},
            ],
        }
        for number, country in enumerate(countries * 2)
    ]
    write(tmp_path / "en.jsonl", records)
    with FaultProxy(server, share=0.3, hang=20.0) as proxy:
        attempt = f'[[attempts]]\nmodel = "{export}"\nurl = "{proxy.url}"\ntimeout = 20\nmax_tokens = 40\n'
        (tmp_path / "translate.toml").write_text(
            f'kind = "conversations"\npaths = ["{tmp_path}/en.jsonl"]\nout = "{tmp_path}/ja.jsonl"\nsource = "en"\n'
            f'target = "ja"\nfailed = "keep"\n{attempt}temperature = 0.0\n{attempt}temperature = 1.0\nexplain = true\n'
        )
        translate.main([f"{tmp_path}/translate.toml"])
        assert set(proxy.made) > {None}
    rows = read(tmp_path / "ja.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in records]
    assert all(row["translation"]["verdicts"] for row in rows)
    validate.main([f"{tmp_path}/en.jsonl", f"--after={tmp_path}/ja.jsonl", f"--json={tmp_path}/checked.jsonl"])
    checked = read(tmp_path / "checked.jsonl")
    assert len(checked) == len(records)
    # So small a model translates nothing.
    assert not any(line["ok"] for line in checked)
    prepare.main(["--kind=conversations", f"--paths={tmp_path}/ja.jsonl", f"--tokenizer={export}", f"--out={tmp_path}/data"])
    assert len(TokenDataset.open(tmp_path / "data")) == len(records)
    train(sft, "sft2.toml", tmp_path, export, "--epochs", "100")


def test_pairs_are_prepared_and_trained_on(export, server, tmp_path):
    questions = [f"What is {one} plus {other}?" for one in range(2, 8) for other in range(3, 8)]
    write(tmp_path / "prompts.jsonl", [{"prompt": question} for question in questions])
    with FaultProxy(server, share=0.3, hang=20.0) as proxy:
        chosen = {"model": export, "url": proxy.url, "timeout": 20, "max-tokens": 40, "temperature": 0.0}
        # The same model, so warm that it says something else.
        rejected = {"model": export, "max-tokens": 40, "temperature": 3.0, "device": "cpu"}
        sides = {"chosen": chosen, "rejected": rejected}
        options = [f"--{side}.{name}={value}" for side, table in sides.items() for name, value in table.items()]
        pairs.main([f"--paths={tmp_path}/prompts.jsonl", f"--out={tmp_path}/pairs.jsonl", "--cut=keep", *options])
    rows = read(tmp_path / "pairs.jsonl")
    assert len(rows) + len(read(tmp_path / "pairs.dropped.jsonl.gz")) == len(questions)
    assert len(rows) >= 5
    prepare.main(["--kind=preferences", f"--paths={tmp_path}/pairs.jsonl", f"--tokenizer={export}", f"--out={tmp_path}/data"])
    assert TokenDataset.open(tmp_path / "data").kind == "preferences"
    train(dpo, "dpo.toml", tmp_path, export)
