"""The client before `transformers serve`, with faults between them and kills of the client."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from engine.inference.asking import Answer, Asker, ChatRequest
from engine.inference.endpoint import Endpoint, EndpointSettings
from engine.inference.probe import describe, probe
from tests.engine.inference.servers import FaultProxy, in_a_child, served, wait_until

KEY = "sk-very-secret-0123456789"
ROOT = Path(__file__).resolve().parents[3]
REQUESTS, KILLS, AT_ONCE = 1000, 3, 8
PRICES = {"price_in": 10.0, "price_out": 30.0}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def export(tiny_model) -> Path:
    """The quickstart's export, where `make quickstart` has made one; else an untrained model."""
    made = ROOT / "runs" / "quickstart" / "export"
    return made if made.is_dir() else tiny_model


def requests(count: int) -> list[ChatRequest]:
    return [
        ChatRequest([{"role": "user", "content": f"What is the number after {i}?"}], {"max_tokens": 8, "temperature": 0})
        for i in range(count)
    ]


def ask_all(url: str, model: str, journal: Path, **limits) -> list:
    with Asker(journal, **limits) as asker:
        settings = EndpointSettings(
            model=model, url=url, timeout=20.0, concurrency=AT_ONCE, key_variable="TEST_ENDPOINT_KEY", **PRICES
        )
        return asker.ask_all(Endpoint(settings), requests(REQUESTS))


def test_every_request_is_answered_once_through_faults_and_kills(export, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", KEY)
    journal, limit = tmp_path / "journal", REQUESTS * 0.01
    with served(export, tmp_path / "server.log") as url, FaultProxy(url, share=0.3, hang=20.0) as proxy:
        for kill in range(1, KILLS + 1):
            child = in_a_child(lambda: ask_all(proxy.url, str(export), journal, max_cost=limit))
            wait_until(lambda kill=kill: proxy.passed >= kill * REQUESTS // (KILLS + 1), seconds=1800)
            time.sleep(random.random())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        outcomes = ask_all(proxy.url, str(export), journal, max_cost=limit)
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        keys = [line["key"] for line in lines if "text" in line]
        assert len(keys) == len(set(keys)) == REQUESTS
        # The server worked once for each answer, and again only for answers that the proxy cut or a kill lost.
        lost = sum(proxy.made.get(kind, 0) for kind in ("cut", "short", "late reset"))
        assert proxy.passed <= REQUESTS + lost + KILLS * AT_ONCE + sum(line.get("reason") == "timeout" for line in lines)
        answered = {line["key"]: line for line in lines if "text" in line}
        with Asker(journal) as asker:
            assert sum(line["cost"] for line in answered.values()) <= asker.budget.spent <= limit
            assert asker.budget.sent <= sum(proxy.made.values()) + KILLS * AT_ONCE
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_probe_finds_what_transformers_serve_ignores(export, tmp_path):
    """Greedy unless the folder's generation_config.json says do_sample; no n; top-level min_p is refused."""
    for sample in (False, True):
        folder = shutil.copytree(export, tmp_path / f"sample-{sample}")
        file = folder / "generation_config.json"
        table = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**{name: table[name] for name in table if name.endswith("_id")}, "do_sample": sample}))
        with served(folder, tmp_path / "server.log") as url, Asker(tmp_path / f"journal-{sample}") as asker:
            found = probe(asker, Endpoint(EndpointSettings(model=str(folder), url=url, timeout=60.0)))
        print(describe(found))
        assert found["max_tokens"] == "followed"
        assert found["temperature"] == ("followed" if sample else "ignored")
        assert found["n"] == "ignored"
        assert found["min_p"] == "refused"
