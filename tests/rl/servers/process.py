"""A server in a process that a test may kill and start again at the same address: forked, so that nothing is imported
again. `python -m tests.rl.servers` is the same without a test around it."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Self

import torch

from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import HttpServer
from tests.rl.servers.sglang_routes import sglang
from tests.rl.servers.vllm_routes import vllm

PROTOCOLS = {"vllm": vllm, "sglang": sglang}
START_S = 120.0


def _serve(model: str, protocol: str, port: int, places: int, length: int, missing: Sequence[str]) -> None:
    torch.set_num_threads(1)
    HttpServer(PROTOCOLS[protocol](Decoding(model, places, length), missing), port)._thread.join()


class ServerProcess:
    """A context manager. model: Hugging Face folder; length: max_model_len; missing: see the protocols."""

    def __init__(
        self, model: str, protocol: str, places: int = 16, length: int = 128, missing: Sequence[str] = ()
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._arguments = (model, protocol, port, places, length, missing)
        self.process: Any = None

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def has_died(self) -> bool:
        return self.process is not None and not self.process.is_alive()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=self._arguments, daemon=True)
        self.process.start()

    def wait(self) -> None:
        """Until it listens."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
            except urllib.error.URLError:
                assert not self.has_died and time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        """As kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def fault(self, kind: str, times: int = 1, **more: Any) -> None:
        self.post("/fault", {"kind": kind, "times": times, **more})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")
