"""Tasks in a ticket office, synthesised: the generator makes world, task and verifier, and a scripted solution proves
that its tools suffice. The end state decides, whatever the policy says.

    1  one plain goal        "Book Ann a seat for opera. Change nothing else."
    2  one with a condition: the cheapest of a day, at most 30, two side by side, the dearest Ann can pay, another row
    3  two goals, or one that pays for another: cancel and refund, then the dearest that can then be paid
    4  three goals

`ticket_world.py` is the world, `ticket_goals.py` what can be asked for. A world and goals are kept only where the
solution fulfils the verifier and doing nothing does not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from data.calls import ToolCall
from data.split import digest
from rl.env.drawn import draw
from rl.env.environment import Environment, EnvProblem, Said, Solution
from rl.env.ticket_goals import Goal, budget_of, choices, solved, steps, words
from rl.env.ticket_world import Booking, Customer, Event, World, WorldTool, tools_of
from rl.tools.tool import Tool, ToolError

EVENTS = ("opera", "jazz", "chess", "drama", "dance", "films")
PEOPLE = ("Ann", "Ben", "Eva", "Max", "Ida", "Tom")
DAYS = ("mon", "tue", "wed")
ROWS = "ABC"  # the dearest first
PLAIN: tuple[str, ...] = ("any", "cheapest", "cancel", "refund")
CONDITIONED: tuple[str, ...] = ("limit", "day", "pair", "dearest", "move")
KINDS = {1: [PLAIN], 2: [CONDITIONED], 3: [PLAIN, CONDITIONED], 4: [PLAIN, CONDITIONED, CONDITIONED]}
BEGINS = ("First the events.", "Which events are there?", "List the events.")


def _world(rng: random.Random) -> World:
    events = []
    for number, name in enumerate(rng.sample(EVENTS, 4), 1):
        prices = sorted(rng.sample(range(10, 60, 5), len(ROWS)), reverse=True)
        seats = [f"{row}{place}" for row in ROWS for place in (1, 2, 3)]
        events.append(Event(f"E{number}", name, rng.choice(DAYS), dict(zip(ROWS, prices, strict=True)), seats))
    customers = [
        Customer(f"C{number}", name, rng.randrange(20, 101, 5)) for number, name in enumerate(rng.sample(PEOPLE, 4), 1)
    ]
    world = World(events, customers, [])
    for event in events:
        for seat in rng.sample(event.seats, rng.randint(3, 6)):
            owner = rng.choice(customers).id
            if not any(one.customer == owner and one.event == event.id for one in world.bookings.values()):
                key = f"K{len(world.bookings) + 1}"
                world.bookings[key] = Booking(key, owner, event.id, seat, event.prices[seat[0]])
    return world


def _goal(rng: random.Random, world: World, kind: str, customer: str, used: set[str]) -> Goal | None:
    """A goal of `kind` for a customer on events that are not in `used`; None where the world has none."""
    fresh = [event for event in world.events if event not in used]
    if kind in ("cancel", "refund", "move"):
        own = [one for one in world.bookings.values() if one.customer == customer and one.event in fresh]
        if not own:
            return None
        booking = rng.choice(own)
        if kind == "move":
            return {"kind": "move", "customer": customer, "booking": booking.id, "row": _other(rng, booking.seat[0])}
        return {"kind": "cancel", "customer": customer, "booking": booking.id, "refund": kind == "refund"}
    if not fresh:
        return None
    event = rng.choice(fresh)
    events = [event]
    if kind == "day":
        day = world.events[event].day
        events = [one for one in world.events if world.events[one].day == day]
        if len(events) < 2 or used & set(events):
            return None
    if any(one.customer == customer and one.event in events for one in world.bookings.values()):
        return None  # "Ann's booking for opera" stays one
    rule = {"day": "cheapest", "pair": "cheapest"}.get(kind, kind)
    seats = 2 if kind == "pair" else 1
    return {"kind": "book", "customer": customer, "events": events, "rule": rule, "seats": seats,
            "limit": rng.randrange(15, 50, 5)}  # fmt: skip


def _other(rng: random.Random, row: str) -> str:
    return rng.choice([other for other in ROWS if other != row])


def _make(rng: random.Random, level: int) -> EnvProblem | None:
    world = _world(rng)
    customers = rng.sample(list(world.customers), 3)
    if level == 3 and rng.random() < 0.5:
        wanted = [("refund", customers[0]), ("dearest", customers[0])]
    else:
        kinds = KINDS[level]
        wanted = [(rng.choice(kind), customer) for kind, customer in zip(kinds, customers, strict=False)]
    goals: list[Goal] = []
    used: set[str] = set()
    for kind, customer in wanted:
        goal = _goal(rng, world, kind, customer, used)
        if goal is None:
            return None
        if goals and goals[-1]["customer"] == customer:
            goal["then"] = True
        used |= set(goal["events"]) if goal["kind"] == "book" else {world.bookings[goal["booking"]].event}
        goals.append(goal)
    if not _worth(world, goals):
        return None
    prompt = " ".join([*(words(world, goal) for goal in goals), "Change nothing else."])
    state = json.dumps({"world": world.plain(), "goals": goals})
    return EnvProblem(prompt, "", f"tickets:{digest(state)}", state)


def _worth(start: World, goals: Sequence[Goal]) -> bool:
    """Whether the solution leads to the goals, doing nothing does not, and no free seat would do where a rule asks for
    certain ones."""
    end = start.copy()
    try:
        for goal in goals:
            for _ in steps(end, goal, budget_of(start, goals, goal["customer"]), start):
                pass
    except ToolError:
        return False
    for goal in goals:
        if goal["kind"] == "book" and goal["rule"] != "any":
            budget = budget_of(start, goals, goal["customer"])
            if len(choices(start, goal, budget)) == len(choices(start, goal | {"rule": "any"}, 10**6)):
                return False
    return solved(start, end, goals) and not solved(start, start, goals)


class TicketsEnvironment(Environment):
    name = "tickets"
    max_level = 4

    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        return draw(self.name, _make, index, split, seed, level, share)

    def tools(self, problem: EnvProblem) -> list[Tool]:
        return tools_of(World.from_plain(json.loads(problem.state)["world"]))

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        """1.0 where the world of `tools` is as the goals ask."""
        worlds = [tool.world for tool in tools if isinstance(tool, WorldTool)]
        state: dict[str, Any] = json.loads(problem.state)
        return float(bool(worlds) and solved(World.from_plain(state["world"]), worlds[0], state["goals"]))

    def solve(self, problem: EnvProblem) -> Solution:
        """The calls of each goal in turn, worked out on a world of its own."""
        rng = random.Random(problem.prompt)
        state = json.loads(problem.state)
        start, world = (World.from_plain(state["world"]) for _ in range(2))
        yield Said(rng.choice(BEGINS), calls=(ToolCall("list_events"),))
        for goal in state["goals"]:
            yield from steps(world, goal, budget_of(start, state["goals"], goal["customer"]), start)
        return Said("All is as asked.", "Done.")
