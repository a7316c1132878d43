"""Tools by name: the built-in ones, `MODULE:CLASS` of the user's own, and whatever the MCP servers offer."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence

from conf.errors import UserError, nearest
from conf.schema import ToolsConfig
from rl.tools.calculator import Calculator
from rl.tools.python import PythonTool
from rl.tools.runner import described, validator
from rl.tools.search import Open, Search
from rl.tools.shared import Shared
from rl.tools.submit import Submit
from rl.tools.tool import Tool

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what chat APIs take as a function's name
INTERRUPT_S = 3.0  # that python's own deadline comes before the runner's, which costs the interpreter


def python_limits(config: ToolsConfig) -> tuple[float, int]:
    """Seconds of a call and calls of a trajectory."""
    return config.timeout_s - min(INTERRUPT_S, 0.25 * config.timeout_s), config.max_calls


def _python(shared: Shared) -> Tool:
    return PythonTool(shared.pool(), *python_limits(shared.config))


BUILT_IN: dict[str, Callable[[Shared], Tool]] = {
    "calculator": lambda shared: Calculator(),
    "python": _python,
    "search": lambda shared: Search(shared.source()),
    "open": lambda shared: Open(shared.source()),
    "submit": lambda shared: Submit(),
}


def open_tools(names: Sequence[str], shared: Shared) -> list[Tool]:
    """A trajectory's own tools, in the order of `names`, then those of the MCP servers.

    The first call makes what is shared and may take seconds; the others are cheap. UserError: a name that stands for
    nothing, a class that is no sound tool, two tools with one name, or what rl/tools/shared.py cannot make.
    """
    origins = [f"rl.tools.names: {name}" for name in names]
    tools = [_open(name, shared) for name in names]
    tools += (offered := shared.mcp_tools())
    origins += [f"rl.tools.mcp: {tool.name}" for tool in offered]
    taken: dict[str, str] = {}
    for tool, origin in zip(tools, origins, strict=True):
        if origin not in shared.sound:
            _check(tool, origin)
            shared.sound.add(origin)
        if tool.name in taken:
            raise UserError(f"{origin} and {taken[tool.name]} are both tools named {tool.name}: leave one out")
        taken[tool.name] = origin
    return tools


def _open(name: str, shared: Shared) -> Tool:
    if name in BUILT_IN:
        return BUILT_IN[name](shared)
    if ":" not in name:
        raise UserError(f"rl.tools.names: there is no tool {name}: {nearest(name, BUILT_IN)}; your own is MODULE:CLASS")
    made = _imported(name)
    try:
        return made()
    except UserError:
        raise
    except Exception as failure:  # the user's code
        raise UserError(f"rl.tools.names: {name}() raised {described(failure)}: it takes no arguments") from failure


def _imported(name: str) -> type[Tool]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"rl.tools.names: {name}: {error}: is its folder on PYTHONPATH?") from error
    except Exception as failure:  # the user's code
        raise UserError(f"rl.tools.names: {name}: importing {module_name} raised {described(failure)}") from failure
    found = vars(module).get(class_name)
    if not (inspect.isclass(found) and issubclass(found, Tool)):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Tool)]
        own = [key for key in classes if key != "Tool"]
        what = "is no class that extends rl.tools.tool.Tool" if class_name in vars(module) else "does not exist"
        hint = nearest(class_name, own) if own else f"{module_name} holds no such class"
        raise UserError(f"rl.tools.names: {name}: {class_name} {what}: {hint}")
    if inspect.isabstract(found):
        raise UserError(f"rl.tools.names: {name}: {class_name} has no method call: write `async def call(self, ...)`")
    return found


def _check(tool: Tool, origin: str) -> None:
    """UserError where a tool is not what the base class says."""
    for attribute in ("name", "description", "parameters"):
        if not hasattr(tool, attribute):
            raise UserError(f"{origin}: the class has no `{attribute}`: see rl/tools/tool.py")
    if not (isinstance(tool.name, str) and NAME.fullmatch(tool.name)):
        raise UserError(f"{origin}: {tool.name!r} is no name for a tool: up to 64 letters, digits, _ and -")
    if not isinstance(tool.description, str):
        raise UserError(f"{origin}: its description is no text")
    if not inspect.iscoroutinefunction(tool.call):
        raise UserError(f"{origin}: its method call is no coroutine: write `async def call(self, ...)`")
    validator(tool)
