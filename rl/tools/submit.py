"""`submit`: hands in the answer and ends the trajectory."""

from __future__ import annotations

from typing import Any, ClassVar

from rl.tools.tool import Tool


class Submit(Tool):
    """The answer is the call's result, which environments verify."""

    name = "submit"
    description = "Hands in the final answer. Nothing can be done after it."
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"answer": {"type": "string", "description": "The answer alone."}},
        "required": ["answer"],
    }
    ends: ClassVar[bool] = True

    async def call(self, answer: str) -> str:
        return answer
