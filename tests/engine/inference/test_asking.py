"""Jobs that ask: order, dependence, equal requests, failures, Ctrl-C, SIGTERM and kills."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from engine.inference.asking import Answer, Asker, ChatRequest, RunStopped, Unanswered
from engine.inference.endpoint import Endpoint, EndpointSettings
from tests.engine.inference.servers import FakeServer, FaultProxy, in_a_child, wait_until


def request(text: str, **changes) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], {"max_tokens": 8, "temperature": 0}, **changes)


class Echo:
    """A responder that answers with the question, after as many steps of the event loop as `slow` says."""

    model = "echo"

    def __init__(self, slow=lambda text: 0) -> None:
        self.slow, self.asked = slow, []

    async def answer(self, request, key, asker) -> Answer:
        text = request.messages[-1]["content"]
        self.asked.append(text)
        for _ in range(self.slow(text)):
            await asker.pause(0.001)
        if text.startswith("refused"):
            raise Unanswered(text)
        if text.startswith("fatal"):
            raise RunStopped(ConnectionError(text))
        return Answer(text, "stop")

    async def close(self) -> None:
        pass

    def status(self) -> str:
        return ""


def test_results_come_as_they_end_or_in_order(tmp_path):
    echo = Echo(slow=lambda text: 20 if text == "0" else 0)
    with Asker(tmp_path / "journal") as asker:

        async def job(number: int) -> str:
            return (await asker.ask(echo, request(str(number)))).text

        expected = [(number, str(number)) for number in range(20)]
        as_they_end = list(asker.run(job, range(20)))
        assert as_they_end[0] != (0, "0")
        assert sorted(as_they_end) == expected
        assert list(asker.run(job, range(20), ordered=True)) == expected


def test_a_question_may_depend_on_the_answers_before_it(tmp_path):
    echo = Echo()
    with Asker(tmp_path / "journal") as asker:

        async def job(start: str) -> str:
            first = await asker.ask(echo, request(start))
            return (await asker.ask(echo, request(first.text + "!"))).text

        assert dict(asker.run(job, "abc")) == {0: "a!", 1: "b!", 2: "c!"}
    # The answers are in the journal, so that nothing is asked again.
    with Asker(tmp_path / "journal") as asker:
        assert sorted(asker.run(job, "abc")) == [(0, "a!"), (1, "b!"), (2, "c!")]
    assert len(echo.asked) == 6


def test_equal_requests_share_an_answer_and_other_draws_models_and_parameters_do_not(tmp_path):
    echo, other = Echo(), Echo()
    other.model = "other"
    with Asker(tmp_path / "journal") as asker:
        answers = asker.ask_all(echo, [request("a"), request("a"), request("a", draw=1)])
        assert [answer.text for answer in answers] == ["a"] * 3
        assert echo.asked == ["a", "a"]
        asker.ask_all(other, [request("a")])
        asker.ask_all(echo, [ChatRequest(request("a").messages, {"max_tokens": 9})])
        assert (len(other.asked), len(echo.asked)) == (1, 3)


def test_items_are_read_as_they_are_needed(tmp_path):
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    with Asker(tmp_path / "journal") as asker:

        async def job(number: int) -> int:
            await asker.ask(Echo(), request(str(number)))
            return number

        for done, _ in enumerate(asker.run(job, items(), at_once=10), 1):
            assert len(taken) <= done + 10
            if done == 30:
                break
        # A run that was left early may be followed by another.
        assert [result for _, result in asker.run(job, range(3), ordered=True)] == [0, 1, 2]


def test_a_refused_request_is_an_outcome_or_caught_by_its_job(tmp_path):
    with Asker(tmp_path / "journal") as asker:

        async def job(text: str) -> str:
            return (await asker.ask(Echo(), request(text))).text

        async def careful(text: str) -> str:
            try:
                return await job(text)
            except Unanswered:
                return "instead"

        outcomes = dict(asker.run(job, ["a", "refused", "b"]))
        assert isinstance(outcomes.pop(1), Unanswered)
        assert outcomes == {0: "a", 2: "b"}
        assert dict(asker.run(careful, ["refused"])) == {0: "instead"}


@pytest.mark.parametrize(("text", "error"), [("fatal", ConnectionError), ("defect", ZeroDivisionError)])
def test_an_end_of_the_run_keeps_the_answers_in_flight(tmp_path, text, error):
    echo = Echo(slow=lambda text: 5 if text.startswith("slow") else 0)
    with FakeServer(delay=0.2) as server, Asker(tmp_path / "journal") as asker:
        endpoint = Endpoint(EndpointSettings(model="m", url=server.url))

        async def job(item: str) -> str:
            if item == "defect":
                await asker.ask(echo, request("slow"))
                raise ZeroDivisionError
            return (await asker.ask(echo if item == "fatal" else endpoint, request(item))).text

        with pytest.raises(error):
            list(asker.run(job, ["a", "b", text, *(f"later {i}" for i in range(20))]))
        sent = len(server.log)
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert sum("text" in line and line["model"] == "m" for line in lines) == sent
    assert sent < 22


def test_a_journal_of_something_else_is_named(tmp_path):
    (tmp_path / "journal").write_text('{"sent": 1}\n')
    with pytest.raises(ValueError, match=r"journal, byte 0: not a line of a journal of answers .*; name another journal"):
        Asker(tmp_path / "journal")


def ask_everything(url: str, journal: Path, count: int, *, timeout: float = 10.0, **limits) -> list:
    prices = {"price_in": 1000.0, "price_out": 1000.0}
    with Asker(journal, **limits) as asker:
        endpoint = Endpoint(EndpointSettings(model="m", url=url, timeout=timeout, **prices))
        return asker.ask_all(endpoint, [request(f"question {i}") for i in range(count)])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_lets_the_answers_in_flight_come_in(tmp_path, number, code):
    with FakeServer(delay=0.05) as server:
        child = in_a_child(lambda: ask_everything(server.url, tmp_path / "journal", 1000))
        wait_until(lambda: len(server.log) >= 20)
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        with Asker(tmp_path / "journal") as asker:
            answered = len(server.log)
            charged = sum(prompt + completion for *_, prompt, completion in server.log) / 1000
            assert asker.budget.sent == answered
            assert asker.budget.spent == pytest.approx(charged)


def test_a_stopped_run_sends_nothing_that_waited_for_the_budget(tmp_path):
    """Each answer frees money for a request that waits; a stop must find it before it is sent."""
    with FakeServer(delay=0.3) as server:
        # Enough for two requests at once.
        child = in_a_child(lambda: ask_everything(server.url, tmp_path / "journal", 50, timeout=60.0, max_cost=0.2))
        wait_until(lambda: server.at_once > 0)
        time.sleep(0.1)
        os.kill(child, signal.SIGINT)
        time.sleep(0.05)
        sent = server.at_once + len(server.log)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
        assert len(server.log) == sent


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    with FakeServer(delay=30.0) as server:
        child = in_a_child(lambda: ask_everything(server.url, tmp_path / "journal", 10, timeout=60.0))
        wait_until(lambda: server.at_once > 0)
        start = time.monotonic()
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
        assert time.monotonic() - start < 20


def test_a_run_that_is_killed_three_times_pays_nothing_twice_but_what_was_in_flight(tmp_path):
    count, kills, limit = 100, 3, 15.0
    journal = tmp_path / "journal"
    with (
        FakeServer(delay=0.01) as server,
        FaultProxy(server.url, share=0.3, hang=0.5, kinds=("429", "500", "reset", "cut")) as proxy,
    ):
        for kill in range(1, kills + 1):
            child = in_a_child(lambda: ask_everything(proxy.url, journal, count, max_cost=limit))
            wait_until(lambda kill=kill: len(server.log) >= kill * count // 5)
            time.sleep(random.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            with open(journal, "ab") as file:
                file.write(b'{"key": "torn')
        # What a killed client had asked for may still reach the server.
        time.sleep(0.1)
        answers = ask_everything(proxy.url, journal, count, max_cost=limit)
        assert all(isinstance(answer, Answer) for answer in answers)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        keys = [line["key"] for line in lines if "text" in line]
        assert len(keys) == len(set(keys)) == count
        assert proxy.passed <= count + proxy.made.get("cut", 0) + kills * 8
        charged = sum(prompt + completion for *_, prompt, completion in server.log) / 1000
        with Asker(journal) as asker:
            assert charged <= asker.budget.spent <= limit
            assert sum(proxy.made.values()) <= asker.budget.sent <= sum(proxy.made.values()) + kills * 8


def test_what_a_killed_run_had_in_flight_counts_as_spent(tmp_path):
    """Else each kill would pass the budget by as much."""
    limit = 0.5
    with FakeServer(delay=30.0) as server:
        for _ in range(2):
            child = in_a_child(lambda: ask_everything(server.url, tmp_path / "journal", 100, max_cost=limit))
            wait_until(lambda: server.at_once > 0)
            time.sleep(0.1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        sent = [json.loads(line)["worst"] for line in (tmp_path / "journal").read_text().splitlines()]
        assert sum(sent) <= limit < sum(sent) + max(sent)
        with pytest.raises(ValueError, match=r"of 0\.5 is spent.*raise --max-cost"):
            ask_everything(server.url, tmp_path / "journal", 100, max_cost=limit)
