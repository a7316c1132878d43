"""Environments by name, as a run names them: `NAME` (level 1) or `NAME:LEVEL`; `verifiers:ID` is a taskset of that
package (verifiers_adapter.py)."""

from __future__ import annotations

from conf.errors import UserError, nearest
from rl.env.calculator import CalculatorEnvironment
from rl.env.environment import Environment
from rl.env.programs import ProgramsEnvironment
from rl.env.search import SearchEnvironment
from rl.env.tickets import TicketsEnvironment
from rl.env.verifiers_adapter import VerifiersEnvironment

ENVIRONMENTS: dict[str, Environment] = {
    environment.name: environment
    for environment in (CalculatorEnvironment(), SearchEnvironment(), ProgramsEnvironment(), TicketsEnvironment())
}


def choose(chosen: str) -> tuple[Environment, int]:
    """(environment, level). UserError for a name or level that is not there."""
    name, colon, level = chosen.partition(":")
    if name == VerifiersEnvironment.name:
        if not level:
            raise UserError(f"{chosen} names no taskset: give verifiers:ID")
        return VerifiersEnvironment(level), 1
    if name not in ENVIRONMENTS:
        raise UserError(f"environment {name!r} is not known: {nearest(name, [*ENVIRONMENTS, 'verifiers'])}")
    environment = ENVIRONMENTS[name]
    if not colon:
        return environment, 1
    if not (level.isascii() and level.isdecimal()) or not 1 <= int(level[:9]) <= environment.max_level:
        raise UserError(f"{chosen} has no such level: {name} has 1 to {environment.max_level}")
    return environment, int(level)
