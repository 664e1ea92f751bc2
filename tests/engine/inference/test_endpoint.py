"""The endpoint client, before a server and a fault proxy in this process: retries, budget, concurrency, keys, probes."""

import email.utils
import json
import logging
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from engine.inference.asking import Answer, Asker, ChatRequest, Unanswered
from engine.inference.budget import Prices
from engine.inference.endpoint import Endpoint, EndpointSettings, Gate, backoff, retry_after
from engine.inference.probe import describe, probe
from tests.engine.inference.servers import KINDS, FakeServer, FaultProxy

KEY = "sk-very-secret-0123456789"


def requests(count: int, **parameters) -> list[ChatRequest]:
    return [
        ChatRequest([{"role": "user", "content": f"question {i}"}], {"max_tokens": 8, "temperature": 0, **parameters})
        for i in range(count)
    ]


def settings(server, **changes) -> EndpointSettings:
    return EndpointSettings(**{"model": "m", "url": server.url, "timeout": 5.0, **changes})


def ask(server, journal, count: int, *, limits=(), **changes) -> list:
    with Asker(journal, **dict(limits)) as asker:
        return asker.ask_all(Endpoint(settings(server, **changes)), requests(count))


def test_through_faults_every_request_is_answered_once_and_the_account_is_the_servers(tmp_path):
    prices = {"price_in": 1000.0, "price_out": 3000.0}
    with FakeServer() as server, FaultProxy(server.url, share=0.3, hang=0.8) as proxy:
        outcomes = ask(proxy, tmp_path / "journal", 80, timeout=0.7, **prices)
        assert {*proxy.made} == {None, *KINDS}
        expected = [server.text({"messages": request.messages, **request.parameters})[0] for request in requests(80)]
        assert [outcome.text for outcome in outcomes] == expected
        kept = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
        assert len({entry["key"] for entry in kept if "text" in entry}) == 80
        # What the server answered is what it may charge: the journal counts that much or, where it cannot know, more.
        charged = sum((1000 * prompt + 3000 * completion) / 1e6 for *_, prompt, completion in server.log)
        with Asker(tmp_path / "journal") as asker:
            assert asker.budget.sent == sum(proxy.made.values())
            assert charged <= asker.budget.spent <= 3 * charged
        answered = len(server.log)
        assert ask(server, tmp_path / "journal", 80) == outcomes
        assert len(server.log) == answered


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_passing_fault_is_tried_again(tmp_path, status):
    failures = iter([status, status])
    with FakeServer(fails=lambda _: (failure, "later") if (failure := next(failures, None)) else None) as server:
        [answer] = ask(server, tmp_path / "journal", 1)
        assert isinstance(answer, Answer)
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert [line["reason"] for line in lines if "failed" in line] == [str(status)] * 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_fails_alone_and_at_once(tmp_path, status):
    asked = []

    def fails(body):
        asked.append(body)
        return (status, "too long") if body["messages"][0]["content"] == "question 3" else None

    with FakeServer(fails=fails) as server:
        outcomes = ask(server, tmp_path / "journal", 10)
    assert len(asked) == 10
    assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Unanswered)] == [3]
    assert f"refuses the request (status {status})" in str(outcomes[3])
    assert str(outcomes[3]).endswith(f"(status {status}): too long")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the key .status 401.; no key was sent: set key_variable"),
        (403, "does not allow this key"),
        (404, "does not know this address or model .status 404.; it is asked for 'm': no"),
        (402, "asks for payment"),
    ],
)
def test_a_wrong_key_or_address_ends_the_run(tmp_path, status, message):
    asked = []
    with FakeServer(fails=lambda body: asked.append(body) or (status, "no")) as server:
        with pytest.raises(ValueError, match=message):
            ask(server, tmp_path / "journal", 50, concurrency=4)
        assert len(asked) <= 4


def test_an_exhausted_account_is_no_passing_429(tmp_path):
    with (
        FakeServer(fails=lambda _: (429, "quota", None, "insufficient_quota")) as server,
        pytest.raises(ValueError, match="asks for payment"),
    ):
        ask(server, tmp_path / "journal", 1)


