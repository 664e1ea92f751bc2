"""The voting page, over HTTP and in a real browser: blinded, seeded, safe from other sites, and it goes on where it stopped."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from recipes.evaluation.ballot import Ballot, read_contenders
from recipes.evaluation.vote_page import vote_server
from tests.recipes.browser import PROGRAM, Browser

ROOT = Path(__file__).resolve().parents[3]
MODELS = ("alpha-7b", "beta-7b", "gamma-7b")
EVIL = "<img src=x onerror=document.title='owned'><b>太字</b>"


@pytest.fixture
def answers(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": f"Question {number}? 質問"}],
            "model": model,
            "response": f"{EVIL} {number}{mark}",
        }
        for number in range(4)
        for model, mark in zip(MODELS, "xyz", strict=True)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@contextmanager
def served(answers, votes, **options):
    with Ballot(read_contenders([answers]), votes, **options) as ballot:
        server = vote_server(ballot, 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def request(port, method, path, body=None, **headers):
    """(status, body, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def following(port, rater="Ann"):
    status, body, _ = request(port, "GET", f"/next?rater={quote(rater)}")
    assert status == 200
    return json.loads(body)


def voted(port, key, winner, rater="Ann", **headers):
    body = json.dumps({"rater": rater, "key": key, "winner": winner})
    return request(port, "POST", "/vote", body, **{"Content_Type": "application/json", **headers})


def lines(votes):
    return [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]


def test_a_rater_judges_every_pair_once_without_seeing_a_model(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port:
        pair = following(port)
        for number in range(1, 13):
            assert (pair["number"], pair["total"]) == (number, 12)
            assert not any(model in json.dumps(pair) for model in MODELS)
            status, body, _ = voted(port, pair["key"], ("left", "right", "tie")[number % 3])
            assert status == 200
            assert len(lines(votes)) == number
            pair = json.loads(body)
        assert pair == {"done": True}
    given = lines(votes)
    assert {frozenset((vote["left"], vote["right"])) for vote in given} == {
        frozenset(pair) for pair in (MODELS[:2], MODELS[1:], MODELS[::2])
    }
    assert len({(vote["prompt"], frozenset((vote["left"], vote["right"]))) for vote in given}) == 12
    assert {vote["winner"] for vote in given} == {"left", "right", "tie"}
    assert all(vote["rater"] == "Ann" for vote in given)
    # Each model stands on both sides.
    assert {vote["left"] for vote in given} == {vote["right"] for vote in given} == set(MODELS)


def test_the_vote_names_the_answers_that_were_shown(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port:
        pair = following(port)
        voted(port, pair["key"], "left")
    marks = dict(zip("xyz", MODELS, strict=True))
    vote = lines(votes)[0]
    assert (marks[pair["left"][-1]], marks[pair["right"][-1]]) == (vote["left"], vote["right"])
    assert vote["prompt"] == pair["prompt"]


def test_order_and_sides_follow_from_seed_and_rater_and_go_on_after_a_stop(answers, tmp_path):
    def seen(rater, seed, votes):
        with served(answers, votes, seed=seed) as port:
            pair, found = following(port, rater), []
            while "key" in pair:
                found.append((pair["prompt"], pair["left"], pair["right"]))
                pair = json.loads(voted(port, pair["key"], "tie", rater)[1])
        return found

    first = seen("Ann", 1, tmp_path / "a.jsonl")
    assert seen("Ann", 1, tmp_path / "b.jsonl") == first
    assert seen("Ann", 2, tmp_path / "c.jsonl") != first
    assert seen("Bob", 1, tmp_path / "a.jsonl") != first
    # Stopped after five votes, in the middle of writing the sixth.
    whole = (tmp_path / "b.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_bytes(b"".join(whole[:5]) + whole[5][:20])
    assert seen("Ann", 1, tmp_path / "d.jsonl") == first[5:]
    assert (tmp_path / "d.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_second_vote_on_a_pair_is_not_written(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port:
        key = following(port)["key"]
        threads = [threading.Thread(target=voted, args=(port, key, "left")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert following(port)["number"] == 2
    assert len(lines(votes)) == 1


def test_a_limit_asks_for_fewer_votes(answers, tmp_path):
    with served(answers, tmp_path / "votes.jsonl", most=5) as port:
        assert following(port)["total"] == 5


def test_requests_of_other_sites_and_names_are_refused(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port:
        key = following(port)["key"]
        here = f"http://127.0.0.1:{port}"
        for headers, status in [
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Host": f"evil.example:{port}"}, 403),
            ({"Host": "127.0.0.1"}, 403),
            ({"Content_Type": "text/plain"}, 415),
            ({"Content_Length": "99999"}, 413),
        ]:
            assert voted(port, key, "left", **headers)[0] == status
        assert request(port, "GET", "/next?rater=Ann", Host="evil.example")[0] == 403
        assert not lines(votes)
        assert voted(port, key, "left", Origin=here)[0] == 200
        assert (
            voted(port, following(port)["key"], "left", Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
        )
    assert len(lines(votes)) == 2


def test_the_page_loads_nothing_from_elsewhere_and_cannot_be_framed(answers, tmp_path):
    with served(answers, tmp_path / "votes.jsonl") as port:
        status, body, headers = request(port, "GET", "/")
    page = body.decode()
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2
    assert "src=" not in page
    assert "innerHTML" not in page
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("vote", "said"),
    [
        (b"{", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'{"rater": "Ann", "key": "0", "winner": "left"}', "load the page again"),
        (b'{"rater": "", "key": "0", "winner": "left"}', "a rater's name must have"),
        (b'{"rater": "a\\nb", "key": "0", "winner": "left"}', "a rater's name must have"),
        (b'{"rater": 3, "key": "0", "winner": "left"}', "a rater's name must have"),
        (b'{"rater": "Ann", "key": "0", "winner": "both"}', "must be one of left, right, tie"),
        (b'{"rater": "Ann", "key": [], "winner": {}}', "winner = {}"),
    ],
)
def test_a_wrong_vote_is_refused_with_a_reason(answers, tmp_path, vote, said):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port:
        status, body, _ = request(port, "POST", "/vote", vote, Content_Type="application/json")
    assert status == 400
    assert said in json.loads(body)["error"]
    assert not lines(votes)


def test_a_file_of_something_else_is_not_written_to(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    votes.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"votes\.jsonl: holds something else than votes"):
        Ballot(read_contenders([answers]), votes)
    assert votes.read_text() == '{"step": 1}\n'


def test_answers_of_one_model_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "a", "model": "m", "response": "b"}) + "\n")
    with pytest.raises(ValueError, match="no prompt has answers of two models"):
        read_contenders([str(path)])


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    arguments = ["-m", "recipes.preference", "serve", answers, "--votes", str(votes), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().startswith("12 pairs")
        port = int(re.search(r"127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        assert voted(port, following(port)["key"], "tie")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert len(lines(votes)) == 1


@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_people_vote_by_mouse_and_keyboard_in_a_real_browser(answers, tmp_path):
    votes = tmp_path / "votes.jsonl"
    with served(answers, votes) as port, Browser(tmp_path / "profile") as browser:
        browser("Page.enable")
        browser("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.wait("document.readyState == 'complete' && !!document.querySelector('#rater')")
        browser.click("#rater")
        browser("Input.insertText", text="花子")
        browser.key("Enter", 13)
        browser.run("document.querySelector('#vote').hidden && document.querySelector('#who').requestSubmit()")
        browser.wait("!document.querySelector('#vote').hidden")
        # Markup in an answer is shown as text.
        assert browser.run("document.querySelector('#left').textContent").startswith(EVIL)
        assert browser.run("document.querySelectorAll('main img').length") == 0
        assert "owned" not in browser.run("document.title")
        steps = [
            lambda: browser.click("[data-winner=left]"),
            lambda: browser.key("ArrowRight", 39),
            lambda: browser.key("ArrowDown", 40),
            lambda: browser.key("1", 49),
        ]
        for number, step in enumerate(steps, 2):
            step()
            browser.wait(f"document.querySelector('#progress').textContent == '{number} / 12'")
        picture = browser.screenshot()
        assert picture.startswith(b"\x89PNG")
        # An aid to looking at the page: KOMAINU_SCREENSHOTS names a folder.
        if folder := os.environ.get("KOMAINU_SCREENSHOTS"):
            (Path(folder) / "vote_page.png").write_bytes(picture)
    assert [vote["winner"] for vote in lines(votes)] == ["left", "right", "tie", "left"]
    assert {vote["rater"] for vote in lines(votes)} == {"花子"}
