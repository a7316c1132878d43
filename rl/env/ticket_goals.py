"""What a ticket task may ask for: the words, what fulfils it, and a way there.

A goal is plain JSON. Each names one customer; goals of one task touch different events, except that a booking may be
paid from what an earlier goal of the same customer gives back.

    {"kind": "book", "customer": "C1", "events": ["E1", "E2"], "rule": R, "limit": n, "seats": 1 or 2,
     "then": true where an earlier goal pays for it}
        R: any, limit (a seat of at most `limit`), cheapest, dearest (that the customer can pay); of the seats that were
        free at the beginning. Two seats stand side by side, and together are the cheapest such.
    {"kind": "cancel", "customer": "C1", "booking": "K1", "refund": true or false}
    {"kind": "move", "customer": "C1", "booking": "K1", "row": "A"}
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from data.calls import ToolCall
from rl.env.environment import Said
from rl.env.ticket_world import BOOKED, CANCELLED, REFUNDED, Booking, World
from rl.tools.tool import ToolError

Goal = dict[str, Any]
Choice = tuple[str, tuple[str, ...]]  # event, seats


def choices(start: World, goal: Goal, budget: int) -> list[Choice]:
    """Every (event, seats) that fulfils a book goal, in the order of events and seats."""
    options: list[tuple[int, Choice]] = []
    for event in goal["events"]:
        free = start.free_seats(event)
        groups = [(seat,) for seat in free] if goal["seats"] == 1 else _side_by_side(free)
        for seats in groups:
            price = sum(start.price(event, seat) for seat in seats)
            if price <= (min(budget, goal["limit"]) if goal["rule"] == "limit" else budget):
                options.append((price, (event, seats)))
    if goal["rule"] in ("cheapest", "dearest") and options:
        best = (min if goal["rule"] == "cheapest" else max)(price for price, _ in options)
        options = [option for option in options if option[0] == best]
    return [choice for _, choice in options]


def _side_by_side(free: Sequence[str]) -> list[tuple[str, ...]]:
    return [(a, b) for a in free for b in free if a[0] == b[0] and int(b[1:]) == int(a[1:]) + 1]


def budget_of(start: World, goals: Sequence[Goal], customer: str) -> int:
    """What a customer has once everything is refunded that the goals refund."""
    back = (start.bookings[goal["booking"]].paid for goal in goals if goal["kind"] == "cancel" and goal["refund"]
            and goal["customer"] == customer)  # fmt: skip
    return start.customers[customer].balance + sum(back)


def solved(start: World, end: World, goals: Sequence[Goal]) -> bool:
    """Whether `end` is what the goals ask for and nothing else has changed. A booking that was made, cancelled and
    refunded again changed nothing."""
    aims = {goal["booking"]: goal for goal in goals if goal["kind"] != "book"}
    for key, old in start.bookings.items():
        if not _as_asked(old, end.bookings[key], aims.get(key), start):
            return False
    new = [booking for key, booking in end.bookings.items() if key not in start.bookings and booking.state != REFUNDED]
    for goal in goals:
        if goal["kind"] == "book":
            made = [booking for booking in new if booking.customer == goal["customer"]]
            new = [booking for booking in new if booking.customer != goal["customer"]]
            found = ({booking.event for booking in made}, tuple(sorted(booking.seat for booking in made)))
            budget = budget_of(start, goals, goal["customer"])
            wanted = [({event}, seats) for event, seats in choices(start, goal, budget)]
            if found not in wanted or any(booking.state != BOOKED for booking in made):
                return False
    return not new


def _as_asked(old: Booking, now: Booking, goal: Goal | None, start: World) -> bool:
    if goal is None:
        return now == old
    if goal["kind"] == "cancel":
        return now.seat == old.seat and now.state == (REFUNDED if goal["refund"] else CANCELLED)
    return now.state == BOOKED and now.seat[0] == goal["row"]


def words(start: World, goal: Goal) -> str:
    """The goal as a sentence."""
    name = start.customers[goal["customer"]].name
    if goal["kind"] == "book":
        events = [start.events[event] for event in goal["events"]]
        where = f"for {events[0].name}" if len(events) == 1 else f"on {events[0].day}"
        if goal["seats"] == 2:
            return f"Book {name} two seats side by side {where}, as cheap as can be."
        then = "then " if goal.get("then") else ""
        return {
            "any": f"Book {name} a seat {where}.",
            "limit": f"Book {name} a seat {where} for at most {goal['limit']}.",
            "cheapest": f"Book {name} the cheapest free seat {where}.",
            "dearest": f"Book {name} the dearest free seat {where} that {name} can {then}pay.",
        }[goal["rule"]]
    booking = start.bookings[goal["booking"]]
    event = start.events[booking.event].name
    if goal["kind"] == "move":
        return f"Move {name}'s booking for {event} to row {goal['row']}."
    return f"Cancel {name}'s booking for {event} {'and refund it' if goal['refund'] else 'without a refund'}."


def steps(world: World, goal: Goal, budget: int, start: World) -> Generator[Said, Sequence[str], None]:
    """The calls to the goal. `world` is the solver's own, on which they are made too; ToolError where there is no
    way."""
    customer = world.customers[goal["customer"]]
    yield Said(f"Who is {customer.name}?", calls=(ToolCall("find_customer", {"name": customer.name}),))
    if goal["kind"] == "book":
        yield Said(f"{customer.name} is {customer.id}. The seats?",
                   calls=tuple(ToolCall("list_seats", {"event": event}) for event in goal["events"]))  # fmt: skip
        found = choices(start, goal, budget)
        if not found:
            raise ToolError("no seat will do")
        event, seats = found[0]
        for seat in seats:
            price = world.price(event, seat)
            world.book(customer.id, event, seat)
            call = ToolCall("book", {"customer": customer.id, "event": event, "seat": seat})
            yield Said(f"{seat} at {price} is right; book it.", calls=(call,))
        return
    booking = world.bookings[goal["booking"]]
    if goal["kind"] == "move":
        yield Said(f"It is {booking.id}. The seats?", calls=(ToolCall("list_seats", {"event": booking.event}),))
        free = [seat for seat in world.free_seats(booking.event) if seat[0] == goal["row"]]
        if not free:
            raise ToolError("no seat will do")
        world.change(booking.id, free[0])
        call = ToolCall("change", {"booking": booking.id, "seat": free[0]})
        yield Said(f"{free[0]} is free; move {booking.id} there.", calls=(call,))
        return
    world.cancel(booking.id)
    yield Said(f"It is {booking.id}; cancel it.", calls=(ToolCall("cancel", {"booking": booking.id}),))
    if goal["refund"]:
        world.refund(booking.id)
        yield Said("Now the refund.", calls=(ToolCall("refund", {"booking": booking.id}),))
