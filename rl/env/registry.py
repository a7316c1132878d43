"""Environments by name, as a run names them: `NAME` (level 1) or `NAME:LEVEL`; `MODULE:CLASS[:LEVEL]` is one of the
user's own, `verifiers:ID` a taskset of that package (verifiers_adapter.py)."""

from __future__ import annotations

import functools
import importlib
import inspect

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
        return _taskset(level), 1
    if name not in ENVIRONMENTS and level and not level.isdecimal():
        module, (wanted, colon, level) = name, level.partition(":")
        environment = _imported(module, wanted)
        return environment, _level(chosen, f"{module}:{wanted}", environment, level if colon else None)
    if name not in ENVIRONMENTS:
        raise UserError(f"environment {name!r} is not known: {nearest(name, [*ENVIRONMENTS, 'verifiers'])}")
    return ENVIRONMENTS[name], _level(chosen, name, ENVIRONMENTS[name], level if colon else None)


def _level(chosen: str, name: str, environment: Environment, level: str | None) -> int:
    if level is None:
        return 1
    if not (level.isascii() and level.isdecimal()) or not 1 <= int(level[:9]) <= environment.max_level:
        raise UserError(f"{chosen} has no such level: {name} has 1 to {environment.max_level}")
    return int(level)


@functools.cache
def _taskset(taskset: str) -> Environment:
    return VerifiersEnvironment(taskset)


@functools.cache
def _imported(module: str, wanted: str) -> Environment:
    """The user's own, made once a process."""
    try:
        found = vars(importlib.import_module(module)).get(wanted)
    except ImportError as error:
        raise UserError(f"rl.env={module}:{wanted}: {error}: is its folder on PYTHONPATH?") from error
    if not (inspect.isclass(found) and issubclass(found, Environment)) or inspect.isabstract(found):
        raise UserError(f"rl.env={module}:{wanted} is no class that fills in rl.env.environment.Environment")
    return found()
