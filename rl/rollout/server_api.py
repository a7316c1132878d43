"""One server's HTTP: requests with deadlines, and what can go wrong with them, in three kinds.

    Failed    no connection (Gone), an answer that breaks off or cannot be read, none in time, HTTP 408 or 5xx
    Busy      429 or 503: it is paused or full, and will take the same request later
    Refused   any other status: the request will never be taken as it is

No redirect is followed and no proxy of the environment is used: the servers are the cluster's own. The key goes into
one header and into no message.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any

import httpx

REASON_CHARS = 300  # of a server's own words in a message


class Failed(Exception):
    """The same request may work later, or elsewhere."""


class Gone(Failed):
    """Nobody listens there."""


class Busy(Failed):
    """It asks to be left alone for a while."""


class Refused(Exception):
    """`status`, and the server's own reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerApi:
    """`url`: without a path; `key`: "" for none. All its coroutines run in one event loop."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        verify = ssl.create_default_context() if self.url.startswith("https:") else False  # dear to make
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=None,
            limits=limits,
            verify=verify,
            follow_redirects=False,
            trust_env=False,
        )

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        return await self._ask("GET", path, None, timeout_s, {})

    async def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float, **query: str) -> dict[str, Any]:
        return await self._ask("POST", path, body, timeout_s, query)

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float, query: Mapping[str, str]
    ) -> dict[str, Any]:
        """The answer's JSON object; {} where its body is empty or no object."""
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(timeout_s):  # of it all: httpx's own start anew with every byte
                answer = await self._client.request(method, path, json=body, params=query or None)
        except TimeoutError as error:
            raise Failed(f"{where} gave no answer within {timeout_s:g} s") from error
        except httpx.ConnectError as error:
            raise Gone(f"{where}: nobody listens there ({error})") from error
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise Failed(f"{where}: the connection failed ({type(error).__name__})") from error
        if answer.status_code == 200:
            return _object(answer.content, where)
        reason = f"{where}: HTTP {answer.status_code}{_reason(answer.content)}"
        if answer.status_code in (429, 503):
            raise Busy(reason)
        if answer.status_code == 408 or answer.status_code >= 500:
            raise Failed(reason)
        raise Refused(answer.status_code, reason)

    async def close(self) -> None:
        await self._client.aclose()


def _object(content: bytes, where: str) -> dict[str, Any]:
    if not content.strip():
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Failed(f"{where}: the answer is no JSON") from error
    return found if isinstance(found, dict) else {}


def _reason(content: bytes) -> str:
    """What the server says of it, as the end of a line."""
    text = " ".join(content[: 4 * REASON_CHARS].decode(errors="replace").split())
    return f" {text[:REASON_CHARS]}" if text else ""
