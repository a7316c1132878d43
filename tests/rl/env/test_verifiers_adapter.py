"""The adapter for `verifiers`: against a small fake of its v1 modules with the same names and signatures (0.4.0), since
the package brings 96 others; where it is installed, the same taskset runs on the real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.errors import UserError
from data.calls import ToolCall
from rl.env import verifiers_adapter as adapter
from rl.env.environment import EnvProblem
from rl.env.registry import choose
from rl.env.verifiers_adapter import VerifiersEnvironment, total
from rl.tools.runner import CallLimits, ToolBox

REAL = importlib.util.find_spec("verifiers") is not None
TASKSET = '''
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class Asked(vf.State):
    asked: int = 0

class Sums(vf.Toolset[vf.ToolsetConfig, Asked]):
    TOOL_PREFIX = "sums"

    async def setup_task(self, task):
        self.known = task.answer

    @vf.tool
    def add(self, a: int, b: int) -> int:
        """Adds two numbers."""
        assert self.known
        self.state.asked += 1
        return a + b

    @vf.tool
    async def fail(self, why: str = "x") -> str:
        """Fails."""
        raise RuntimeError(why)

class Sum(vf.Task[Data, Asked]):
    @vf.reward(weight=2.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward
    async def used(self, trace) -> float:
        return float(trace.state.asked == len(trace.tool_messages) > 0)

    @classmethod
    def toolsets(cls, config):
        return [Sums(vf.ToolsetConfig())]

class SumTasks(vf.Taskset[Sum]):
    def load(self):
        for i in range(40):
            data = Data(prompt=f"What is {i}+{7 * i}?", system_prompt="Be brief.", answer=str(8 * i))
            yield Sum(data, self.config.task)

__all__ = ["SumTasks"]
'''


# The fake: what the adapter touches, and nothing else


def mark(kind: str, **extra: Any) -> Any:
    def decorate(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda inner: decorate(inner, **options)
        setattr(function, kind, True)
        for name, value in (extra | options).items():
            setattr(function, f"_vf_{name}" if kind == "reward" else name, value)
        return function

    return decorate


def discover_decorated(one: Any, kind: str) -> list[Any]:
    names = {name for cls in type(one).__mro__ for name, member in vars(cls).items() if hasattr(member, kind)}
    return [getattr(one, name) for name in sorted(names)]


class Model:
    """In place of pydantic: fields by keyword, the class's values else."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


class TaskData(Model):
    prompt: Any = None
    system_prompt: str | None = None
    image: str | None = None

    @property
    def prompt_text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(one.content for one in self.prompt or ())


class State(Model):
    pass


class Task(Model):
    NEEDS_CONTAINER = False

    def __init__(self, data: TaskData, config: Any) -> None:
        super().__init__(data=data, config=config, key="k", hash="h")

    def __class_getitem__(cls, parameters: Any) -> Any:
        return type("Task", (cls,), {"state_type": parameters[1] if isinstance(parameters, tuple) else State})

    def hooks(self, kind: str) -> list[Any]:
        return discover_decorated(self, kind)

    async def setup(self, trace: Any, runtime: Any) -> None: ...
    async def finalize(self, trace: Any, runtime: Any) -> None: ...
    async def stage_verifier(self, trace: Any, runtime: Any) -> None: ...

    async def score(self, trace: Any, runtime: Any) -> None:
        for reward in self.hooks("reward"):
            score = await reward(trace)
            trace.rewards[reward.__name__] = SimpleNamespace(score=score, weight=getattr(reward, "_vf_weight", 1.0))

    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return []


class Toolset(Model):
    TOOL_PREFIX: str | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config=config, server_name=self.TOOL_PREFIX or "", state=self.state_type())

    def __class_getitem__(cls, parameters: Any) -> Any:
        return type("Toolset", (cls,), {"state_type": parameters[1] if isinstance(parameters, tuple) else State})

    def register(self, mcp: Any) -> None: ...
    async def setup(self) -> None: ...
    async def setup_task(self, task: Any) -> None: ...


class Taskset(Model):
    def __iter__(self) -> Iterator[Any]:
        return iter(self.load())  # type: ignore[attr-defined]

    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return []


@dataclass
class Trace:
    task: Any
    agent: Any
    nodes: list[Any]
    state: Any
    is_completed: bool
    ok: bool
    rewards: dict[str, Any] = field(default_factory=dict)

    @property
    def last_reply(self) -> str:
        return str(self.nodes[-1].message.content).strip()

    @property
    def tool_messages(self) -> list[Any]:
        return [node.message for node in self.nodes if node.message.role == "tool"]


