"""The rules of what `evaluate` measures beside held-out losses (`eval.*`); see conf/validate.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from conf.schema import RunConfig

DECODED = 16  # tokens that train/speed.py decodes behind each length
LEAST_SEQUENCES = 2  # an interval needs two units


def eval_lists(config: RunConfig, world_size: int) -> Iterator[str]:
    for key, values in (("eval.k_sweep", config.eval.k_sweep), ("eval.speed_lengths", config.eval.speed_lengths)):
        for value, times in Counter(values).items():
            if times > 1:
                yield f"{key} names {value} {times} times: give it once"
            if value < 1:
                yield f"{key}={value} is too small: give 1 or more"


def eval_lengths(config: RunConfig, world_size: int) -> Iterator[str]:
    longest = config.model.max_position_embeddings
    for length in config.eval.speed_lengths:
        if length + DECODED > longest:
            yield (
                f"eval.speed_lengths={length} and {DECODED} decoded tokens are past model.max_position_embeddings="
                f"{longest}: give {longest - DECODED} or less"
            )


def eval_compare(config: RunConfig, world_size: int) -> Iterator[str]:
    own = config.eval
    if own.compare_with is not None and not own.compare_with.strip():
        yield "eval.compare_with is empty: give a run or a Hugging Face folder, or leave it out"
    if own.compare_with is not None and not own.by_position:
        yield "eval.compare_with is compared by position: add eval.by_position=true"
    if own.k_sweep and not own.by_position and not own.tasks:
        yield "eval.k_sweep has nothing to measure: give eval.by_position=true, or eval.tasks=needle,kv or others"


def eval_harness(config: RunConfig, world_size: int) -> Iterator[str]:
    own = config.eval
    if own.harness_path is not None and not own.harness:
        yield f"eval.harness_path={own.harness_path} has no task to find: give eval.harness=TASK"


EVAL_RULES = (eval_lists, eval_lengths, eval_compare, eval_harness)


def eval_warnings(config: RunConfig) -> Iterator[str]:
    if config.stage == "evaluate" and config.eval.by_position and config.train.eval_sequences < LEAST_SEQUENCES:
        yield (
            f"train.eval_sequences={config.train.eval_sequences} leaves no confidence interval, whose unit is the"
            f" sequence: give {LEAST_SEQUENCES} or more, better 32"
        )
