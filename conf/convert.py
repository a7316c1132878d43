"""The frozen dataclasses of `conf/schema.py` <-> plain dicts and YAML, with types checked strictly and without Hydra.

A dict may leave out a field that has a default; it may not hold one that the schema lacks. `int` is taken where `float`
is wanted and nothing else is converted: `bool` is no `int`, "3" is no number, null only where the schema says `| None`.
A field of `dict[str, X]` holds values under names of the user's choice, each checked as an X, which may be a section.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from conf.errors import UserError
from conf.schema import RunConfig

T = TypeVar("T")

_NOUNS = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
_SHORTEST_SECRET = 8  # shorter values ("1", "true") would redact half the file


def leaf_types(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotation for every field that holds a value, in the schema's order: `{"stage": str, ...}`."""
    leaves: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            leaves |= leaf_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            leaves[prefix + name] = hint
    return leaves


def accepted_types(hint: Any) -> tuple[type, ...]:
    """The alternatives of a field's annotation: `(float, NoneType)` for `float | None`."""
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def is_list(hint: Any) -> bool:
    """Whether the field is a list, `tuple[str, ...]` or `tuple[int, ...]`."""
    return get_origin(hint) is tuple and get_args(hint) in ((str, ...), (int, ...))


def is_mapping(hint: Any) -> bool:
    """Whether a field holds values under names of the user's choice: `dict[str, float]`."""
    return get_origin(hint) is dict


def leaf_type(key: str) -> Any:
    """The annotation of a dotted key, `rl.domains.NAME.beta` included; None where there is no such field."""
    leaves = leaf_types()
    if key in leaves:
        return leaves[key]
    for mapping, hint in leaves.items():
        if is_mapping(hint) and key.startswith(mapping + "."):
            name, _, inner = key.removeprefix(mapping + ".").partition(".")
            kind = get_args(hint)[1]
            if name and not inner:
                return None if is_dataclass(kind) else kind
            return get_type_hints(kind).get(inner) if is_dataclass(kind) else None
    return None


def suggest_key(key: str, groups: tuple[str, ...] = ()) -> str:
    """The end of an unknown key's error: the same name in another section, else the nearest spelling, else what exists.

    `groups` are names that are valid at the top beside the schema's keys.
    """
    leaves = [leaf for leaf in leaf_types() if leaf != "stage"]  # set by +stage=S alone
    section, _, last = key.rpartition(".")
    for mapping, hint in leaf_types().items():
        if is_mapping(hint) and key.startswith(mapping + "."):
            name, _, wrong = key.removeprefix(mapping + ".").partition(".")
            of_each = list(get_type_hints(get_args(hint)[1]))
            if not wrong:
                return f"it is a section, set one of its keys: {', '.join(of_each)}"
            close = get_close_matches(wrong, of_each, n=1)
            return f"did you mean {mapping}.{name}.{close[0]}?" if close else f"valid there: {', '.join(of_each)}"
    inside = [leaf for leaf in leaves if leaf.startswith(key + ".")]
    if inside:
        return f"it is a section, set one of its keys: {', '.join(inside)}"
    same_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    if same_name:
        return f"did you mean {' or '.join(same_name)}?"
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == section]
    top = [*(leaf for leaf in leaves if "." not in leaf), *groups]
    for options in (siblings if section else top, leaves):
        by_last = {option.rpartition(".")[2]: option for option in reversed(options)}
        close = get_close_matches(last, by_last, n=1)
        if close:
            return f"did you mean {by_last[close[0]]}?"
    return f"valid: {', '.join(siblings if section and siblings else top)}"


