"""`search` and `open` through an HTTP endpoint: any that keeps to this contract, or a small proxy that translates.

    POST URL {"query": "...", "num_results": 5}  ->  {"results": [{"id": "...", "title": "...", "snippet": "..."}]}
    POST URL {"document": "id"}                  ->  {"id": "...", "title": "...", "text": "..."}

A URL with `{query}` in it (and, if wanted, `{num_results}`) is filled in and fetched by GET instead; documents cannot
be opened then. The key goes into one header, `Authorization: Bearer`, and no redirect is followed, which would carry
it to another host. Whatever the endpoint does is a ToolError of one line that never holds the body or the key.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from conf.errors import UserError
from rl.keys import read_key
from rl.tools.search import Document, Hit
from rl.tools.tool import ToolError

MAX_BYTES = 4 << 20  # of a reply
MAX_FIELD = 1000  # characters of an id, a title, a snippet
LONGEST_WAIT_S = 30.0  # that a Retry-After is obeyed


class HttpSearch:
    """A Source. `key_env`: the variable with the key, or None; `timeout_s`: of a request with its repetition.

    Clients are made for each request, so one HttpSearch serves any number of event loops one after another.
    """

    def __init__(self, url: str, key_env: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"rl.tools.search_url={url} is no http(s) address: give e.g. http://127.0.0.1:9000/search")
        self.url, self.timeout_s, self.by_get = url, timeout_s, "{query}" in url
        self._key = read_key("rl.tools.search_key_env", key_env, "an endpoint")

    async def find(self, query: str, num_results: int) -> list[Hit]:
        if self.by_get:
            filled = self.url.replace("{query}", quote(query, safe="")).replace("{num_results}", str(num_results))
            found = await self._ask("GET", filled, None)
        else:
            found = await self._ask("POST", self.url, {"query": query, "num_results": num_results})
        rows = found.get("results")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ToolError('the search endpoint\'s reply has no list of objects "results"')
        hits = [Hit(*(_field(row, name) for name in ("id", "title", "snippet"))) for row in rows[:num_results]]
        return hits

    async def document(self, name: str) -> Document:
        if self.by_get:
            raise ToolError("this search endpoint opens no documents: the snippets are all there is")
        found = await self._ask("POST", self.url, {"document": name})
        text = found.get("text")
        if not isinstance(text, str):
            raise ToolError('the search endpoint\'s reply has no "text"')
        return Document(_field(found, "id") or name[:MAX_FIELD], _field(found, "title"), text)

    async def _ask(self, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The reply's JSON object, after one repetition where the endpoint said when. ToolError."""
        import httpx

        try:
            async with asyncio.timeout(self.timeout_s):  # of it all: httpx's own start anew with every byte
                status, headers, reply = await self._once(method, url, body)
                if status == 429 and (wait := _retry_after(headers)) is not None:
                    await asyncio.sleep(wait)
                    status, headers, reply = await self._once(method, url, body)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ToolError(f"the search endpoint gave no reply within {self.timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ToolError(f"the connection to the search endpoint failed ({type(error).__name__})") from error
        if status == 429:
            raise ToolError("the search endpoint takes no more requests for now (HTTP 429): try again later")
        if status == 404 and body is not None and "document" in body:
            raise ToolError(f"there is no document {str(body['document'])[:100]!r}: take an id of a search result")
        if status != 200:
            raise ToolError(f"the search endpoint answered with HTTP {status}")
        try:
            found = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise ToolError("the search endpoint's reply is no JSON") from error
        if not isinstance(found, dict):
            raise ToolError("the search endpoint's reply is no JSON object")
        return found

    async def _once(
        self, method: str, url: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        import httpx

        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # a compressed reply has no bound
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        async with (
            httpx.AsyncClient(verify=_ssl_context(), timeout=self.timeout_s, follow_redirects=False) as client,
            client.stream(method, url, headers=headers, json=body) as response,
        ):
            reply = bytearray()
            async for part in response.aiter_raw():
                reply += part
                if len(reply) > MAX_BYTES:
                    raise ToolError(f"the search endpoint's reply is longer than {MAX_BYTES >> 20} MiB")
            return response.status_code, response.headers, bytes(reply)


@functools.cache  # made once: it takes longer than a request
def _ssl_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _field(row: Mapping[str, Any], name: str) -> str:
    """A field as one short line, "" where it lacks."""
    value = row.get(name)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return " ".join(text[:MAX_FIELD].split())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, where they are given and short enough to wait for."""
    value = headers.get("retry-after", "")
    seconds = float(value) if re.fullmatch(r"[0-9]{1,6}", value) else None
    return seconds if seconds is not None and seconds <= LONGEST_WAIT_S else None
