"""The command line -> RunConfig: Hydra composes the YAML groups, `conf/convert.py` checks the result strictly.

Departs from Hydra's own entry point: the compose API is used, so Hydra makes no folder, log or working directory, and
`hydra.*` settings are accepted and ignored. Every override is held against the schema before Hydra sees it, because
Hydra's own messages run over several lines and suggest `+key`, which would only invent keys. Where the schema wants a
string, the text after `key=` is taken as it stands, so that no path needs the quoting of Hydra's grammar.

    load(["+stage=sparse_adapt", "model=small", "train.steps=5", "init_from=runs/dense_warmup"])
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.convert import (
    accepted_types,
    from_dict,
    is_list,
    is_mapping,
    leaf_type,
    leaf_types,
    load_yaml,
    redacted,
    save_yaml,
    suggest_key,
    to_dict,
)
from conf.errors import UserError, nearest
from conf.schema import STAGES, RunConfig

__all__ = ["Loaded", "from_dict", "load", "load_yaml", "redacted", "save_yaml", "to_dict"]

CONFIG_DIR = Path(__file__).resolve().parent
GROUPS = ("model", "data", "optim", "parallel", "precision", "tracker", "rl", "eval")


@dataclass(frozen=True)
class Loaded:
    """A typed run, and what the user set of it: dotted keys, and the bare name of a group chosen (`model`, `stage`)."""

    config: RunConfig
    overrides: frozenset[str]


def presets(group: str) -> list[str]:
    """The names that `group=NAME` takes: the YAML files of its folder."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _schema_defaults() -> dict[str, Any]:
    """The schema as a dict, "???" (OmegaConf's mark for missing) where a value must come from elsewhere."""
    required: dict[str, Any] = {}
    for spec in fields(RunConfig):
        if spec.default is MISSING and spec.default_factory is MISSING:
            required[spec.name] = "???"
    return to_dict(RunConfig(**required)) | required


def _one_line(error: Exception) -> str:
    """The first sentence of a library's message, without its object dump."""
    return " ".join(str(error).strip().split("\n")[0].split())


def _stage_override(arg: str, value: str) -> str:
    if value not in STAGES or value not in presets("stage"):
        raise UserError(f"{arg}: there is no stage {value!r}: {nearest(value, STAGES)}")
    return f"+stage={value}"


def _group_override(arg: str, group: str, value: str) -> str:
    if value not in presets(group):
        raise UserError(f"{arg}: the group {group} has no preset {value!r}: {nearest(value, presets(group))}")
    return f"{group}={value}"


def _listed(text: str) -> str:
    """`a,b`, `[a, b]` or JSON -> Hydra's list of quoted strings; nothing, `[]` or `null` is the empty list.

    JSON's escapes are read, for strings with a comma, outer spaces or a line break: `["\\n\\n"]`.
    """
    items = _json_strings(text)
    if items is None:
        inside = text.strip().removeprefix("[").removesuffix("]")
        none = inside.strip().lower() in ("", "null")
        items = [] if none else [item.strip().strip("'\"") for item in inside.split(",")]
    return f"[{','.join(QuotedString(text=item, quote=Quote.single).with_quotes() for item in items)}]"


def _json_strings(text: str) -> list[str] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def _value_override(arg: str, key: str, text: str, hint: Any) -> str:
    if is_list(hint):
        text = _listed(text) if str in get_args(hint) else f"[{text.strip().removeprefix('[').removesuffix(']')}]"
    already_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    null_means_none = type(None) in accepted_types(hint) and text.lower() == "null"
    if str in accepted_types(hint) and not already_quoted and not null_means_none:
        text = QuotedString(text=text, quote=Quote.single).with_quotes()
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise UserError(f"{arg}: the value of {key} cannot be read ({_one_line(error)}): give a plain value") from error
    if parsed.is_sweep_override():
        raise UserError(f"{arg}: a run takes one value for {key}: start one run for each value")
    known_to_hydra = key in leaf_types() and not is_mapping(hint)  # names of the user's choice are not
    return f"{key}={text}" if known_to_hydra else f"++{key}={text}"


def _checked_override(arg: str) -> tuple[str, str]:
    """One argument -> (the key it sets, the override as Hydra shall read it). UserError where there is no such key."""
    name, equals, text = arg.partition("=")
    key = name.lstrip("+~").strip()
    if len(arg.splitlines()) > 1:
        raise UserError(f"{arg!r} holds a line break: give the setting on one line")
    if not equals or not key or name.startswith(("-", "~")):
        raise UserError(f"{arg}: settings are written key=value, such as train.steps=100")
    if key == "stage":
        if not name.startswith("+"):
            raise UserError(f"{arg}: the stage is chosen with a plus: +stage={text}")
        return key, _stage_override(arg, text)
    hint = leaf_type(key)
    if hint is None and key not in GROUPS:
        if "@" not in key:
            raise UserError(f"{arg}: unknown key {key}: {suggest_key(key, groups=(*GROUPS, '+stage'))}")
        raise UserError(f"{arg}: a group cannot be moved with @: choose it as {key.partition('@')[0]}={text}")
    if name.startswith("+"):
        raise UserError(f"{arg}: {key} exists already and nothing can be added: write {key}={text}")
    return key, _group_override(arg, key, text) if key in GROUPS else _value_override(arg, key, text, hint)


def load(argv: list[str]) -> Loaded:
    """Composes `argv` (`+stage=S`, `group=preset`, `dotted.key=value`) into a RunConfig.

    Types and names are checked here, the rules between fields in `conf.validate`. Raises UserError with one line that
    names the key, the reason and the nearest valid one.
    """
    checked = [_checked_override(arg) for arg in argv if not arg.lstrip("+~").startswith(("hydra.", "hydra/"))]
    chosen = sum(key == "stage" for key, _ in checked)
    if chosen != 1:
        reason = "no stage is given" if not chosen else f"{chosen} stages are given"
        raise UserError(f"{reason}: add exactly one +stage=S, S one of {', '.join(STAGES)}")
    ConfigStore.instance().store(name="schema", node=_schema_defaults())
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            composed = compose("config", overrides=[override for _, override in checked])
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except HydraException as error:
        raise UserError(f"the configuration cannot be composed: {_one_line(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'the configuration'} cannot be resolved: {_one_line(error)}") from error
    return Loaded(from_dict(values), frozenset(key for key, _ in checked))
