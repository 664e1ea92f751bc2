"""The page of `recipes.preference serve` over HTTP, for this machine's browsers alone.

A page of another site can send requests to 127.0.0.1 too, or make a name of its own point there. So each request must name
this server as its Host, a vote must come from this page (Origin) as JSON, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from recipes.evaluation.ballot import Ballot, Pairing

HOST = "127.0.0.1"
_PAGE = Path(__file__).with_name("vote_page.html")
_LONGEST = 4096  # bytes of a vote


def vote_server(ballot: Ballot, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that shows the ballot's pairs and writes the votes. Raises: OSError naming a port that is taken."""

    class Handler(_Handler):
        votes = ballot

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise OSError(f"port {port} of {HOST}: {error.strerror}; name another one with --port, or 0 for a free one") from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    votes: Ballot
    protocol_version = "HTTP/1.1"
    # Seconds that a connection may stay silent.
    timeout = 60
    server_version = "komainu"
    sys_version = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self._is_ours():
            return
        if url.path == "/":
            nonce = secrets.token_urlsafe(16)
            page = _PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", nonce)
        elif url.path == "/next":
            self._answer(lambda: self.votes.next(parse_qs(url.query).get("rater", [""])[0]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"{url.path}: no such page")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        if urlsplit(self.path).path != "/vote":
            self._refuse(HTTPStatus.NOT_FOUND, "votes go to /vote")
            return
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a vote must be application/json")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LONGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a vote must have a length of at most {_LONGEST} bytes")
            return
        body = self.rfile.read(int(length))
        try:
            vote = json.loads(body)
            given = [vote[name] for name in ("rater", "key", "winner")]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "a vote must be a JSON object with rater, key and winner")
            return
        self._answer(lambda: self.votes.vote(*given))

    def _is_ours(self) -> bool:
        """Whether a request names this server, and comes from no other site's page; else it is refused."""
        port = self.connection.getsockname()[1]
        hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
        if self.headers.get("Host") not in hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"this page is at http://{hosts[0]}/")
            return False
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, "requests of other sites are refused")
            return False
        return True

    def _answer(self, ask: Any) -> None:
        try:
            pairing = ask()
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, str(error))
        else:
            self._send(HTTPStatus.OK, json.dumps(_shown(pairing), ensure_ascii=False).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # The rest of a refused request's body would be read as the next request.
        self.close_connection = True
        self._send(status, json.dumps({"error": reason}, ensure_ascii=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, nonce: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        if nonce:
            policy += f"; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        for name, value in {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed: they hold raters' names."""


def _shown(pairing: Pairing | None) -> dict[str, Any]:
    """What the page may know of a pair: no model's name."""
    if pairing is None:
        return {"done": True}
    return {
        "key": pairing.key,
        "number": pairing.number,
        "total": pairing.total,
        "prompt": pairing.left.question,
        "left": pairing.left.response,
        "right": pairing.right.response,
    }
