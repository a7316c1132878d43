"""Rows -> messages: where reasoning and tools are found, the order of results, and rows that are no conversations."""

from __future__ import annotations

import json

import pytest

from data.check import check_messages
from data.dsml import END_PARAMETER
from data.tokenizer import DSML

USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}
RESULT = {"role": "tool", "content": "T"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def calling(*arguments: object, **fields: object) -> dict:
    made = [{"id": str(i), "function": {"name": "f", "arguments": given}} for i, given in enumerate(arguments)]
    return {"role": "assistant", "content": None, "tool_calls": made} | fields


def test_reasoning_is_found_wherever_data_sets_keep_it() -> None:
    question = {"role": "user", "content": "U", "name": None}
    expected = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}]
    for answer in (
        {"content": "A", "reasoning": "R"},
        {"content": "A", "reasoning_content": "R"},
        {"content": "<think>R</think>A"},
    ):
        assert check_messages([question, {"role": "assistant", **answer}]) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "not a list"),
        ([], "not a list"),
        (["hello"], "message 0 is not an object"),
        ([RESULT], "message 0 is a result that no call waits for"),
        ([{"role": "critic", "content": "x"}], "role 'critic'"),
        ([{"role": "user", "content": None}], "no string"),
        ([{"role": "user", "content": "x"}], "do not go"),
        ([{"role": "system", "content": "x"}], "do not go"),
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}], "do not go"),
        ([{"role": "user", "content": "x"}] * 2, "do not go"),
        ([USER, {"role": "system", "content": "S"}, ANSWER], "do not go"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}], "surrogates"),
        ([USER, ANSWER, RESULT], "message 2 is a result that no call waits for"),
        ([USER, calling({}), RESULT, RESULT], "message 3 is a result that no call waits for"),
        ([USER, calling({}, {}), RESULT, ANSWER], "message 3 stands where 1 results of calls belong"),
        ([USER, calling({}), USER, ANSWER], "message 2 stands where 1 results of calls belong"),
        ([USER, calling({}, {}), RESULT], "the last calls lack 1 results"),
        ([USER, calling({}), RESULT, USER, ANSWER], "do not go"),
        ([USER, calling("[1]")], "message 1's arguments for f is no JSON object"),
        ([USER, calling("{")], "message 1's arguments for f is no JSON"),
        ([USER, calling(None)], "no JSON object"),
        ([USER, calling({"k": float("nan")})], "no JSON"),
        ([USER, calling('{"k": 1e999}')], "no JSON"),
        ([USER, calling({"k": "\ud800"})], "surrogates"),
        ([USER, calling({"k": END_PARAMETER})], "cannot be written: parameter 'k' holds"),
        ([USER, calling("[" * 100_000)], "no JSON"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "without function and name"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": "f"}], "no list"),
        ([USER, calling({}, content=f"<{DSML}function_calls>")], "calls in its content"),
        ([{"role": "system", "content": "S", "tools": [{"name": "f"}]}, USER, ANSWER], "no JSON object"),
        ([{"role": "system", "content": "S", "tools": {"f": 1}}, USER, ANSWER], "message 0's tools is no list"),
        ([{"role": "system", "content": "S", "response_format": [1]}, USER, ANSWER], "no JSON object"),
    ],
)
def test_rows_that_are_no_conversations(messages: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_messages(messages)


def test_calls_come_out_as_objects_with_the_fields_that_are_read() -> None:
    row = [
        USER,
        calling('{"k": "é"}', {"n": [1]}, refusal=None),
        RESULT,
        RESULT | {"name": "f"},
        ANSWER | {"tool_calls": None},
    ]
    made = [{"type": "function", "function": {"name": "f", "arguments": given}} for given in ({"k": "é"}, {"n": [1]})]
    called = {"role": "assistant", "content": "", "tool_calls": made}
    assert check_messages(row) == [USER, called, RESULT, RESULT, ANSWER]
    assert check_messages(row[:2])[-1] == called  # a trajectory may end with a call, or with its result
    assert check_messages(row[:4])[-1] == RESULT


def test_tools_go_into_the_system_message() -> None:
    system = {"role": "system", "content": "S"}
    assert check_messages([USER, ANSWER], [TOOL])[0] == {"role": "system", "content": "", "tools": [TOOL]}
    assert check_messages([USER, ANSWER], json.dumps([TOOL]))[0]["tools"] == [TOOL]
    assert check_messages([system, USER, ANSWER], [TOOL | {"extra": 1}])[0] == system | {"tools": [TOOL]}
    assert check_messages([system | {"tools": [TOOL]}, USER, ANSWER], [TOOL])[0] == system | {"tools": [TOOL]}
    assert check_messages([system, USER, ANSWER], []) == [system, USER, ANSWER]
    assert check_messages([{"role": "developer", "content": "D", "tools": [TOOL]}, ANSWER])[0]["tools"] == [TOOL]
    with pytest.raises(ValueError, match="give them once"):
        check_messages([system | {"tools": [TOOL]}, USER, ANSWER], [TOOL, TOOL])


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_results_follow_their_calls_where_ids_say_which(tools: object) -> None:
    swapped = [RESULT | {"tool_call_id": "1", "content": "second"}, RESULT | {"tool_call_id": "0", "content": "first"}]
    found = [message["content"] for message in check_messages([USER, calling({}, {}), *swapped], tools)]
    assert found[-2:] == ["first", "second"]
    unknown = [result | {"tool_call_id": "7"} for result in swapped]
    assert [m["content"] for m in check_messages([USER, calling({}, {}), *unknown], tools)][-2:] == ["second", "first"]