def _checked(key: str, value: Any, hint: Any) -> Any:
    if is_list(hint):
        kind, named = get_args(hint)[0], "strings" if str in get_args(hint) else "whole numbers"
        if isinstance(value, list | tuple) and all(type(item) is kind for item in value):
            return tuple(value)
        raise UserError(f"{key}={value!r:.80} has the wrong type {type(value).__name__}: {key} takes a list of {named}")
    if is_mapping(hint):
        return _checked_mapping(key, value, get_args(hint)[1])
    accepted = accepted_types(hint)
    assert set(accepted) <= {int, float, str, bool, types.NoneType}, f"{key}: no check for {hint} yet"
    if type(value) in accepted and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    if type(value) is int and float in accepted:
        return float(value)
    wanted = " or ".join(_NOUNS.get(kind, "null") for kind in accepted)
    shown = "null" if value is None else repr(value)
    raise UserError(f"{key}={shown[:80]} has the wrong type {type(value).__name__}: {key} takes {wanted}")


def _checked_mapping(key: str, value: Any, hint: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r:.80} is no mapping: give {key}={{NAME: VALUE, ...}}")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{key} has the name {name!r:.80}, which is no text: give another")
    return {name: _field(f"{key}.{name}", inner, hint) for name, inner in value.items()}


def _field(key: str, value: Any, hint: Any) -> Any:
    return _build(hint, value, f"{key}.") if is_dataclass(hint) else _checked(key, value, hint)  # type: ignore[arg-type]


def _build(cls: type[T], values: Any, prefix: str) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={values!r:.80} is not a section: give keys under it")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"unknown key {prefix}{name}: {suggest_key(f'{prefix}{name}')}")
    filled = {}
    for spec in fields(cls):  # type: ignore[arg-type]
        key = prefix + spec.name
        if spec.name not in values:
            if spec.default is MISSING and spec.default_factory is MISSING:
                raise UserError(f"{key} is missing: give {key}=...")
            continue
        filled[spec.name] = _field(key, values[spec.name], hints[spec.name])
    return cls(**filled)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A nested dict -> RunConfig. Raises UserError (one line, dotted key, fix) for an unknown key or a wrong type."""
    return _build(RunConfig, values, "")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """RunConfig -> nested dict of plain values; `from_dict` is its inverse."""
    return asdict(config)


def _secrets(environ: Mapping[str, str]) -> dict[str, str]:
    named = {name: value for name, value in environ.items() if any(word in name.upper() for word in _SECRET_WORDS)}
    return {name: value for name, value in named.items() if len(value) >= _SHORTEST_SECRET}


def redact(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The same nest of dicts, lists and strings with every key from the environment replaced by its variable's name.

    A variable counts as secret by its name (KEY, TOKEN, SECRET, PASSWORD, ...); its value is looked for inside strings.
    """
    secrets = sorted(_secrets(environ).items(), key=lambda item: -len(item[1]))

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {clean(key): clean(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(inner) for inner in value]
        if isinstance(value, str):
            for name, secret in secrets:
                value = value.replace(secret, f"<redacted {name}>")
        return value

    return clean(value)


def redacted(config: RunConfig, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """The same run without keys from the environment (`${oc.env:HF_TOKEN}`), see `redact`.

    What is stored or shown (`config.yaml`, W&B) goes through here; two runs are compared in this form.
    """
    return from_dict(redact(to_dict(config), environ))


def save_yaml(config: RunConfig, path: str | Path) -> None:
    """Writes the redacted config, whole or not at all (a temporary file moved into place)."""
    path = Path(path)
    text = yaml.safe_dump(to_dict(redacted(config)), sort_keys=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _of_today(values: Any) -> Any:
    """What earlier versions wrote, in today's fields: `rl.tools` was a switch, which only ever was off."""
    rl = values.get("rl") if isinstance(values, Mapping) else None
    if isinstance(rl, Mapping) and isinstance(rl.get("tools"), bool):
        return {**values, "rl": {name: value for name, value in rl.items() if name != "tools"}}
    return values


def load_yaml(path: str | Path) -> RunConfig:
    """Reads what `save_yaml` wrote. Raises UserError naming the file where it is missing, no YAML or no such config."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return from_dict(_of_today(values))
    except OSError as error:
        raise UserError(f"cannot read the run's configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
