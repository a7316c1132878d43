"""A small ticket office: events with seats, customers with money, bookings; and the tools that act on it.

One `World` belongs to one trajectory and is shared by its tools. Every operation either does what it says or raises
ToolError and changes nothing. A row has one price; a booking keeps what was paid for it.

    book      takes the price from the customer's balance, who must have it
    change    another free seat of the same event; the difference is paid or given back
    cancel    frees the seat and gives nothing back
    refund    gives back what was paid for a cancelled booking, once
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rl.tools.tool import Tool, ToolError

BOOKED, CANCELLED, REFUNDED = "booked", "cancelled", "refunded"


@dataclass
class Event:
    id: str
    name: str
    day: str
    prices: dict[str, int]  # of a seat in each row
    seats: list[str]  # "A1": row and number


@dataclass
class Customer:
    id: str
    name: str
    balance: int


@dataclass
class Booking:
    id: str
    customer: str
    event: str
    seat: str
    paid: int
    state: str = BOOKED


class World:
    def __init__(self, events: list[Event], customers: list[Customer], bookings: list[Booking]) -> None:
        self.events = {event.id: event for event in events}
        self.customers = {customer.id: customer for customer in customers}
        self.bookings = {booking.id: booking for booking in bookings}

    @classmethod
    def from_plain(cls, plain: dict[str, list[dict[str, Any]]]) -> World:
        return cls(
            [Event(**event) for event in plain["events"]],
            [Customer(**customer) for customer in plain["customers"]],
            [Booking(**booking) for booking in plain["bookings"]],
        )

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "events": [asdict(event) for event in self.events.values()],
            "customers": [asdict(customer) for customer in self.customers.values()],
            "bookings": [asdict(booking) for booking in self.bookings.values()],
        }

    def copy(self) -> World:
        return World.from_plain(json.loads(json.dumps(self.plain())))

    def price(self, event: str, seat: str) -> int:
        return self.events[event].prices[seat[0]]

    def free_seats(self, event: str) -> list[str]:
        taken = {one.seat for one in self.bookings.values() if one.event == event and one.state == BOOKED}
        return [seat for seat in self.events[event].seats if seat not in taken]

    # What the tools do

    def list_events(self) -> str:
        return "\n".join(f"{event.id} {event.name} {event.day}" for event in self.events.values())

    def list_seats(self, event: str) -> str:
        self._known(event, self.events, "event")
        free = [f"{seat} {self.price(event, seat)}" for seat in self.free_seats(event)]
        return ", ".join(free) or "no free seat"

    def find_customer(self, name: str) -> str:
        found = [customer for customer in self.customers.values() if customer.name == name]
        if not found:
            raise ToolError(f"no customer is named {name!r}")
        lines = [f"{one.id} {one.name} balance {one.balance}" for one in found]
        for booking in self.bookings.values():
            if booking.customer == found[0].id:
                lines.append(f"{booking.id} {booking.event} {booking.seat} paid {booking.paid} {booking.state}")
        return "\n".join(lines)

    def book(self, customer: str, event: str, seat: str) -> str:
        self._known(customer, self.customers, "customer")
        self._known(event, self.events, "event")
        self._free(event, seat)
        price = self.price(event, seat)
        self._pay(customer, price)
        booking = Booking(f"K{len(self.bookings) + 1}", customer, event, seat, price)
        self.bookings[booking.id] = booking
        return f"{booking.id} booked, balance {self.customers[customer].balance}"

    def change(self, booking: str, seat: str) -> str:
        found = self._in_state(booking, BOOKED)
        self._free(found.event, seat)
        price = self.price(found.event, seat)
        self._pay(found.customer, price - found.paid)
        found.seat, found.paid = seat, price
        return f"{booking} is now {seat}, balance {self.customers[found.customer].balance}"

    def cancel(self, booking: str) -> str:
        self._in_state(booking, BOOKED).state = CANCELLED
        return f"{booking} cancelled"

    def refund(self, booking: str) -> str:
        found = self._in_state(booking, CANCELLED)
        found.state = REFUNDED
        self.customers[found.customer].balance += found.paid
        return f"{booking} refunded, balance {self.customers[found.customer].balance}"

    def _known(self, key: str, among: dict[str, Any], what: str) -> None:
        if key not in among:
            raise ToolError(f"there is no {what} {key!r}")

    def _in_state(self, booking: str, state: str) -> Booking:
        self._known(booking, self.bookings, "booking")
        found = self.bookings[booking]
        if found.state != state:
            raise ToolError(f"{booking} is {found.state}, not {state}")
        return found

    def _free(self, event: str, seat: str) -> None:
        if seat not in self.events[event].seats:
            raise ToolError(f"{event} has no seat {seat!r}")
        if seat not in self.free_seats(event):
            raise ToolError(f"{seat} is taken")

    def _pay(self, customer: str, amount: int) -> None:
        balance = self.customers[customer].balance
        if amount > balance:
            raise ToolError(f"{amount} is to be paid, the balance is {balance}")
        self.customers[customer].balance -= amount


OPERATIONS = {  # name -> (description, parameters)
    "list_events": ("All events: id, name, day.", ()),
    "list_seats": ("The free seats of an event with their prices.", ("event",)),
    "find_customer": ("A customer by name: id, balance, bookings.", ("name",)),
    "book": ("Books a free seat; the customer pays.", ("customer", "event", "seat")),
    "change": ("Moves a booking to a free seat of its event; the difference is paid.", ("booking", "seat")),
    "cancel": ("Cancels a booking; nothing is given back.", ("booking",)),
    "refund": ("Gives the money of a cancelled booking back.", ("booking",)),
}


class WorldTool(Tool):
    """One operation of `world`."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.description, parameters = OPERATIONS[name]
        self.parameters = {
            "type": "object",
            "properties": {parameter: {"type": "string"} for parameter in parameters},
            "required": list(parameters),
        }

    async def call(self, **arguments: Any) -> str:
        wrong = [key for key, value in arguments.items() if not isinstance(value, str)]
        if wrong or set(arguments) != set(self.parameters["required"]):
            raise ToolError(f"{self.name} takes the strings {', '.join(self.parameters['required']) or '(none)'}")
        return str(getattr(self.world, self.name)(**arguments))


def tools_of(world: World) -> list[Tool]:
    return [WorldTool(world, name) for name in OPERATIONS]
