"""Search through an endpoint on loopback whose behaviour each test scripts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from conf.errors import UserError
from rl.tools.http_search import MAX_BYTES, HttpSearch
from rl.tools.search import Open, Search
from rl.tools.tool import ToolError

ROWS = [{"id": f"d{i}", "title": f"T{i}", "snippet": f"s\n{i}"} for i in range(12)]


@dataclass
class Reply:
    """`drip_s`: pause between two bytes of the body; `endless`: a body without end."""

    body: Any = field(default_factory=lambda: {"results": ROWS})
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.0
    hang_s: float = 0.0
    endless: bool = False


@dataclass
class Endpoint:
    """`asked`: (method, path, headers, body) of each request."""

    url: str = ""
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)


@contextmanager
def serve(behave: Callable[[int], Reply]) -> Iterator[Endpoint]:
    """behave: number of the request from 0 -> what to answer."""
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            state.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            try:
                self._answer(behave(len(state.asked) - 1))
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                pass

        do_POST = do_GET

        def _answer(self, reply: Reply) -> None:
            time.sleep(reply.hang_s)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            if not reply.endless:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            while reply.endless:
                self.wfile.write(b" " * 65536)
            if not reply.drip_s:
                self.wfile.write(body)
                return
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(reply.drip_s)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # 5 by default: connections of more trajectories at once are reset

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/find"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(
    url: str, query: str = "a b&c", num_results: int = 2, timeout_s: float = 5.0, key_env: str | None = None
) -> str:
    return asyncio.run(Search(HttpSearch(url, key_env, timeout_s)).call(query, num_results))


def test_post(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", " s3cret\n")
    with serve(lambda number: Reply()) as endpoint:
        shown = ask(endpoint.url, key_env="SEARCH_KEY")
    assert shown == "1. T0 [d0]\n   s 0\n2. T1 [d1]\n   s 1"
    ((method, path, headers, body),) = endpoint.asked
    assert (method, path, body) == ("POST", "/find", {"query": "a b&c", "num_results": 2})
    assert headers["authorization"] == "Bearer s3cret"


def test_get() -> None:
    with serve(lambda number: Reply()) as endpoint:
        ask(endpoint.url + "?q={query}&n={num_results}")
    ((method, path, headers, body),) = endpoint.asked
    assert (method, path, body) == ("GET", "/find?q=a%20b%26c&n=2", None)
    assert "authorization" not in headers


def test_open() -> None:
    replies = [Reply({"id": "d1", "title": "T", "text": "whole"}), Reply({"text": 3}), Reply({}, status=404)]
    with serve(lambda number: replies[number]) as endpoint:
        tool = Open(HttpSearch(endpoint.url, None, 5.0))
        assert asyncio.run(tool.call("d1")) == "T [d1]\nwhole"
        with pytest.raises(ToolError, match='has no "text"'):
            asyncio.run(tool.call("d1"))
        with pytest.raises(ToolError, match="there is no document 'd9'"):
            asyncio.run(tool.call("d9"))
    assert endpoint.asked[0][3] == {"document": "d1"}
    with pytest.raises(ToolError, match="opens no documents"):
        asyncio.run(Open(HttpSearch("http://127.0.0.1:1/?q={query}", None, 5.0)).call("d1"))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(b"<html>", headers={"Content-Type": "text/html"}), "reply is no JSON$"),
        (Reply(b"[" * 100_000), "reply is no JSON$"),
        (Reply(b"\xff\xfe\x00"), "reply is no JSON$"),
        (Reply([1]), "no JSON object"),
        (Reply({"results": {"a": 1}}), "has no list of objects"),
        (Reply({"results": ["a"]}), "has no list of objects"),
        (Reply({}, status=500), "HTTP 500"),
        (Reply({}, status=401), "HTTP 401"),
        (Reply({}, status=302, headers={"Location": "http://127.0.0.1:9/"}), "HTTP 302"),
        (Reply(b" " * (MAX_BYTES + 1)), "longer than 4 MiB"),
        (Reply(endless=True), "longer than 4 MiB"),
        (Reply(hang_s=2.0), r"no reply within 0\.5 s"),
        (Reply(drip_s=0.1), r"no reply within 0\.5 s"),
        (Reply(b"x\x9c", headers={"Content-Encoding": "deflate"}), "reply is no JSON$"),
    ],
)
def test_whatever_the_endpoint_does_is_one_line(reply: Reply, reason: str) -> None:
    with serve(lambda number: reply) as endpoint:
        began = time.monotonic()
        with pytest.raises(ToolError, match=reason) as caught:
            ask(endpoint.url, timeout_s=0.5 if reply.hang_s or reply.drip_s else 5.0)
        assert time.monotonic() - began < 2
        assert len(endpoint.asked) == 1
    assert "\n" not in str(caught.value)


def test_no_endpoint() -> None:
    with serve(lambda number: Reply()) as endpoint:
        pass  # it is gone, its port is free
    with pytest.raises(ToolError, match="the connection to the search endpoint failed"):
        ask(endpoint.url)


def test_a_rate_limit_with_a_time_is_waited_for_once() -> None:
    limited = Reply({}, status=429, headers={"Retry-After": "1"})
    with serve(lambda number: limited if number == 0 else Reply()) as endpoint:
        began = time.monotonic()
        assert ask(endpoint.url).startswith("1. T0")
        assert 1 <= time.monotonic() - began < 3
        assert len(endpoint.asked) == 2
    with serve(lambda number: limited) as endpoint:
        with pytest.raises(ToolError, match="takes no more requests for now"):
            ask(endpoint.url)
        assert len(endpoint.asked) == 2


@pytest.mark.parametrize("wait", ["", "3600", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", "9" * 400])
def test_a_rate_limit_without_a_time_to_wait_for_is_not(wait: str) -> None:
    with serve(lambda number: Reply({}, status=429, headers={"Retry-After": wait})) as endpoint:
        with pytest.raises(ToolError, match="takes no more requests for now"):
            ask(endpoint.url)
        assert len(endpoint.asked) == 1


def test_odd_rows_are_made_short_lines() -> None:
    rows = [{"id": 7, "title": None, "snippet": "x" * 10_000}, {"title": ["a"]}]
    with serve(lambda number: Reply({"results": rows})) as endpoint:
        shown = ask(endpoint.url, num_results=10)
    assert shown.split("\n") == ["1.  [7]", "   " + "x" * 1000, '2. ["a"] []', "   "]


def test_one_client_serves_several_loops_and_many_calls() -> None:
    with serve(lambda number: Reply()) as endpoint:
        tool = Search(HttpSearch(endpoint.url, None, 10.0))

        async def go() -> list[str]:
            return await asyncio.gather(*(tool.call("q", 1) for _ in range(16)))

        for _ in range(2):
            assert set(asyncio.run(go())) == {"1. T0 [d0]\n   s 0"}
        assert len(endpoint.asked) == 32


def test_mistakes_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("ftp://host/", "host:80", "http://", ""):
        with pytest.raises(UserError, match="no http"):
            HttpSearch(url, None, 1.0)
    monkeypatch.delenv("SEARCH_KEY", raising=False)
    with pytest.raises(UserError, match="search_key_env=SEARCH_KEY names a variable that is not set"):
        HttpSearch("http://127.0.0.1", "SEARCH_KEY", 1.0)
    monkeypatch.setenv("SEARCH_KEY", "s3cret\nX-Evil: 1")
    with pytest.raises(UserError, match="holds no key") as caught:
        HttpSearch("http://127.0.0.1", "SEARCH_KEY", 1.0)
    assert "s3cret" not in str(caught.value)