@pytest.mark.slow
def test_a_request_is_sent_8_times_and_a_server_that_always_fails_ends_the_run(tmp_path):
    asked = []
    with FakeServer(fails=lambda body: asked.append(body["messages"][0]["content"]) or (500, "broken")) as server:
        [outcome] = ask(server, tmp_path / "journal", 1)
        assert "no answer in 8 tries, the last one: 500" in str(outcome)
        assert len(asked) == 8
        with pytest.raises(ConnectionError, match=r"no answer in 8 tries.*; nor in the last 4\d. Run the command again"):
            ask(server, tmp_path / "journal", 100, concurrency=1)
        assert 8 + 40 <= len(asked) <= 8 + 48


def test_an_endpoint_that_is_not_there_is_named_soon(tmp_path):
    with FakeServer() as server:
        url = server.url
    with pytest.raises(ConnectionError, match=rf"{url}: cannot be reached .connection refused.; is the server running"):
        ask(server, tmp_path / "journal", 3)


def test_a_host_that_is_not_there_is_named(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(ConnectionError, match=r"cannot be reached .no such host."):
        ask(SimpleNamespace(url="http://nowhere.invalid/v1"), tmp_path / "journal", 1)


def test_retry_after_is_read_in_all_its_forms():
    soon = email.utils.formatdate(time.time() + 3000, usegmt=True)
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert 2900 < retry_after({"retry-after": soon}) <= 3000
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert [retry_after({"retry-after": text}) for text in ("", "soon", past, "-3")] == [0, 0, 0, 0]
    assert retry_after({}) == 0


def test_no_request_is_sent_before_retry_after_has_passed(tmp_path):
    times, failures = [], iter([(429, "slow down", {"retry-after": "0.5"})])

    def fails(_):
        times.append(time.monotonic())
        return next(failures, None)

    with FakeServer(fails=fails) as server:
        ask(server, tmp_path / "journal", 3, concurrency=1)
    assert times[1] - times[0] >= 0.5
    assert len(times) == 4
    with (
        FakeServer(fails=lambda _: (429, "slow down", {"retry-after": "86400"})) as server,
        pytest.raises(ValueError, match="asks to wait 86,400 seconds"),
    ):
        ask(server, tmp_path / "other", 3, concurrency=1)


def test_waits_double_and_differ_from_client_to_client(monkeypatch):
    monkeypatch.setattr("engine.inference.endpoint.FIRST_WAIT", 0.5)
    for tried in range(1, 10):
        waits = [backoff(tried) for _ in range(50)]
        most = min(60.0, 0.5 * 2 ** (tried - 1))
        assert most / 2 <= min(waits) < max(waits) <= most


def test_concurrency_halves_once_for_a_burst_and_grows_by_one_for_as_many_successes():
    gate = Gate(16)
    for _ in range(5):
        gate.halve(0, 0.0)
    assert gate.limit == 8
    gate.halve(1, 0.0)
    assert gate.limit == 4
    limits = []
    for _ in range(4 + 5 + 6):
        gate.grow()
        limits.append(gate.limit)
    assert [limits[3], limits[2], limits[8], limits[14]] == [5, 4, 6, 7]
    for _ in range(1000):
        gate.grow()
    assert gate.limit == 16
    for round in range(2, 20):
        gate.halve(round, 0.0)
    assert gate.limit == 1


def test_a_server_that_bears_four_gets_no_more_for_long(tmp_path):
    """More than four at once are answered 429; the client settles near four, and never passes its own limit.

    The first requests wait for a fifth, so that a quick machine cannot answer each before the next one comes.
    """
    crowded = threading.Event()

    def fails(_):
        if server.at_once > 4:
            crowded.set()
            return (429, "too many")
        assert crowded.wait(30)
        return None

    with FakeServer(fails=fails, delay=0.005) as server:
        outcomes = ask(server, tmp_path / "journal", 80, concurrency=12)
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert server.most_at_once <= 12
    refused = sum(json.loads(line).get("reason") == "429" for line in (tmp_path / "journal").read_text().splitlines())
    assert 0 < refused < 60


def test_no_more_is_spent_than_max_cost_and_the_run_goes_on_with_more(tmp_path):
    prices = {"price_in": 1000.0, "price_out": 1000.0}
    with FakeServer() as server:

        def charged() -> float:
            return sum(prompt + completion for *_, prompt, completion in server.log) / 1000

        with pytest.raises(ValueError, match=r"could cost 0\.\d+, and 0\.\d+ of 0\.5 is spent.*raise --max-cost"):
            ask(server, tmp_path / "journal", 80, limits={"max_cost": 0.5}, **prices)
        # A request costs at most 0.1 here.
        assert 0.5 - 0.1 - 0.01 < charged() <= 0.5
        first = len(server.log)
        outcomes = ask(server, tmp_path / "journal", 80, limits={"max_cost": 10.0}, **prices)
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert len(server.log) == 80 > first


def test_the_worst_case_is_what_a_tokenizer_of_bytes_would_count():
    prices = Prices(2.0, 6.0)
    messages = [{"role": "user", "content": "ねこ"}]
    assert prices.worst(messages, 100) >= prices.of(6, 100)
    assert prices.worst(messages, 100) <= prices.of(6 + 100, 100)
    assert prices.worst(messages, None) == float("inf")
    assert Prices(2.0, 0.0).worst(messages, None) < 1


def test_an_answer_without_its_number_of_tokens_costs_the_worst_case(tmp_path):
    with FakeServer(usage=False) as server:
        [answer] = ask(server, tmp_path / "journal", 1, price_in=1.0, price_out=1.0)
    assert answer.prompt_tokens is answer.completion_tokens is None
    assert answer.cost == Prices(1.0, 1.0).worst(requests(1)[0].messages, 8)


def test_no_more_requests_are_sent_than_max_requests_over_all_runs(tmp_path):
    with FakeServer() as server, FaultProxy(server.url, share=0.3, kinds=("500", "cut")) as proxy:
        for limit in (20, 50):
            with pytest.raises(ValueError, match=f"the budget of {limit} requests is used up"):
                ask(proxy, tmp_path / "journal", 100, limits={"max_requests": limit})
            assert sum(proxy.made.values()) == limit


def test_a_cost_limit_needs_prices_and_a_longest_answer(tmp_path):
    prices = {"price_in": 1.0, "price_out": 1.0}
    with FakeServer() as server:
        for changes, longest, message in (({}, 8, "the prices of a million tokens"), (prices, None, "max_tokens")):
            with (
                Asker(tmp_path / "journal", max_cost=1.0) as asker,
                pytest.raises(ValueError, match=f"max_cost needs {message}"),
            ):
                asker.ask_all(Endpoint(settings(server, **changes)), requests(1, max_tokens=longest))
        assert not server.log


def test_the_key_is_sent_and_stands_in_no_file_message_or_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def fails(body):
        number = int(body["messages"][0]["content"].split()[1])
        return (400, f"bad request with Authorization: Bearer {KEY}") if number == 1 else None

    with FakeServer(fails=fails, answer=lambda _: f"you sent {KEY}") as server:
        outcomes = ask(server, tmp_path / "journal", 3, key_variable="SOME_KEY")
        assert [authorization for _, authorization, *_ in server.log] == [f"Bearer {KEY}"] * 2
        assert outcomes[0].text == "you sent [the key]"
        assert "Bearer [the key]" in str(outcomes[1])
        server.fails = lambda _: (401, f"Incorrect API key: {KEY}")
        with pytest.raises(ValueError, match="does not accept the key") as refused:
            ask(server, tmp_path / "journal2", 3, key_variable="SOME_KEY")
    chain, error = [], refused.value
    while error is not None:
        chain.append(repr(error))
        error = None if error.__suppress_context__ and error.__cause__ is None else error.__cause__ or error.__context__
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written + caplog.text + "".join(chain) + repr(settings(server, key_variable="SOME_KEY"))


def test_a_key_goes_to_the_endpoint_that_it_was_named_for_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    with FakeServer() as server:
        ask(server, tmp_path / "journal", 1)
        assert KEY not in str(server.log[0][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "url = 'localhost:8000': must begin with http:// or https://"),
        ({"url": "https://user:secret@host/v1"}, "url: must hold no user, password or query; put the key into an environment"),
        ({"url": "https://host/v1?key=secret"}, "url: must hold no user, password or query"),
        ({"price_in": 1.0}, "price_in and price_out: give both, or neither"),
        ({"price_in": -1.0, "price_out": 1.0}, "price_in = -1.0: must be a price"),
        ({"concurrency": 0}, "concurrency = 0: must be at least 1"),
        ({"timeout": 0.0}, "timeout = 0.0: must be a number of seconds above 0"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as wrong:
        EndpointSettings(**{"model": "m", "url": "http://host/v1", **changes})
    assert "secret" not in str(wrong.value)


def test_a_missing_key_or_library_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        ValueError, match=r"variable OPENAI_API_KEY is not set: it must hold the key of https://api\.openai\.com/v1"
    ):
        Endpoint(EndpointSettings(model="m", url="https://api.openai.com/v1"))
    with pytest.raises(ValueError, match="variable OTHER is not set"):
        Endpoint(EndpointSettings(model="m", url="http://host/v1", key_variable="OTHER"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="needs the package openai: pip install"):
        Endpoint(EndpointSettings(model="m", url="http://host/v1"))


def test_a_faulty_answer_without_a_longest_one_is_no_defect(tmp_path):
    """Its worst case is infinite, which no journal can hold."""
    with FakeServer(usage=False) as server, FaultProxy(server.url, share=0.5, seed=1, kinds=("cut",)) as proxy:
        with Asker(tmp_path / "journal") as asker:
            outcomes = asker.ask_all(Endpoint(settings(proxy, price_in=1.0, price_out=1.0)), requests(10, max_tokens=None))
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert proxy.made["cut"]


def test_half_a_character_fails_alone(tmp_path):
    with FakeServer() as server, Asker(tmp_path / "journal") as asker:
        broken = ChatRequest([{"role": "user", "content": "a \ud83e b"}])
        outcomes = asker.ask_all(Endpoint(settings(server)), [broken, *requests(1)])
        assert [type(outcome) for outcome in outcomes] == [Unanswered, Answer]
        assert "half of a character" in str(outcomes[0])


def test_the_longest_answer_has_the_name_that_the_endpoint_knows(tmp_path):
    with FakeServer() as server:
        ask(server, tmp_path / "journal", 1, max_tokens_name="max_completion_tokens")
        assert server.log[0][0]["max_completion_tokens"] == 8
        assert "max_tokens" not in server.log[0][0]


def test_a_probe_asks_on_where_a_model_has_no_answer(tmp_path):
    def answer(body) -> str:
        return "" if "sentence" in body["messages"][0]["content"] else "Paris is it".split(body.get("stop", ["?"])[0])[0]

    with FakeServer(answer=answer) as server, Asker(tmp_path / "journal") as asker:
        assert probe(asker, Endpoint(settings(server)))["stop"] == "followed"


@pytest.mark.parametrize(
    ("ignores", "refuses", "verdict"),
    [
        ((), (), "follows max_tokens, temperature, seed, n, stop, min_p"),
        (("seed", "n"), ("min_p",), "follows max_tokens, temperature, stop; ignores seed, n; refuses min_p"),
        (("min_p", "stop"), (), "follows max_tokens, temperature, seed, n; ignores stop, min_p"),
        (("max_tokens",), (), "follows temperature, seed, n, stop, min_p; ignores max_tokens"),
        # Drawn, whatever temperature is asked for: a character that is missing in an answer proves nothing.
        (("temperature", "seed"), (), "follows max_tokens, n; ignores temperature, seed; unclear: stop, min_p"),
        ((), ("temperature", "n"), "follows max_tokens, seed; refuses temperature, n; unclear: stop, min_p"),
    ],
)
def test_a_probe_finds_what_the_endpoint_does_with_parameters(tmp_path, ignores, refuses, verdict):
    with FakeServer(ignores=ignores, refuses=refuses) as server:
        with Asker(tmp_path / "journal") as asker:
            assert describe(probe(asker, Endpoint(settings(server)))) == verdict
        asked = len(server.log)
        # It is kept for the run that goes on.
        with Asker(tmp_path / "journal") as asker:
            assert describe(probe(asker, Endpoint(settings(server)))) == verdict
        assert len(server.log) == asked
