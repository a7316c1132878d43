"""HTTP/1.1 on loopback for a protocol's routes, and the faults that a test asks for.

POST /fault {"kind": K, "times": N, ...}   the next N requests for tokens go wrong:
    slow (seconds)   answered that much later
    busy             503, as while paused
    broken           500
    drop             the connection ends without an answer
    half             the answer breaks off in its middle
    garbled          the answer is no JSON
    odd              it is, of another shape
    nan              its log-probs are no numbers
    other_weights    what is drawn is stamped with a label that nobody gave
    die              the process ends (a server of its own)
and of weights: refuse_weights (500), spoil_weights (they are read, and then changed)
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.rl.servers.decoding import Decoding, Work

LOOK_S = 0.05  # between looks at whether the client is still there


class Answer(Exception):
    """Any status but 200."""

    def __init__(self, status: int, content: dict[str, Any] | str) -> None:
        super().__init__(status)
        self.status, self.content = status, content


class ClientLeft(Exception):
    pass


@dataclass
class Request:
    body: dict[str, Any]
    query: dict[str, str]
    wait: Callable[[Work], Any]  # for a request's tokens, unless the client leaves


Route = Callable[[Request], dict[str, Any] | str]  # a str: text that is no JSON


@dataclass
class Protocol:
    """`routes`: "METHOD /path" -> answer. `missing`: flags that it was started without, by name."""

    decoding: Decoding
    generate_path: str
    routes: dict[str, Route]
    faults: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, *kinds: str) -> dict[str, Any] | None:
        """The next of these kinds, used up once."""
        with self.lock:
            for fault in self.faults:
                if fault["kind"] not in kinds or fault.get("times", 1) < 1:
                    continue
                if fault.get("after", 0) > 0:
                    fault["after"] -= 1
                else:
                    fault["times"] = fault.get("times", 1) - 1
                    return fault
        return None


OF_TOKENS = ("slow", "busy", "broken", "drop", "half", "garbled", "odd", "nan", "die")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    protocol: Protocol

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a client that was killed, or gave up
            super().handle()

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        parts, protocol = urlsplit(self.path), self.protocol
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        protocol.counts[parts.path] += 1
        try:
            body = json.loads(content) if content.strip() else {}
            if parts.path == "/fault":
                protocol.faults.append(body)
                return self._send(200, {})
            if parts.path == "/counts":
                return self._send(200, {"tokens": protocol.decoding.num_tokens, **protocol.counts})
            route = protocol.routes.get(f"{method} {parts.path}")
            if route is None:
                return self._send(404, {"detail": "Not Found"})
            fault = protocol.fault(*OF_TOKENS) if parts.path == protocol.generate_path else None
            kind = "" if fault is None else fault["kind"]
            if kind == "slow":
                assert fault is not None
                time.sleep(fault["seconds"])
            elif kind == "die":
                os._exit(9)
            elif kind == "busy":
                return self._send(503, {"error": "paused"})
            elif kind == "broken":
                return self._send(500, {"error": "an error"})
            elif kind == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
            answer = route(Request(body, dict(parse_qsl(parts.query)), self._wait))
            self._send(200, answer, kind)
        except Answer as other:
            self._send(other.status, other.content)
        except (ClientLeft, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except (KeyError, TypeError, ValueError) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
        except Exception as error:  # a server's boundary
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, status: int, content: dict[str, Any] | str, kind: str = "") -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        if kind == "garbled":
            body = b"{" + body
        elif kind == "odd":
            body = b'{"choices": [{"token_ids": [1], "logprobs": [1]}], "output_ids": [1], "meta_info": [1]}'
        elif kind == "nan":
            body = re.sub(rb'(logprobs?": \[?)-?\d[\d.e-]*', rb"\1NaN", body)
        self.send_response(status)
        if not isinstance(content, str):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "half":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(body)

    def _wait(self, work: Work) -> Any:
        answer: Future[Any] = work.answer
        while True:
            try:
                return answer.result(LOOK_S)
            except NotYet:
                readable = select.select([self.connection], [], [], 0)[0]
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    self.protocol.decoding.abort([work.id])
                    raise ClientLeft from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def server_activate(self) -> None:
        self.connections: list[socket.socket] = []
        super().server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        """As where its process ends: open connections end too."""
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)


class HttpServer:
    """A protocol at `url`, until `close`; the decoding behind it goes on."""

    def __init__(self, protocol: Protocol, port: int = 0) -> None:
        self.protocol = protocol
        handler = type("Bound", (Handler,), {"protocol": protocol})
        self._server = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def fault(self, kind: str, times: int = 1, **more: Any) -> None:
        self.protocol.faults.append({"kind": kind, "times": times, **more})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
