"""The runner: whatever a model writes or a tool does costs that call and no more."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.calls import ToolCall
from rl.tools import runner
from rl.tools.calculator import Calculator
from rl.tools.plain import MAX_DEPTH, clean, cut
from rl.tools.runner import CallLimits, CallRecord, ToolBox
from rl.tools.submit import Submit
from rl.tools.tool import Tool, ToolError
from tests.rl.tools.own_tools import Anything, BadSchema, Deaf, Echo, Raises, Returns, Slow
from tests.rl.tools.test_http_search import Reply, serve


def play(tools: Sequence[Tool], *calls: ToolCall, limits: CallLimits | None = None) -> list[CallRecord]:
    """The records of one message, and the box is closed."""

    async def go() -> list[CallRecord]:
        box = ToolBox(tools, limits or CallLimits())
        try:
            return await box.run(calls)
        finally:
            await box.close()

    return asyncio.run(go())


def test_records_come_in_the_order_of_the_calls() -> None:
    calls = [
        ToolCall("slow", {"seconds": 0.05}),
        ToolCall("echo", {"text": "a"}),
        ToolCall("missing"),
        ToolCall("echo", {"text": "b"}),
    ]
    records = play([Echo(), Slow()], *calls)
    assert [record.result for record in records] == [
        "slept 0.05",
        "a",
        "Error: there is no tool missing: valid: echo, slow",
        "b",
    ]
    assert [record.error for record in records] == [False, False, True, False]
    assert records[0].seconds >= 0.05 > records[1].seconds
    assert records[1] == CallRecord("echo", {"text": "a"}, "a", False, records[1].seconds, False)


def test_calls_run_side_by_side_but_those_of_one_tool_one_after_another() -> None:
    class Other(Slow):
        name = "other"

    one, other = Slow(), Other()
    nap = {"seconds": 0.1}
    began = time.monotonic()
    play([one, other], ToolCall("slow", nap), ToolCall("other", nap), ToolCall("slow", nap))
    assert time.monotonic() - began < 0.29
    (first, second), (beside,) = one.spans, other.spans
    assert second[0] >= first[1]
    assert beside[0] < first[1] and first[0] < beside[1]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ToolCall("ecko", {"text": "a"}), "there is no tool ecko: did you mean echo?"),
        (ToolCall("echo", {}), "bad arguments for echo: 'text' is a required property"),
        (ToolCall("echo", {"text": 3}), "bad arguments for echo: text: 3 is not of type 'string'"),
        (ToolCall("echo", {"text": "a", "txt": 1}), "bad arguments for echo: there is no parameter txt: did you mean"),
        (ToolCall("echo", []), "the arguments of echo must be an object"),  # type: ignore[arg-type]
        (ToolCall("slow", {"seconds": math.nan}), "bad arguments: nan is no JSON number"),
        (ToolCall("slow", {"seconds": 10**5000}), "bad arguments: an integer of more than"),
        (ToolCall("slow", {"seconds": {1: 2}}), "bad arguments: an object has a int as a key"),
        (ToolCall("slow", {"seconds": object()}), "bad arguments: a object is no JSON value"),
        (ToolCall("echo", {"text": ["a"] * 20_000}), "bad arguments: more than 10000 values"),
        (ToolCall("returns", {}), "TypeError: the tool returned a int, not text"),
        (ToolCall("raises", {}), "KeyError: 'no such thing'"),
    ],
)
def test_a_bad_call_is_an_error_that_says_why(call: ToolCall, reason: str) -> None:
    record, good = play([Echo(), Slow(), Raises(), Returns(3)], call, ToolCall("echo", {"text": "on"}))
    assert record.error and not record.ended
    assert record.result.startswith("Error: " + reason)
    assert good.result == "on"


def test_deep_arguments_are_refused_whatever_they_hold() -> None:
    deep: Any = "end"
    for _ in range(100_000):
        deep = [deep]
    (record,) = play([Echo()], ToolCall("echo", {"text": deep}))
    assert record.result == f"Error: bad arguments: nested more than {MAX_DEPTH} deep"
    assert record.arguments is None


@pytest.mark.parametrize(
    "error", [SystemExit(3), RecursionError("deep"), MemoryError(), ExceptionGroup("many", [OSError("x")])]
)
def test_whatever_a_tool_raises_costs_that_call(error: BaseException) -> None:
    record, good = play([Raises(error), Echo()], ToolCall("raises"), ToolCall("echo", {"text": "on"}))
    assert record.error and good.result == "on"


def test_a_tool_that_cancels_itself_does_not_cancel_the_run() -> None:
    record, good = play(
        [Raises(asyncio.CancelledError()), Echo()], ToolCall("raises"), ToolCall("echo", {"text": "on"})
    )
    assert record.result == "Error: raises was cancelled from within"
    assert good.result == "on"


def test_an_exception_that_cannot_be_printed() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    (record,) = play([Raises(Mute())], ToolCall("raises"))
    assert record.result == "Error: Mute"


def test_a_tool_that_hangs_is_cut_off() -> None:
    slow = Slow()
    began = time.monotonic()
    hung, good = play(
        [slow, Echo()], ToolCall("slow"), ToolCall("echo", {"text": "on"}), limits=CallLimits(timeout_s=0.1)
    )
    assert time.monotonic() - began < 1
    assert hung.result == "Error: slow was cut off: no result within 0.1 s"
    assert good.result == "on"
    assert slow.cancelled == 1


def test_a_tool_that_does_not_let_itself_be_cancelled_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.05)

    async def go() -> tuple[list[CallRecord], float]:
        deaf = Deaf()
        box = ToolBox([deaf, Echo()], CallLimits(timeout_s=0.05))
        records = await box.run([ToolCall("deaf"), ToolCall("deaf"), ToolCall("echo", {"text": "on"})])
        began = time.monotonic()
        await box.close()
        seconds = time.monotonic() - began
        deaf.let_go.set()
        return records, seconds

    records, seconds = asyncio.run(go())
    assert [record.result for record in records] == [
        "Error: deaf was cut off: no result within 0.05 s",
        "Error: deaf still hangs in an earlier call and cannot be used",
        "on",
    ]
    assert seconds < 1


def test_a_cancelled_run_leaves_no_task() -> None:
    async def go() -> tuple[int, int, set[asyncio.Task[Any]]]:
        slow = Slow()
        box = ToolBox([slow], CallLimits())
        run = asyncio.create_task(box.run([ToolCall("slow")]))
        await asyncio.sleep(0.05)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        left = asyncio.all_tasks() - {asyncio.current_task()}
        await box.close()
        return slow.cancelled, slow.closed, left

    assert asyncio.run(go()) == (1, 1, set())


def test_the_budget_of_calls_counts_bad_ones_too() -> None:
    async def go() -> list[list[CallRecord]]:
        box = ToolBox([Echo()], CallLimits(max_calls=3))
        call = ToolCall("echo", {"text": "a"})
        records = [await box.run([call, ToolCall("missing")]), await box.run([call, call]), await box.run([call])]
        await box.close()
        return records

    first, second, third = asyncio.run(go())
    used_up = "Error: the budget of 3 calls is used up: answer without further calls"
    assert [record.result == used_up for record in first + second + third] == [False, False, False, True, True]


def test_the_budget_of_seconds() -> None:
    async def go() -> list[CallRecord]:
        box = ToolBox([Slow(), Echo()], CallLimits(total_seconds=0.2))
        nap = ToolCall("slow", {"seconds": 0.15})
        records = [*await box.run([nap]), *await box.run([nap]), *await box.run([ToolCall("echo", {"text": "a"})])]
        await box.close()
        return records

    first, second, third = asyncio.run(go())
    assert first.result == "slept 0.15"
    assert second.result.startswith("Error: slow was cut off: the budget of 0.2 s for calls is used up")
    assert second.seconds < 0.14
    assert third.result.startswith("Error: the budget of 0.2 s for calls is used up")


def test_an_answer_that_is_handed_in_is_not_cut() -> None:
    """It is what the verifier reads; results are cut for the model's sake."""
    (record,) = play([Submit()], ToolCall("submit", {"answer": "a" * 9000}), limits=CallLimits(max_result_chars=100))
    assert record.ended and record.result == "a" * 9000


