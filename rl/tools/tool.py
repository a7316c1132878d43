"""What a tool is: a name, a JSON schema, and one coroutine. A tool of your own is one class:

    class Dice(Tool):
        name = "dice"
        description = "Rolls a die once."
        parameters = {"type": "object", "properties": {"sides": {"type": "integer"}}, "required": ["sides"]}

        async def call(self, sides: int) -> str:
            return str(random.randint(1, sides))

    rl.tools.names=[my_package.my_module:Dice]

Each trajectory has tools of its own, so an instance may keep state; what they share (an index, a pool of processes) is
made once and handed to them. Whatever `call` raises costs that call: the model reads one line and goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar


class ToolError(Exception):
    """What the model did wrong or what the tool cannot do, in words that the model reads."""


class Tool(ABC):
    """`parameters`: JSON schema of an object, whose properties `call` takes by name; it is checked before the call."""

    name: str
    description: str
    parameters: dict[str, Any]
    ends: ClassVar[bool] = False  # a call that succeeds ends the trajectory, and its result is the answer (`submit`)

    @abstractmethod
    async def call(self, *args: Any, **arguments: Any) -> str:  # written so that a subclass may name its parameters
        """The result as text. It is called by keyword. ToolError: what the model is to read of a failure."""

    async def close(self) -> None:
        """Gives back what the instance holds; called once, also where a call has failed or was cut off."""
        return None

    def schema(self) -> dict[str, Any]:
        """The entry of `tools` in a request to a chat API, which is also how the encoder shows it to the model."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}
