"""Commands that make data, killed at random moments: the same bytes as an unbroken run, and nothing paid for twice."""

import json
import os
import random
import re
import signal
import time
from collections import Counter

import pytest

from recipes import generate, pairs, translate
from tests.engine.inference.servers import FakeServer, FaultProxy, in_a_child, wait_until
from tests.recipes.test_generate import writing

pytest.importorskip("openai", reason="openai comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")
pytest.importorskip("datasketch", reason="datasketch comes with the extra data")

KILLS, AT_ONCE = 5, 8
pytestmark = pytest.mark.slow


def answer(body: dict) -> str:
    """An answer that depends on the request alone; every seventh weak translation loses its marks."""
    content = body["messages"][-1]["content"]
    if body["model"] == "writer":
        return writing(body)
    found = re.findall(r"<source>\n(.*?)\n</source>", content, re.DOTALL)
    if not found:
        return f"{body['model']} says of this: {content}"
    text = re.sub(r"<k\d+/>|[A-Za-z]+", lambda match: match[0] if match[0][0] == "<" else f"語{len(match[0])}", found[0])
    return re.sub(r"<k\d+/>", "", text) if body["model"] == "weak" and len(content) % 7 == 0 else text


def translating(folder, url: str, out: str) -> None:
    attempt = f'url = "{url}"\nconcurrency = {AT_ONCE}\ntimeout = 60'
    (folder / f"{out}.toml").write_text(
        f'kind = "conversations"\npaths = ["{folder}/in.jsonl"]\nout = "{folder}/{out}"\nsource = "en"\ntarget = "ja"\n'
        f'validate = false\n[[attempts]]\nmodel = "weak"\n{attempt}\n[[attempts]]\nmodel = "strong"\n{attempt}\n'
    )
    translate.main([f"{folder}/{out}.toml"])


def pairing(folder, url: str, out: str) -> None:
    same = {"url": url, "concurrency": AT_ONCE, "timeout": 60}
    sides = [f"--{side}.{name}={value}" for side in ("chosen", "rejected") for name, value in {**same, "model": side}.items()]
    pairs.main([f"--paths={folder}/in.jsonl", f"--out={folder}/{out}", "--most-similar=1", *sides])


def generating(folder, url: str, out: str) -> None:
    (folder / f"{out}.toml").write_text(
        f'out = "{folder}/{out}"\nlanguages = ["ja", "en"]\n[[categories]]\nname = "cooking"\ncount = 40\n'
        f'[[categories]]\nname = "travel"\ncount = 30\n[writer]\nmodel = "writer"\nurl = "{url}"\n'
        f"concurrency = {AT_ONCE}\ntimeout = 60\n"
    )
    generate.main([f"{folder}/{out}.toml"])


@pytest.mark.parametrize("command", [translating, pairing, generating])
def test_a_run_that_is_killed_five_times_gives_the_same_bytes_and_pays_nothing_twice(tmp_path, command):
    words = random.Random(0)
    with open(tmp_path / "in.jsonl", "w", encoding="utf-8") as file:
        for i in range(150):
            question = f"What is `{i}` " + "and " * words.randrange(8) + "so on?"
            file.write(json.dumps({"prompt": question, "completion": f"It is the number {i} in `digits`."}) + "\n")
    with FakeServer(answer=answer) as server:
        command(tmp_path, server.url, "whole.jsonl.gz")
        needed = len(server.log)
    with (
        FakeServer(answer=answer, delay=0.02) as server,
        FaultProxy(server.url, share=0.2, kinds=("429", "500", "reset")) as proxy,
    ):
        for kill in range(1, KILLS + 1):
            child = in_a_child(lambda: command(tmp_path, proxy.url, "killed.jsonl.gz"))
            wait_until(lambda kill=kill: len(server.log) >= kill * needed // (KILLS + 1), seconds=120)
            time.sleep(random.random() * 0.2)
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert not (tmp_path / "killed.jsonl.gz").exists()
        time.sleep(0.2)
        command(tmp_path, proxy.url, "killed.jsonl.gz")
        asked = Counter(json.dumps([body["model"], body["messages"]]) for body, *_ in server.log)
    for part in ("", ".dropped"):
        whole, killed = (tmp_path / f"{name}{part}.jsonl.gz" for name in ("whole", "killed"))
        assert killed.read_bytes() == whole.read_bytes()
    assert len(asked) == needed
    # Each kill may lose what was in flight.
    assert sum(asked.values()) - needed <= KILLS * AT_ONCE * (2 if command is pairing else 1)
    # Nothing of the killed runs is left.
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