class McpTool(Model):
    """mcp's: a schema of the function's annotations, and calls with checked arguments."""

    @classmethod
    def from_function(cls, function: Any, name: str, description: str | None) -> McpTool:
        code = function.__code__
        names = code.co_varnames[1 : code.co_argcount]
        parameters = {"type": "object", "properties": {name: {} for name in names}}
        is_async = asyncio.iscoroutinefunction(function)

        async def call(fn: Any, fn_is_async: bool, arguments: dict[str, Any], directly: Any) -> Any:
            found = fn(**arguments)
            return await found if fn_is_async else found

        metadata = SimpleNamespace(call_fn_with_arg_validation=call)
        return cls(fn=function, is_async=is_async, description=description, parameters=parameters, fn_metadata=metadata)


def message(role: str) -> Any:
    return lambda **values: SimpleNamespace(role=role, **({"content": None} | values))


def fake_modules() -> dict[str, types.ModuleType]:
    v1 = types.ModuleType("verifiers.v1")
    vars(v1).update(
        TaskData=TaskData, State=State, Task=Task, Toolset=Toolset, Taskset=Taskset, Trace=Trace,
        tool=mark("tool", tool_name=None), reward=mark("reward", weight=1.0),
        ToolsetConfig=lambda **values: SimpleNamespace(**({"url": None} | values)),
        SystemMessage=message("system"), UserMessage=message("user"), AssistantMessage=message("assistant"),
        ToolMessage=message("tool"), ToolCall=SimpleNamespace, MessageNode=SimpleNamespace, TraceTask=SimpleNamespace,
        AgentInfo=SimpleNamespace, AgentConfig=SimpleNamespace,
    )  # fmt: skip

    def taskset_class(name: str) -> Any:
        module = importlib.import_module(name)
        return getattr(module, module.__all__[0])

    def environment_class(name: str) -> Any:
        own = [one for one in importlib.import_module(name).__all__ if one.endswith("Env")]
        return type(own[0] if own else "SingleAgentEnv", (), {})

    loaders = types.ModuleType("verifiers.v1.utils.loaders")
    config = SimpleNamespace(task=SimpleNamespace(judges=[]))
    vars(loaders).update(
        taskset_class=lambda name: lambda given: taskset_class(name)(config=given),
        environment_class=environment_class,
        taskset_config_type=lambda name: lambda id: config,
    )
    decorators = types.ModuleType("verifiers.v1.utils.decorators")
    vars(decorators).update(discover_decorated=discover_decorated)
    state = types.ModuleType("verifiers.v1.state")
    vars(state).update(state_cls=lambda cls: cls.state_type)
    utils, package = types.ModuleType("verifiers.v1.utils"), types.ModuleType("verifiers")
    vars(utils).update(loaders=loaders, decorators=decorators)
    vars(package).update(v1=v1)
    mcp = types.ModuleType("mcp.server.mcpserver.tools.base")
    vars(mcp).update(Tool=McpTool)
    return {module.__name__: module for module in (package, v1, utils, loaders, decorators, state, mcp)}


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="no verifiers here"))])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where tasksets can be put to be imported."""
    if request.param == "fake":
        for name, module in fake_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for cache in (adapter.load_taskset, adapter._order):
        cache.cache_clear()
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def write(folder: Path, name: str, old: str = "", new: str = "") -> VerifiersEnvironment:
    """The taskset, with `old` replaced, under another name."""
    assert old in TASKSET
    (folder / f"{name}.py").write_text(TASKSET.replace(old, new) if old else TASKSET)
    return VerifiersEnvironment(name)


def first(environment: VerifiersEnvironment) -> EnvProblem:
    return environment.problem_at(3, "train", 0, 1, 0.1)


def test_prompts_tools_and_rewards(folder: Path) -> None:
    write(folder, "winnow_sums")
    environment, level = choose("verifiers:winnow_sums")
    problem = environment.problem_at(3, "train", 0, level, 0.1)
    number = int(problem.prompt.split("+")[0].split()[-1])
    assert problem.prompt == f"Be brief.\n\nWhat is {number}+{7 * number}?" and problem.answer == ""

    async def check() -> None:
        tools = environment.tools(problem)
        assert [(tool.name, tool.description) for tool in tools] == [
            ("sums_add", "Adds two numbers."),
            ("sums_fail", "Fails."),
        ]
        assert set(tools[0].parameters["properties"]) == {"a", "b"}
        box = ToolBox(tools, CallLimits())
        right = str(8 * number)
        assert await environment.verify(problem, right, tools) == pytest.approx(2 / 3)
        added, failed = await box.run(
            [ToolCall("sums_add", {"a": number, "b": 1}), ToolCall("sums_fail", {"why": "so"})]
        )
        assert (added.result, added.error, failed.error) == (str(number + 1), False, True) and "so" in failed.result
        assert await environment.verify(problem, right, tools) == pytest.approx(2 / 3)  # one of two calls was counted
        await box.run([ToolCall("sums_add", {"a": 1, "b": 1})])
        fresh = environment.tools(problem)
        await ToolBox(fresh, CallLimits()).run([ToolCall("sums_add", {"a": 1, "b": 1})])
        assert await environment.verify(problem, right, fresh) == 1.0
        assert await environment.verify(problem, "no", fresh) == pytest.approx(1 / 3)
        assert await environment.verify(problem, "", environment.tools(problem)) == 0.0

    asyncio.run(check())


def test_tasks_are_split_by_prompt_and_ordered_by_seed(folder: Path) -> None:
    environment = write(folder, "winnow_split")
    trained = {environment.problem_at(i, "train", 0, 1, 0.2).key for i in range(80)}
    held = {environment.problem_at(i, "heldout", 0, 1, 0.2).key for i in range(80)}
    assert trained and held and not trained & held and len(trained | held) == 40
    some = [environment.problem_at(i, "train", 1, 1, 0.2).prompt for i in range(5)]
    assert some == [environment.problem_at(i, "train", 1, 1, 0.2).prompt for i in range(5)]
    assert some != [environment.problem_at(i, "train", 2, 1, 0.2).prompt for i in range(5)]
    with pytest.raises(UserError, match="leaves no verifiers:winnow_split in the heldout split"):
        environment.problem_at(0, "heldout", 0, 1, 0.0)


HEAD, PROMPT, TOOLS = (
    "class Sum(vf.Task[Data, Asked]):\n",
    'prompt=f"What is {i}+{7 * i}?"',
    "[Sums(vf.ToolsetConfig())]",
)
TWICE = 'prompt=[vf.UserMessage(content="a"), vf.UserMessage(content="b")]'
AWAY = '[Sums(vf.ToolsetConfig(url="http://127.0.0.1:1"))]'
REFUSED = {
    "container": (HEAD, f"{HEAD}    NEEDS_CONTAINER = True\n\n", "it runs in a container"),
    "setup": (HEAD, f"{HEAD}    async def setup(self, trace, runtime): ...\n\n", r"it has setup\(\) for a runtime"),
    "runtime": ("used(self, trace)", "used(self, trace, runtime)", "its reward used needs a runtime"),
    "no reward": ("    @vf.reward", "    #", "it has no rewards"),
    "no prompt": (PROMPT, "prompt=None", "its prompt is no text"),
    "conversation": (PROMPT, TWICE, "its prompt is no text"),
    "elsewhere": (TOOLS, AWAY, "its tools Sums run elsewhere"),
    "two states": (TOOLS, "[Sums(vf.ToolsetConfig()), Sums(vf.ToolsetConfig())]", "two of its toolsets share a state"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name(folder: Path, kind: str) -> None:
    old, new, reason = REFUSED[kind]
    environment = write(folder, f"winnow_{kind.replace(' ', '_')}", old, new)
    with pytest.raises(UserError, match=f"task [0-9]+, is not supported: {reason}"):
        first(environment) if kind != "no prompt" else environment.problem_at(0, "train", 0, 1, 0.0)


def test_other_refusals(folder: Path) -> None:
    (folder / "winnow_own.py").write_text(TASKSET.replace('["SumTasks"]', '["SumTasks", "OwnEnv"]') + OWN)
    with pytest.raises(UserError, match="it brings an environment of its own"):
        first(VerifiersEnvironment("winnow_own"))
    with pytest.raises(UserError, match="has no tasks"):
        first(write(folder, "winnow_empty", "range(40)", "range(0)"))
    with pytest.raises(UserError, match="verifiers:winnow_none cannot be loaded .*: install its package"):
        first(VerifiersEnvironment("winnow_none"))
    environment = write(folder, "winnow_solver")
    with pytest.raises(UserError, match="has no scripted solver"):
        environment.solve(first(environment))


OWN = """

