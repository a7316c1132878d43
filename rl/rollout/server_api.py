"""One server's HTTP: requests with deadlines, and what can go wrong with them, in three kinds.

    Failed    no connection (Gone), an answer that breaks off or cannot be read, none in time, HTTP 408 or 5xx
    Busy      429 or 503: it is paused or full, and will take the same request later
    Refused   any other status: the request will never be taken as it is

No redirect is followed and no proxy of the environment is used: the servers are the cluster's own. The key goes into
one header and into no message.

aiohttp, because this runs beside the trainer and shares its interpreter: httpx looks through all its connections for
each of them at every request, and with 64 of them takes 40 times as long (`python -m bench http_client`).
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

REASON_CHARS = 300  # of a server's own words in a message
KEEP_S = 4.0  # an idle connection; servers (uvicorn) end it after 5 s, and a request on its way then is lost


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
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._session: aiohttp.ClientSession | None = None  # is made within the event loop

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        return _object(await self._ask("GET", path, None, timeout_s, {}), f"{self.url}{path}")

    async def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float, **query: str) -> dict[str, Any]:
        return _object(await self._ask("POST", path, body, timeout_s, query), f"{self.url}{path}")

    async def tell(self, path: str, timeout_s: float) -> None:
        """As `post` without a body, where the answer's status says everything and the rest may be any text."""
        await self._ask("POST", path, None, timeout_s, {})

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float, query: Mapping[str, str]
    ) -> bytes:
        where = f"{self.url}{path}"
        data = None if body is None else io.BytesIO(json.dumps(body, separators=(",", ":")).encode())
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._opened().request(method, where, data=data, params=query, allow_redirects=False) as answer,
            ):
                status, content = answer.status, await answer.read()
        except TimeoutError as error:
            raise Failed(f"{where} gave no answer within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise Gone(f"{where}: nobody listens there ({error})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed(f"{where}: the connection failed ({type(error).__name__})") from error
        if status == 200:
            return content
        reason = f"{where}: HTTP {status}{_reason(content)}"
        if status in (429, 503):
            raise Busy(reason)
        if status == 408 or status >= 500:
            raise Failed(reason)
        raise Refused(status, reason)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),  # rl.servers.concurrent bounds them
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # each request has its own
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None


def _object(content: bytes, where: str) -> dict[str, Any]:
    """The answer's JSON object; {} where its body is empty or no object."""
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
