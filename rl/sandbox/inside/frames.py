"""Messages over a stream: four bytes of length, then JSON. Whoever reads treats the writer as hostile.

A frame longer than its reader's limit, one that is no JSON object and one nested beyond reason are all a FrameError:
the reader gives the writer up. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from typing import Any

HEADER = struct.Struct(">I")


class FrameError(Exception):
    """The writer does not keep to the protocol."""


def pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()  # ASCII: lone surrogates of a model's text travel as escapes
    return HEADER.pack(len(body)) + body


def body_length(header: bytes, limit: int) -> int:
    """Bytes that follow a header. FrameError: more than `limit`."""
    (length,) = HEADER.unpack(header)
    if length > limit:
        raise FrameError(f"a message of {length} bytes, the limit is {limit}")
    return int(length)


def unpack(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"no JSON: {type(error).__name__}") from None
    if not isinstance(message, dict):
        raise FrameError(f"a {type(message).__name__} where an object was due")
    return message


def take(received: bytearray, limit: int) -> dict[str, Any] | None:
    """Cuts the first whole message off `received`; None while one is still coming."""
    if len(received) < HEADER.size:
        return None
    length = body_length(bytes(received[: HEADER.size]), limit)
    if len(received) < HEADER.size + length:
        return None
    body = bytes(received[HEADER.size : HEADER.size + length])
    del received[: HEADER.size + length]
    return unpack(body)