class OwnEnv(vf.Env[vf.EnvConfig] if hasattr(vf, "Env") else object):
    async def run(self, task, agents): ...
"""


def test_a_broken_reward_is_no_wrong_answer(folder: Path) -> None:
    environment = write(
        folder, "winnow_broken", "return float(trace.last_reply == self.data.answer)", "raise KeyError(1)"
    )
    problem = first(environment)
    with pytest.raises(Exception, match="1"):
        asyncio.run(environment.verify(problem, "1", environment.tools(problem)))


def test_rewards_are_weighed_and_stay_within_bounds() -> None:
    def of(*pairs: tuple[float, float]) -> float:
        return total({str(i): SimpleNamespace(score=score, weight=weight) for i, (score, weight) in enumerate(pairs)})

    assert of((1, 2), (0, 1)) == pytest.approx(2 / 3) and of((1, 1), (1, -0.5)) == 0.5
    assert of((5, 1)) == 1.0 and of((-5, 1)) == 0.0 and of((1, 0)) == 0.0 and of() == 0.0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not all finite"):
            of((bad, 1))
    with pytest.raises(ValueError, match="not all finite"):
        total({"right": None})


@pytest.mark.skipif(REAL, reason="verifiers is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install 'winnow\[verifiers\]'"):
        first(VerifiersEnvironment("anything"))


def test_a_problem_can_be_played_in_any_process(folder: Path) -> None:
    problem = first(write(folder, "winnow_plain"))
    assert json.loads(problem.state).keys() == {"task"}
