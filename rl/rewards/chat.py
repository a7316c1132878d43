"""One completion from an OpenAI-compatible endpoint, in a process that can be killed: `python -m rl.rewards.chat`.

In:  {"url", "model", "prompt", "key_env", "timeout_s", "not_before"}      (one JSON object a line, see worker.py)
Out: {"text": reply} or {"error": reason, "retry": bool, "after_s": seconds or null}

The key is read from the environment here and goes into one header and nowhere else: no redirect is followed, which
would carry it to another host, an error names the status and never the body, in which an endpoint may repeat it, and it
is cut out of a reply.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any

from rl.rewards.worker import serve

MAX_BYTES = 8 << 20  # of a reply
RETRIED = (408, 409, 425, 429)  # and every 5xx


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the 3xx stays an HTTPError."""
        return None


OPENER = urllib.request.build_opener(_NoRedirect)  # honours HTTPS_PROXY and NO_PROXY


def complete(job: Mapping[str, Any]) -> dict[str, Any]:
    """Waits for `not_before` (time.monotonic, which processes share), then asks once."""
    time.sleep(max(0.0, job["not_before"] - time.monotonic()))
    key = "" if job["key_env"] is None else os.environ[job["key_env"]].strip()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = {"model": job["model"], "messages": [{"role": "user", "content": job["prompt"]}]}
    request = urllib.request.Request(f"{job['url']}/chat/completions", json.dumps(body).encode(), headers)
    timeout_s, deadline = job["timeout_s"], time.monotonic() + job["timeout_s"]
    try:
        with OPENER.open(request, timeout=timeout_s) as response:
            answer = text_of(_read(response, deadline))
    except urllib.error.HTTPError as error:
        with error:
            again = error.code in RETRIED or error.code >= 500
            return {"error": f"HTTP {error.code}", "retry": again, "after_s": _retry_after(error.headers)}
    except (OSError, http.client.HTTPException) as error:  # whatever a network does
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        late = isinstance(cause, TimeoutError)
        reason = f"no reply within {timeout_s:g} s" if late else f"the connection failed ({type(cause).__name__})"
        return {"error": reason, "retry": True, "after_s": None}
    if key and "text" in answer:
        answer["text"] = answer["text"].replace(key, "<redacted>")
    return answer


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, up to one byte past MAX_BYTES. Raises TimeoutError past `deadline`, however it trickles in."""
    found = b""
    while len(found) <= MAX_BYTES:
        if time.monotonic() >= deadline:
            raise TimeoutError
        data = response.read1(1 << 16)
        if not data:
            break
        found += data
    return found


def text_of(body: bytes) -> dict[str, Any]:
    """{"text"} of a completion's JSON, or {"error"} with what is wrong with it."""
    broken = {"error": "the endpoint's reply is no chat completion", "retry": True, "after_s": None}
    if len(body) > MAX_BYTES:
        return {"error": f"the endpoint's reply is longer than {MAX_BYTES >> 20} MiB", "retry": False, "after_s": None}
    try:
        choice = json.loads(body)["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # any JSON, or none
        return broken
    if not isinstance(text, str):
        return broken
    if end == "length":
        return {"error": "the judge's reply was cut off", "retry": False, "after_s": None}
    return {"text": text}


def _retry_after(headers: Message) -> float | None:
    """Seconds of a Retry-After header; None where there is none (or a date)."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() and len(value) < 7 else None


if __name__ == "__main__":
    serve(lambda: complete)
