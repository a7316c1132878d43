"""Hypothesis strategies for conversations, as hostile as text can be: every special token and tag spelled out, whole
and in part."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from data.calls import ToolCall
from data.context import Message
from data.dsml import BLOCK, END_BLOCK, END_INVOKE, END_PARAMETER, OPENER, inexpressible
from data.tokenizer import DSML, END_THINK, SPECIAL_TOKENS, THINK

ANY = st.characters(exclude_categories=["Cs"])
TAGS = (OPENER, BLOCK, END_BLOCK, END_INVOKE, END_PARAMETER, f'<{DSML}invoke name="f">', f'<{DSML}invoke name=f>',
        f'<{DSML}parameter name="k" string="true">', f'<{DSML}parameter name="n" string="false">', "<｜DS", "ML｜",
        "<function_results>", "</result>", "\n\n<function_results>\n<result>")  # fmt: skip
PIECES = (*SPECIAL_TOKENS, *TAGS, "<", ">", '"', '">', "\n", "\n\n", " ", "1", "[1,2]", "{}", "answer", "é", "🙂")
TEXT = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.text(ANY, max_size=6)
PLAIN = st.text(st.sampled_from("abc 12\n<>\"'é🙂{}%"), max_size=12)  # spells no special token


def without(text: str, *spellings: str) -> str:
    """Mended, not thrown away: Hypothesis is slow where most of what it makes is."""
    while any(spelling in text for spelling in spellings):
        for spelling in spellings:
            text = text.replace(spelling, "")
    return text


def arguments(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    leaves = st.none() | st.booleans() | numbers | text
    nested = st.lists(leaves, max_size=2) | st.dictionaries(text, st.lists(leaves, max_size=2) | leaves, max_size=2)
    pairs = st.lists(st.tuples(text, text | leaves | nested), max_size=3)
    return pairs.map(lambda found: {without(key, DSML, '" string="'): value for key, value in found})


def _call(name: str, made: dict[str, Any]) -> dict[str, Any]:
    call = ToolCall(without(name, DSML, '">') or "f", made)
    plain = made if inexpressible(call) is None else {"k": "v"}
    return {"type": "function", "function": {"name": call.name, "arguments": plain}}


def calls(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(_call, st.sampled_from(["search", "größe"]) | text, arguments(text))


def spoken(text: st.SearchStrategy[str], num_calls: int, max_calls: int) -> st.SearchStrategy[dict[str, Any]]:
    """A message of the assistant that can be told from what it says."""
    reasoning = text.map(lambda thought: without(thought, END_THINK))
    content = text.map(lambda words: without(words, OPENER, THINK))
    fields: dict[str, st.SearchStrategy[Any]] = {"role": st.just("assistant"), "content": content}
    if max_calls:
        fields["tool_calls"] = st.lists(calls(text), min_size=num_calls, max_size=max_calls)
    return st.fixed_dictionaries(fields, optional={"reasoning_content": reasoning})


def tools(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    function = st.fixed_dictionaries({"name": text, "description": text, "parameters": arguments(text)})
    return st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": function}), min_size=1, max_size=2)


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT, max_turns: int = 3) -> list[dict[str, Any]]:
    """As `check_messages` returns them, ending with an answer; but an empty `reasoning_content` may stand there."""
    extras = {"tools": tools(text), "response_format": arguments(text).filter(bool)}
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        system = {"role": st.just("system"), "content": text}
        messages.append(draw(st.fixed_dictionaries(system, optional=extras)))
    for _ in range(draw(st.integers(1, max_turns))):
        asking = {"role": st.just("user"), "content": text}
        if draw(st.integers(0, 3)) == 0:
            asking["role"] = st.just("developer")
            messages.append(draw(st.fixed_dictionaries(asking, optional=extras)))
        else:
            messages.append(draw(st.fixed_dictionaries(asking)))
        for _ in range(draw(st.integers(0, 2))):
            message = draw(spoken(text, 1, 2))
            results = [{"role": "tool", "content": draw(text)} for _ in message["tool_calls"]]
            messages += [message, *results]
        messages.append(draw(spoken(text, 0, 0)))
    return messages


def harmless(value: Any) -> Any:
    """The same conversation with an `x` for everything that anybody writes."""
    if isinstance(value, str):
        return "x"
    if isinstance(value, list):
        return [harmless(item) for item in value]
    if isinstance(value, dict):
        return {f"k{number}": harmless(item) for number, item in enumerate(value.values())}
    return value


def blank(message: Message) -> dict[str, Any]:
    kept = dict(message)
    for key in ("content", "reasoning_content", "response_format"):
        if key in kept:
            kept[key] = harmless(kept[key])
    if "tools" in kept:
        kept["tools"] = [{"function": harmless(tool["function"])} for tool in kept["tools"]]
    if "tool_calls" in kept:
        functions = [call["function"] for call in kept["tool_calls"]]
        plain = [{"name": "x", "arguments": {str(i): 0 for i in range(len(f["arguments"]))}} for f in functions]
        kept["tool_calls"] = [{"type": "function", "function": function} for function in plain]
    return kept


def as_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call as chat APIs return it: arguments as a string of JSON."""
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"])}}
