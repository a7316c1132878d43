"""A chat-completions endpoint on loopback whose behaviour a test scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server does with one request. `raw`: the body itself; `hang_s`: before the first byte; `drip_s`: between
    two bytes of the body; `drip_headers`: a header line every 0.1 s, without end."""

    text: str | None = '{"score": 1}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    finish_reason: str = "stop"
    hang_s: float = 0.0
    drip_s: float = 0.0
    drip_headers: bool = False

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        choice = {"message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish_reason}
        return json.dumps({"choices": [choice]}).encode()


@dataclass
class JudgeServer:
    """`asked`: (path, headers, body) of every request, in order of arrival; `busiest`: requests at a time."""

    url: str = ""
    asked: list[tuple[str, dict[str, str], dict]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for _, _, body in self.asked]


@contextmanager
def serve(behave: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """behave: (prompt, number of the request from 0) -> what to answer."""
    state, lock = JudgeServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.asked)
                state.asked.append((self.path, dict(self.headers), body))
                state.busy += 1
                state.busiest = max(state.busiest, state.busy)
            try:
                self._answer(behave(body["messages"][0]["content"], number))
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                pass
            with lock:
                state.busy -= 1

        def _answer(self, reply: Reply) -> None:
            time.sleep(reply.hang_s)
            self.send_response(reply.status)
            if reply.drip_headers:
                self.flush_headers()
            while reply.drip_headers:
                self.wfile.write(b"X-Slow: 1\r\n")
                time.sleep(0.1)
            body = reply.body()
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not reply.drip_s:
                self.wfile.write(body)
                return
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(reply.drip_s)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
