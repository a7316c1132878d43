"""What is kept of a tool call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallRecord:
    """`name` and `arguments` as the model wrote them, as far as JSON can say them (else None); `result`: what it reads;
    `ended`: the call succeeded and its tool ends the trajectory."""

    name: str
    arguments: Any
    result: str
    error: bool
    seconds: float
    ended: bool = False
