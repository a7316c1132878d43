"""Rows of others -> messages that `data.chat` can encode, or the reason why not in a few words.

A conversation: an optional system message, then user turns. A turn: a user's or developer's message, then the
assistant with calls and one result a call, any number of times, then an answer; the last turn may break off after calls
or results. Reasoning is in `reasoning_content` (or `reasoning`), or in the content between `<think>` and `</think>`.
Tools are in the system or a developer message, or beside the messages. `arguments` and `tools` may be JSON strings, for
tables, whose columns would fill in what a row lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.calls import ToolCall
from data.context import ASKING
from data.dsml import OPENER, inexpressible, parse_turn
from data.tokenizer import END_THINK, THINK

ROLES = ("system", "user", "developer", "assistant", "tool")
ORDER = "messages do not go (system) user assistant user assistant ..."


def check_messages(messages: Any, tools: Any = None) -> list[dict[str, Any]]:
    """A row's `messages` with only the fields we read, arguments as objects, results in their calls' order, and `tools`
    put into the system message. Raises ValueError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError("messages is not a list with at least one message")
    checked = [_message(message, f"message {number}") for number, message in enumerate(messages)]
    if tools:
        if checked[0]["role"] != "system":
            checked.insert(0, {"role": "system", "content": ""})
            messages = [{}, *messages]
        if checked[0].setdefault("tools", found := _tools(tools, "tools")) != found:
            raise ValueError("the system message has tools of its own: give them once")
    _check_order(checked)
    _sort_results(checked, messages)
    return checked


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is not an object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name} has role {role!r}, not one of {', '.join(ROLES)}")
    calls = _calls(message.get("tool_calls"), name) if role == "assistant" and message.get("tool_calls") else []
    schemas = {key: message.get(key) for key in ("tools", "response_format") if role in ("system", "developer")}
    if content is None and (calls or any(schemas.values())):
        content = ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise ValueError(f"{name} has content that is no string")
    (content + reasoning).encode("utf-8")  # a lone surrogate cannot be tokenised; UnicodeError is a ValueError
    if role == "assistant" and not reasoning and content.startswith(THINK) and END_THINK in content:
        reasoning, content = content.removeprefix(THINK).split(END_THINK, 1)
    checked: dict[str, Any] = {"role": role, "content": content}
    if reasoning:
        checked["reasoning_content"] = reasoning
    if role == "assistant" and OPENER in content and (calls or parse_turn(content, thinking=False).error is None):
        raise ValueError(f"{name} has calls in its content: they belong into tool_calls")
    if calls:
        checked["tool_calls"] = calls
    if schemas.get("tools"):
        checked["tools"] = _tools(schemas["tools"], f"{name}'s tools")
    if schemas.get("response_format"):
        checked["response_format"] = _object(schemas["response_format"], f"{name}'s response_format")
    return checked


def _calls(entries: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise ValueError(f"{name} has tool_calls that are no list")
    calls = []
    for entry in entries:
        function = entry.get("function") if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name} has a call without function and name")
        what = f"{name}'s arguments for {function['name']}"
        call = ToolCall(function["name"], _object(function.get("arguments"), what))
        call.name.encode("utf-8")
        if reason := inexpressible(call):
            raise ValueError(f"{name} has a call that cannot be written: {reason}")
        calls.append({"type": "function", "function": {"name": call.name, "arguments": call.arguments}})
    return calls


def _tools(tools: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        tools = _parsed(tools, name)
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ValueError(f"{name} is no list")
    found = []
    for tool in tools:
        function = _object(tool.get("function") if isinstance(tool, Mapping) else None, f"a function in {name}")
        if not isinstance(function.get("name"), str):
            raise ValueError(f"{name} has a function without name")
        found.append({"type": "function", "function": function})
    return found


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error})") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    """A copy that holds plain JSON and nothing else."""
    value = _parsed(value, name) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is no JSON object")
    try:
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error})") from None
    text.encode("utf-8")
    copy: dict[str, Any] = json.loads(text)
    return copy


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    expected: tuple[str, ...] = ("system", *ASKING)
    missing = 0  # results
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in expected and role == "tool":
            raise ValueError(f"message {number} is a result that no call waits for")
        if role not in expected and missing:
            raise ValueError(f"message {number} stands where {missing} results of calls belong")
        if role not in expected:
            raise ValueError(ORDER)
        if role == "system":
            expected = ASKING
        elif role in ASKING:
            expected = ("assistant",)
        elif role == "assistant":
            missing = len(message.get("tool_calls", ()))
            # a malformed block may be told what is wrong with it
            expected = ("tool",) if missing else (*ASKING, "tool") if OPENER in message["content"] else ASKING
        else:
            missing = max(missing - 1, 0)
            expected = ("tool",) if missing else ("assistant",)
    if role not in ("assistant", "tool"):
        raise ValueError(ORDER)
    if role == "tool" and missing:
        raise ValueError(f"the last calls lack {missing} results")


def _sort_results(checked: list[dict[str, Any]], messages: Sequence[Mapping[str, Any]]) -> None:
    """Puts results into their calls' order where ids say which belongs to which."""
    for index, message in enumerate(checked):
        if calls := message.get("tool_calls"):
            asked = [call.get("id") for call in messages[index]["tool_calls"]]
            place = slice(index + 1, index + 1 + len(calls))
            answered = [result.get("tool_call_id") for result in messages[place]]
            if all(isinstance(name, str) for name in asked) and len(set(asked)) == len(asked):
                if set(answered) == set(asked):
                    checked[place] = [checked[place][answered.index(name)] for name in asked]
