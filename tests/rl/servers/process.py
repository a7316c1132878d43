"""A server in a process that a test may kill and start again at the same address."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[3]


class ServerProcess:
    """A context manager. `more`: further arguments of the command line."""

    def __init__(self, model: str, protocol: str, *more: str, port: int | None = None) -> None:
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            *(sys.executable, "-m", "tests.rl.servers", "--model", model),
            *("--protocol", protocol, "--port", str(port), *more),
        ]
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Until it listens."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on"), f"the server did not start: {line!r}"

    def kill(self) -> None:
        """As kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None

    def fault(self, kind: str, times: int = 1, **more: Any) -> None:
        self.post("/fault", {"kind": kind, "times": times, **more})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")
