"""What a model says -> calls: the form, what is tolerated, and what each mistake is told."""

from __future__ import annotations

import time

import pytest

from data.calls import ToolCall
from data.dsml import BLOCK, END_BLOCK, END_INVOKE, END_PARAMETER, OPENER, Turn, inexpressible, parse_turn
from data.tokenizer import DSML

INVOKE = f'<{DSML}invoke name="search">'


def parameter(value: str, name: str = "query", string: str = "true") -> str:
    return f'<{DSML}parameter name="{name}" string="{string}">{value}{END_PARAMETER}'


ONE = f"{BLOCK}\n{INVOKE}\n{parameter('x')}\n{END_INVOKE}\n{END_BLOCK}"


def altered(old: str, new: str) -> str:
    assert old in ONE
    return "</think>" + ONE.replace(old, new)


def test_a_thought_words_and_two_calls() -> None:
    numbers = parameter("3", "num", "false") + "\n" + parameter('{"a": [true, null]}', "more", "false")
    query = parameter(" a\nb ")
    text = f"Think.</think>Wait.\n\n{BLOCK}\n{INVOKE}\n{query}\n{numbers}\n{END_INVOKE}\n"
    text += f'<{DSML}invoke name="roll">\n\n{END_INVOKE}\n{END_BLOCK}'
    search = ToolCall("search", {"query": " a\nb ", "num": 3, "more": {"a": [True, None]}})
    assert parse_turn(text) == Turn("Think.", "Wait.", (search, ToolCall("roll")))


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("r</think>a", True, Turn("r", "a")),
        ("</think>a", True, Turn("", "a")),
        ("a</think>b", False, Turn("", "a</think>b")),
        ("r</think>a</think>b", True, Turn("r", "a</think>b")),
        (f"the form is {BLOCK}</think>a", True, Turn(f"the form is {BLOCK}", "a")),  # a thought is free text
        ("", False, Turn("", "")),
    ],
)
def test_without_calls(text: str, thinking: bool, expected: Turn) -> None:
    assert parse_turn(text, thinking) == expected


@pytest.mark.parametrize(
    "text",
    [
        ONE,
        "\n" + ONE,
        "\n\n" + ONE + "\n",
        ONE.replace("\n", ""),
        ONE.replace("\n", " \n\t "),
        ONE.replace('" string="true">', '"  string="true" >').replace('search">', 'search" >'),
    ],
)
def test_white_space_between_tags_is_free(text: str) -> None:
    assert parse_turn(text, thinking=False) == Turn("", "", (ToolCall("search", {"query": "x"}),))


@pytest.mark.parametrize(
    ("text", "at", "reason"),
    [
        ("thinking on and on", "", "the thought has no end: write </think> before the answer"),
        (f"call it\n\n{ONE}", OPENER, "the thought has no end: write </think> before the calls"),
        (f"</think>{OPENER}", OPENER, "a block of calls opens with <"),
        (f"</think>{BLOCK}", "", "the block has no end: close it with </"),
        (f"</think>{BLOCK}\n{END_BLOCK}", END_BLOCK, "the block holds no call"),
        (f"</think>{ONE.removesuffix(END_BLOCK)}", "", "the block has no end"),
        (f"</think>{ONE} done", "done", "text after the block"),
        (f"</think>{ONE}\n{ONE}", f"\n{BLOCK}", "a second block: put all calls into one"),
        (f'</think>{BLOCK}{{"name": "search"}}{END_BLOCK}', "{", """'{"name": "search"}<"""),
        (altered("invoke name", "invoke tool"), f"<{DSML}invoke", "a call opens with <"),
        (altered('"search"', "search"), f"<{DSML}invoke", "the name in quotes"),
        (altered('"search"', '""'), f"<{DSML}invoke", "the name in quotes"),
        (f"</think>{BLOCK}{INVOKE}", "", "the call of 'search' has no end: close it with </"),
        (altered(END_INVOKE, "so"), "so", "'so\\n</"),
        (altered('"query"', "query"), f"<{DSML}parameter", "a parameter opens with <"),
        (altered(' string="true"', ""), f"<{DSML}parameter", "a parameter opens with <"),
        (altered('"true"', '"yes"'), f"<{DSML}parameter", "a parameter opens with <"),
        (altered(END_PARAMETER, ""), f"<{DSML}parameter", "parameter 'query' has no end"),
        (altered(END_INVOKE, parameter("y") + END_INVOKE), parameter("y"), "given twice"),
        (altered('"true"', '"false"'), "x<", """'query' with string="false" is no JSON"""),
    ],
)
def test_a_malformed_block_is_told_where_and_why(text: str, at: str, reason: str) -> None:
    turn = parse_turn(text)
    assert turn.error is not None and reason in turn.error.reason and "\n" not in str(turn.error)
    assert turn.calls == () and text.startswith(at.strip("\n"), turn.error.position)
    assert turn.error.position == len(text) or at, "an error inside the text has a place"
    assert turn.reasoning + ("</think>" in text) * "</think>" + turn.content == text  # kept as it was said


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "[1,]", "", "[" * 100_000, "9" * 5000, '"\\ud800"'])
def test_json_that_could_not_be_written_again_is_an_error(value: str) -> None:
    turn = parse_turn(ONE.replace(parameter("x"), parameter(value, string="false")), thinking=False)
    assert turn.error is not None and ("no JSON" in turn.error.reason or "half a character" in turn.error.reason)
    assert turn.error.position == ONE.index("x<") + len("false") - len("true")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ToolCall("f", {"k": f"a{END_PARAMETER}b"}), "which would end it"),
        (ToolCall("f", {"k": [{"a": END_PARAMETER}]}), "which would end it"),
        (ToolCall("", {}), "cannot stand in a tag"),
        (ToolCall('a">b', {}), "cannot stand in a tag"),
        (ToolCall(f"{DSML}invoke", {}), "cannot stand in a tag"),
        (ToolCall("f", {'a" string="true">': 1}), "cannot stand in a tag"),
    ],
)
def test_what_cannot_be_written(call: ToolCall, reason: str) -> None:
    assert reason in (inexpressible(call) or "")


def test_what_can_be_written_though_it_looks_odd() -> None:
    odd = {'a"b': f"<{DSML}parameter name=", "": END_INVOKE, "x\ny": END_BLOCK, "s": "</think>"}
    assert inexpressible(ToolCall('f"', odd)) is None


def test_a_long_hostile_text_takes_no_time() -> None:
    started = time.process_time()
    for text in (
        f'{BLOCK}<{DSML}invoke name="' * 20_000,
        BLOCK + INVOKE + '"' * 10**6,
        BLOCK + (" " * 10**6 + "\n") + "x",
        f'{BLOCK}{INVOKE}<{DSML}parameter name="' + '" ' * 10**5,
        BLOCK + INVOKE + parameter("x" * 10**6) * 2,
    ):
        assert parse_turn(text, thinking=False).error is not None
    assert time.process_time() - started < 5
