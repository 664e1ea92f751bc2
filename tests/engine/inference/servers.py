"""Servers of chat completions: a small one and a proxy that makes faults, in threads of the test's process, and the one of
`transformers`; clients to kill."""

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ports import free_port

KINDS = ("429", "500", "hang", "reset", "late reset", "cut", "short")
WORDS = ["the", "cat", "sees", "a", "red", "dog", "and", "it", "runs", "ねこ", "は", "赤い", "いぬ", "を", "見る", "です"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request, client_address):
        """A client that has gone is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def reply(self, status: int, content: bytes, headers: dict | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, message: str, headers: dict | None = None, code: str | None = None) -> None:
        # FastAPI's servers have "detail".
        content = {"detail": message} if status in (422, 404) else {"error": {"message": message, "code": code}}
        self.reply(status, json.dumps(content).encode(), headers)


class FakeServer(_Server):
    """Answers like a model of a few words: greedy at temperature 0, else drawn, with the seed where there is one.

    ignores, refuses: parameters that it does not follow. answer(body): another answer's text. delay: seconds.
    log: (body, authorization, prompt tokens, completion tokens) of each answered request.
    """

    def __init__(self, *, ignores=(), refuses=(), answer=None, delay=0.0, usage=True, fails=None) -> None:
        super().__init__(_Completions)
        self.ignores, self.refuses, self.answer, self.delay, self.usage, self.fails = (
            ignores,
            refuses,
            answer,
            delay,
            usage,
            fails,
        )
        self.log, self.at_once, self.most_at_once = [], 0, 0

    def text(self, body: dict) -> tuple[str, int, str]:
        """(the answer, its tokens, finish_reason); a token is a word."""
        if self.answer is not None:
            text = self.answer(body)
            return text, len(text.split()), "stop"
        taken = {name: value for name, value in body.items() if name not in self.ignores}
        seed = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        if taken.get("temperature", 1) > 0 and taken.get("min_p", 0) < 1:
            seed = f"{seed} {taken['seed']}" if "seed" in taken else random.random()
        words = random.Random(seed).choices(WORDS, k=12)
        kept = words[: taken.get("max_tokens", 100)]
        text = " ".join(kept)
        reason = "length" if len(kept) < len(words) else "stop"
        for word in taken.get("stop", ()):
            text = text.split(word)[0]
        return text, len(kept), reason


class _Completions(_Handler):
    def do_POST(self):
        server, body = self.server, json.loads(self.body())
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.delay)
        try:
            if server.fails is not None and (failure := server.fails(body)) is not None:
                self.error(*failure)
                return
            if wrong := [name for name in server.refuses if name in body]:
                self.error(422, f"unknown parameter {wrong[0]}")
                return
            text, tokens, reason = server.text(body)
            prompt = sum(len(message["content"].split()) for message in body["messages"])
            with server.lock:
                server.log.append((body, self.headers.get("authorization"), prompt, tokens))
            count = 1 if "n" in server.ignores else body.get("n", 1)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            content = {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice] * count}
            if server.usage:
                content["usage"] = {"prompt_tokens": prompt, "completion_tokens": tokens * count}
            self.reply(200, json.dumps(content).encode())
        finally:
            with server.lock:
                server.at_once -= 1


class FaultProxy(_Server):
    """Passes requests on to `url`; a share of them meet a fault, drawn by a seed.

    made: kind -> how often. hang: seconds that a hanging request takes.
    """

    def __init__(
        self, url: str, *, share: float, seed: int = 0, hang: float = 1.0, kinds=KINDS, retry_after: str = "0.01"
    ) -> None:
        super().__init__(_Faults)
        self.host, self.port = url.removeprefix("http://").split("/")[0].split(":")
        self.share, self.hang, self.kinds, self.retry_after = share, hang, kinds, retry_after
        self.random, self.made, self.passed = random.Random(seed), {}, 0


class _Faults(_Handler):
    def do_POST(self):
        server, body = self.server, self.body()
        with server.lock:
            kind = server.random.choice(server.kinds) if server.random.random() < server.share else None
            server.made[kind] = server.made.get(kind, 0) + 1
        if kind == "429":
            self.error(429, "too many requests", {"retry-after": server.retry_after})
        elif kind == "500":
            self.error(500, "the server failed")
        elif kind == "hang":
            time.sleep(server.hang)
            self.close_connection = True
        elif kind == "reset":
            self.reset()
        else:
            status, content = self.forward(body)
            if kind is None:
                self.reply(status, content)
            elif kind == "cut":
                # A whole response whose JSON is not whole.
                self.reply(status, content[: len(content) // 2])
            else:
                self.reply(status, content[: len(content) // 2], length=len(content))
                self.close_connection = True
                if kind == "late reset":
                    self.reset()

    def forward(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.server.host, int(self.server.port), timeout=120)
        headers = {name: self.headers[name] for name in ("content-type", "authorization") if name in self.headers}
        connection.request("POST", self.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        with self.server.lock:
            self.server.passed += 1
        return response.status, content

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def in_a_child(work) -> int:
    """Run `work` in a forked process. Returns: its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # The terminal's Ctrl-C does not reach the handlers of pytest.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as ended:
            code = ended.code
        finally:
            os._exit(code)
    return child


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def served(folder: Path, log: Path):
    """`transformers serve` on a free port. Yields: its address."""
    program = Path(sys.executable).with_name("transformers")
    if not program.is_file():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    port = free_port()
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port), seconds=300)
            if process.poll() is not None and b"pip install" in log.read_bytes():
                pytest.skip("transformers serve lacks packages: pip install 'transformers[serving]'")
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        time.sleep(0.5)
        return False