def test_a_tool_that_ends_the_trajectory() -> None:
    good, bad = play([Submit()], ToolCall("submit", {"answer": "42"}), ToolCall("submit", {}))
    assert (good.result, good.ended, good.error) == ("42", True, False)
    assert bad.error and not bad.ended


def test_long_results_lose_their_middle() -> None:
    text = "a" * 5000 + "b" * 5000
    (record,) = play([Returns(text)], ToolCall("returns"), limits=CallLimits(max_result_chars=200))
    assert len(record.result) == 200
    assert record.result.startswith("aaa") and record.result.endswith("bbb")
    assert "[... 10000 characters in all, the middle is left out ...]" in record.result
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "abc"
    (record,) = play([Raises(ToolError(text))], ToolCall("raises"), limits=CallLimits(max_result_chars=200))
    assert len(record.result) == 200


def test_lone_surrogates_do_not_leave() -> None:
    assert clean("a\ud800b") == "a\ufffdb"
    assert clean("\ud83d\ude00") == "\U0001f600"  # a pair, which a parser of \\u escapes may leave as two
    (record,) = play([Echo()], ToolCall("echo", {"text": "a\udfffb"}))
    assert (record.result, record.arguments) == ("a\ufffdb", {"text": "a\ufffdb"})
    (record,) = play([Returns("\udc00")], ToolCall("returns"))
    assert record.result == "\ufffd"
    (record,) = play([], ToolCall("\ud800"))
    assert record.name == "\ufffd" and record.result == "Error: there is no tool \ufffd: there are no tools"


