"""The rules for what a run reads: mixes, streaming, screening. `conf/validate.py` holds a config against them."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from conf.errors import nearest
from conf.schema import MixConfig, RunConfig

MIX_SOURCES = ("stdlib", "files", "hf")


def mix_is_whole(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    if data.source == "mix" and not data.mix:
        yield "data.source=mix has nothing to read: give data.mix.NAME.path=PATH for each source"
    if data.source == "mix" and data.path is not None:
        yield f"data.path={data.path} is not read by data.source=mix: give data.mix.NAME.path"
    if data.mix and data.source != "mix":
        yield f"data.mix is not read by data.source={data.source}: add data.source=mix"
    for name, part in data.mix.items():
        yield from _broken(f"data.mix.{name}", part)
        if config.stage == "sft" and part.source == "stdlib":
            yield f"data.mix.{name}.source=stdlib holds no conversations, which sft learns from: use files"


def _broken(key: str, part: MixConfig) -> Iterator[str]:
    if part.source not in MIX_SOURCES:
        yield f"{key}.source={part.source} cannot be mixed: {nearest(part.source, MIX_SOURCES)}"
    if part.source in ("files", "hf") and not (part.path or "").strip():
        yield f"{key} has nothing to read: give {key}.path=PATH"
    if part.source == "stdlib" and part.path is not None:
        yield f"{key}.path={part.path} is not read by {key}.source=stdlib: leave one of them out"
    if not (isfinite(part.weight) and part.weight > 0):
        yield f"{key}.weight={part.weight:g} is outside (0, inf): give a value inside"
    if part.min_tokens < 1:
        yield f"{key}.min_tokens={part.min_tokens} is too small: give 1 or more"
    if part.max_tokens is not None and part.max_tokens < part.min_tokens:
        yield f"{key}.max_tokens={part.max_tokens} is below {key}.min_tokens={part.min_tokens}: no document is left"


def streaming_is_of_sets(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    if data.streaming and "hf" not in (data.source, *(part.source for part in data.mix.values())):
        yield f"data.streaming=true is not read by data.source={data.source}: add data.source=hf or leave it out"


def decontaminate_is_named(config: RunConfig, world_size: int) -> Iterator[str]:
    if any(not path.strip() for path in config.data.decontaminate):
        yield "data.decontaminate names an empty path: give files of evaluation sets or leave it out"


DATA_RULES = (mix_is_whole, streaming_is_of_sets, decontaminate_is_named)
