"""Headless Chromium for tests of pages, spoken to over its debugging pipe: no driver, no further package.

Chromium is no part of `make setup`; where there is none, the tests that need it are skipped and say so.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
MISSING = f"no browser on the PATH: none of {', '.join(NAMES)}"
WAIT_S = 30.0


class Navigated(Exception):
    """The document went away while it was asked."""


class Browser:
    """One page. `errors` collects what its scripts threw and what its content policy refused."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._rest, self._number = reading, writing, b"", 0
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    _session: str | None = None

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated(answer["error"]["message"])
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            self._rest += os.read(self._reading, 1 << 20)
        line, _, self._rest = self._rest.partition(b"\0")
        message = dict(json.loads(line))
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])
        return message

    def look(self, dark: bool = False, width: int = 1400, height: int = 900) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = WAIT_S) -> Any:
        """Waits until the expression is true, in this document or the next, and returns it."""
        stop = time.monotonic() + seconds
        while True:
            with suppress(Navigated):
                if found := self.run(condition):
                    return found
            assert time.monotonic() < stop, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        codes = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32}
        pressed = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        said = {"text": text or key} if len(key) == 1 else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **pressed, **said)
        self._call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind`: mousePressed | mouseMoved | mouseReleased."""
        buttons = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def picture(self, path: Path, whole: bool = False) -> Path:
        """A PNG of what is on the screen, or of the whole page."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A fresh Chromium with its own profile folder; it reaches no other machine."""
    assert FOUND
    to_it, from_us = os.pipe()
    to_us, from_it = os.pipe()
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (to_it, from_it)]  # clear of 3 and 4

    def place() -> None:
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    command = [FOUND, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-dev-shm-usage", "--force-color-profile=srgb", f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=place, pass_fds=(3, 4)
    )
    for number in (to_it, from_it, *high):
        os.close(number)
    try:
        yield Browser(to_us, from_us)
    finally:
        for number in (to_us, from_us):
            os.close(number)
        process.terminate()
        process.wait(WAIT_S)