def test_tools_are_closed_once_and_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> tuple[Slow, Raises]:
        slow, raises = Slow(), Raises()
        box = ToolBox([slow, raises], CallLimits())
        await box.close()
        await box.close()
        return slow, raises

    slow, raises = asyncio.run(go())
    assert (slow.closed, raises.closed) == (1, 1)
    assert "the tool raises did not close: OSError: cannot close" in caplog.text


def test_mistakes_of_users() -> None:
    with pytest.raises(UserError, match="two tools have the name echo"):
        ToolBox([Echo(), Slow(), Echo()], CallLimits())
    with pytest.raises(UserError, match="the tool echo: parameters are no JSON schema"):
        ToolBox([BadSchema()], CallLimits())


def test_a_schema_fetches_nothing() -> None:
    with serve(lambda number: Reply({"type": "integer"})) as endpoint:

        class Remote(Anything):
            parameters = {"type": "object", "properties": {"a": {"$ref": endpoint.url}}}

        (record,) = play([Remote()], ToolCall("anything", {"a": 1}))
        assert endpoint.asked == []
    assert record.error and "Unresolvable" in record.result


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4000, max_value=10**5000)
    | st.floats()
    | st.text(st.characters(codec=None, categories=None), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec=None, categories=None), max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)
names = st.sampled_from(["echo", "anything", "calculator", "submit", "raises", ""]) | st.text(
    st.characters(codec=None, categories=None), max_size=20
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(ToolCall, names, json_like), max_size=4), st.integers(0, 200))
def test_hostile_calls_never_raise_and_records_are_plain(calls: list[ToolCall], chars: int) -> None:
    tools = [Echo(), Anything(), Calculator(), Submit(), Raises()]
    records = play(tools, *calls, limits=CallLimits(max_result_chars=chars))
    assert len(records) == len(calls)
    for record in records:
        assert len(record.result) <= chars
        line = json.dumps(vars(record), allow_nan=False, ensure_ascii=False).encode()
        assert json.loads(line)["result"] == record.result


sound_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(sound_json)
def test_sound_arguments_reach_the_tool_as_they_were(value: Any) -> None:
    (record,) = play([Anything()], ToolCall("anything", {"a": value}), limits=CallLimits(max_result_chars=10**6))
    assert record.arguments == {"a": value} and not record.error
    assert record.result == repr({"a": value})


def test_64_trajectories_with_hanging_raising_and_dying_tools_end_in_time() -> None:
    limits = CallLimits(timeout_s=0.2, total_seconds=1.0)

    async def trajectory(number: int) -> list[CallRecord]:
        box = ToolBox([Echo(), Slow(), Raises(SystemExit(1) if number % 2 else OSError("gone")), Returns(None)], limits)
        records = []
        for _ in range(3):
            calls = [ToolCall("slow"), ToolCall("raises"), ToolCall("returns"), ToolCall("echo", {"text": str(number)})]
            records += await box.run(calls)
        await box.close()
        return records

    async def go() -> list[list[CallRecord]]:
        return await asyncio.gather(*(trajectory(number) for number in range(64)))

    began = time.monotonic()
    all_records = asyncio.run(go())
    assert time.monotonic() - began < 5
    for number, records in enumerate(all_records):
        assert [record.error for record in records] == [True, True, True, False] * 3
        assert records[-1].result == str(number)
