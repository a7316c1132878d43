"""The tickets environment: the office keeps its books, every constraint has a trajectory that breaks it and fails, and
more than one end may be right."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from rl.env.registry import ENVIRONMENTS
from rl.env.ticket_goals import Goal, solved, words
from rl.env.ticket_world import Booking, Customer, Event, World, tools_of
from rl.env.tickets import _worth
from rl.tools.tool import Tool, ToolError
from tests.rl.env.test_environments import problems

TICKETS = ENVIRONMENTS["tickets"]
Calls = list[tuple[str, ...]]  # an operation and its arguments in order


def office() -> World:
    """Two events on mon, one on tue; Ann has 60 and K1 (opera B1 for 20), Ben has 30 and K2 (jazz A1 for 40)."""
    seats = ["A1", "A2", "B1", "B2", "B3", "C1"]
    return World(
        [
            Event("E1", "opera", "mon", {"A": 70, "B": 20, "C": 15}, list(seats)),
            Event("E2", "jazz", "mon", {"A": 40, "B": 30, "C": 10}, list(seats)),
            Event("E3", "chess", "tue", {"A": 70, "B": 50, "C": 25}, list(seats)),
        ],
        [Customer("C1", "Ann", 60), Customer("C2", "Ben", 30)],
        [Booking("K1", "C1", "E1", "B1", 20), Booking("K2", "C2", "E2", "A1", 40)],
    )


def book(customer: str, *events: str, rule: str = "any", seats: int = 1, limit: int = 0) -> Goal:
    return {"kind": "book", "customer": customer, "events": list(events), "rule": rule, "seats": seats, "limit": limit}


def cancel(customer: str, booking: str, refund: bool) -> Goal:
    return {"kind": "cancel", "customer": customer, "booking": booking, "refund": refund}


MOVE = {"kind": "move", "customer": "C1", "booking": "K1", "row": "C"}
PAID = [cancel("C1", "K1", True), book("C1", "E3", rule="dearest")]  # 60 and 20 back: 70 can be paid


def after(calls: Calls) -> World:
    """The office after calls, which all succeed."""
    world = office()
    for name, *arguments in calls:
        getattr(world, name)(*arguments)
    return world


@pytest.mark.parametrize(
    ("goals", "right", "wrong"),
    [
        pytest.param(
            [book("C1", "E2")],
            [[("book", "C1", "E2", "B2")], [("book", "C1", "E2", "C1")]],
            [
                [("book", "C1", "E1", "B2")],  # another event
                [("book", "C2", "E2", "B2")],  # another customer
                [("book", "C1", "E2", "B2"), ("book", "C1", "E2", "C1")],  # one too many
                [("book", "C1", "E2", "B2"), ("book", "C2", "E1", "C1")],  # and one that nobody asked for
                [("book", "C1", "E2", "B2"), ("cancel", "K2")],  # another booking changed
                [("book", "C1", "E2", "B2"), ("cancel", "K1"), ("refund", "K1")],
                [("book", "C1", "E2", "B2"), ("change", "K1", "B2")],
                [("book", "C1", "E2", "B2"), ("cancel", "K3")],  # given up again
                [("book", "C1", "E2", "C1"), ("cancel", "K3"), ("book", "C1", "E2", "B2")],  # the money is lost
            ],
            id="any seat",
        ),
        pytest.param(
            [book("C1", "E2", rule="cheapest")],
            [
                [("book", "C1", "E2", "C1")],
                [("book", "C1", "E2", "B1"), ("cancel", "K3"), ("refund", "K3"), ("book", "C1", "E2", "C1")],
            ],
            [[("book", "C1", "E2", "B1")], [("book", "C1", "E2", "C1"), ("change", "K3", "B1")]],
            id="the cheapest",
        ),
        pytest.param(
            [book("C1", "E1", "E2", rule="cheapest")],
            [[("book", "C1", "E2", "C1")]],
            [[("book", "C1", "E1", "C1")], [("book", "C1", "E3", "C1")]],
            id="the cheapest of a day",
        ),
        pytest.param(
            [book("C1", "E2", rule="limit", limit=35)],
            [[("book", "C1", "E2", "B1")], [("book", "C1", "E2", "C1")]],
            [[("book", "C1", "E2", "A2")]],
            id="at most",
        ),
        pytest.param(
            [book("C1", "E3", rule="dearest")],
            [[("book", "C1", "E3", "B2")]],
            [
                [("book", "C1", "E3", "C1")],
                [
                    ("cancel", "K1"),
                    ("refund", "K1"),
                    ("book", "C1", "E3", "A1"),
                ],  # paid with what was not to be touched
            ],
            id="the dearest that can be paid",
        ),
        pytest.param(
            [book("C1", "E2", rule="cheapest", seats=2)],
            [
                [("book", "C1", "E2", "B1"), ("book", "C1", "E2", "B2")],
                [("book", "C1", "E2", "B3"), ("book", "C1", "E2", "B2")],
            ],
            [
                [("book", "C1", "E2", "B1"), ("book", "C1", "E2", "B3")],  # not side by side
                [("book", "C1", "E2", "C1"), ("book", "C1", "E2", "B1")],
                [("book", "C1", "E2", "B1")],
                [("book", "C1", "E1", "B2"), ("book", "C1", "E2", "B2")],
            ],
            id="two side by side",
        ),
        pytest.param(
            [cancel("C1", "K1", False)],
            [[("cancel", "K1")]],
            [[("cancel", "K1"), ("refund", "K1")], [("cancel", "K2")], [("change", "K1", "C1"), ("cancel", "K1")]],
            id="cancelled without a refund",
        ),
        pytest.param(
            [cancel("C1", "K1", True)],
            [[("cancel", "K1"), ("refund", "K1")]],
            [[("cancel", "K1")], [("cancel", "K2"), ("refund", "K2")]],
            id="refunded",
        ),
        pytest.param(
            [MOVE],
            [[("change", "K1", "C1")], [("change", "K1", "B2"), ("change", "K1", "C1")]],
            [
                [("change", "K1", "B2")],
                [("cancel", "K1"), ("refund", "K1"), ("book", "C1", "E1", "C1")],
                [("change", "K1", "C1"), ("cancel", "K1")],
            ],
            id="moved",
        ),
        pytest.param(
            PAID,
            [[("cancel", "K1"), ("refund", "K1"), ("book", "C1", "E3", "A1")]],
            [
                [("cancel", "K1"), ("refund", "K1")],
                [("cancel", "K1"), ("refund", "K1"), ("book", "C1", "E3", "B1")],
                [("book", "C1", "E3", "B1"), ("cancel", "K1"), ("refund", "K1")],
            ],
            id="paid by a refund",
        ),
        pytest.param(
            [MOVE, book("C2", "E2", rule="cheapest")],
            [[("book", "C2", "E2", "C1"), ("change", "K1", "C1")]],
            [[("change", "K1", "C1")], [("book", "C2", "E2", "C1")]],
            id="two goals",
        ),
    ],
)
def test_each_constraint_has_a_trajectory_that_breaks_it(
    goals: list[Goal], right: list[Calls], wrong: list[Calls]
) -> None:
    for calls in right:
        assert solved(office(), after(calls), goals), calls
    for calls in [[], *wrong]:
        assert not solved(office(), after(calls), goals), calls
    assert all(words(office(), goal).endswith(".") for goal in goals)


def test_a_task_must_have_a_way_and_need_it() -> None:
    worthy = [[MOVE], PAID, [book("C1", "E2")], [book("C1", "E2", rule="limit", limit=35)]]
    assert all(_worth(office(), goals) for goals in worthy)
    worthless = {
        "done already": [MOVE | {"row": "B"}],
        "nothing that can be paid": [book("C2", "E3", rule="limit", limit=20)],
        "the difference cannot be paid": [{"kind": "move", "customer": "C1", "booking": "K1", "row": "A"}],
        "every free seat will do": [book("C1", "E2", rule="limit", limit=45)],
    }
    poor = office()
    poor.customers["C1"].balance = 10
    assert not any(_worth(poor if "difference" in why else office(), goals) for why, goals in worthless.items())


def test_the_office_refuses_what_cannot_be_done_and_changes_nothing() -> None:
    refused: Calls = [
        ("book", "C1", "E1", "A1"),  # 70 of 60
        ("book", "C1", "E1", "B1"),  # taken
        ("book", "C1", "E1", "Z9"),
        ("book", "C9", "E1", "C1"),
        ("book", "C1", "E9", "C1"),
        ("change", "K1", "B1"),  # its own seat is taken
        ("change", "K2", "A1"),
        ("change", "K1", "A2"),  # 50 more; Ann could pay that, so:
        ("cancel", "K9"),
        ("refund", "K1"),  # not cancelled
        ("find_customer", "Nobody"),
        ("list_seats", "E9"),
    ]
    for name, *arguments in refused:
        world = office()
        if (name, *arguments) == ("change", "K1", "A2"):
            world.customers["C1"].balance = 49
        before = json.dumps(world.plain())
        with pytest.raises(ToolError):
            getattr(world, name)(*arguments)
        assert json.dumps(world.plain()) == before
    world = after([("cancel", "K1"), ("refund", "K1")])
    for name in ("cancel", "refund"):
        with pytest.raises(ToolError, match="is refunded"):
            getattr(world, name)("K1")


def test_money_is_neither_made_nor_lost() -> None:
    def worth(world: World) -> int:
        """Balances and what stands in bookings that hold or could be refunded."""
        held = sum(one.paid for one in world.bookings.values() if one.state != "refunded")
        return held + sum(customer.balance for customer in world.customers.values())

    for calls in (
        [("book", "C1", "E2", "B1"), ("change", "K3", "A2"), ("change", "K3", "C1"), ("cancel", "K3")],
        [("cancel", "K1"), ("refund", "K1"), ("book", "C2", "E1", "B1")],
        [("change", "K2", "C1"), ("cancel", "K2"), ("refund", "K2")],
    ):
        assert worth(after(calls)) == worth(office())
    assert after([("cancel", "K1"), ("book", "C2", "E1", "B1")]).bookings["K3"].seat == "B1"  # the seat is free again


def test_tools_say_what_is_there_and_share_one_world() -> None:
    tools: dict[str, Tool] = {tool.name: tool for tool in tools_of(office())}

    async def call(tool: str, **arguments: Any) -> str:
        return await tools[tool].call(**arguments)

    async def check() -> None:
        assert await call("list_events") == "E1 opera mon\nE2 jazz mon\nE3 chess tue"
        assert await call("list_seats", event="E1") == "A1 70, A2 70, B2 20, B3 20, C1 15"
        assert await call("find_customer", name="Ann") == "C1 Ann balance 60\nK1 E1 B1 paid 20 booked"
        assert await call("book", customer="C1", event="E2", seat="C1") == "K3 booked, balance 50"
        assert "K3 E2 C1 paid 10 booked" in await call("find_customer", name="Ann")
        for arguments in ({}, {"customer": "C1", "event": 2, "seat": "C1"}, {"customer": "C1"}, {"event": "E1"}):
            with pytest.raises(ToolError, match="book takes the strings customer, event, seat"):
                await call("book", **arguments)
        for hostile in ("\ud800", "9" * 10**6, "E1\0"):
            with pytest.raises(ToolError):
                await call("list_seats", event=hostile)

    asyncio.run(check())


def test_trajectories_share_nothing() -> None:
    problem = problems("tickets", 1, 1)[0]
    first, second = TICKETS.tools(problem), TICKETS.tools(problem)
    world: World = first[0].world  # type: ignore[attr-defined]
    world.bookings.clear()
    assert second[0].world.bookings  # type: ignore[attr-defined]
    assert asyncio.run(TICKETS.verify(problem, "Done.", [])) == 0.0


def test_levels_hold_every_kind_of_goal_and_grow() -> None:
    kinds: dict[int, Counter[str]] = {}
    numbers = []
    for level in (1, 2, 3, 4):
        found = [json.loads(problem.state)["goals"] for problem in problems("tickets", level, 120)]
        numbers.append(sum(map(len, found)) / len(found))
        kinds[level] = Counter(
            goal.get("rule", goal["kind"]) + str(len(goal.get("events", ""))) * (goal.get("rule") == "cheapest")
            for goals in found
            for goal in goals
        )
        for problem, goals in zip(problems("tickets", level, 120), found, strict=True):
            assert problem.prompt.count(".") == len(goals) + 1
    assert numbers == sorted(numbers) and numbers[0] == 1 and numbers[-1] == 3
    assert set(kinds[1]) == {"any", "cheapest1", "cancel"}
    assert {"limit", "dearest", "move", "cheapest1", "cheapest2"} <= set(kinds[2])
    paid = [p.prompt for p in problems("tickets", 3, 120) if "can then pay" in p.prompt]
    assert 20 < len(paid) < 100 and all("and refund it" in prompt for prompt in paid)
