"""The rules of long-context tasks, in training (`data.long_*`) and in evaluation (`eval.*`); see conf/validate.py."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import RunConfig

SHORTEST = 10  # tokens that hold the smallest problems, from which small models learn first


def long_mix(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    if data.long_share > 0 and not data.long_tasks:
        yield f"data.long_share={data.long_share:g} has no tasks: give data.long_tasks=needle,kv or others"
    if data.long_tasks and data.long_share == 0:
        yield f"data.long_tasks={','.join(data.long_tasks)} has no share of the tokens: give data.long_share=0.1"
    if data.source != "synthetic" and data.long_share > 0 and data.long_share + data.synthetic_share > 1:
        yield (
            f"data.long_share={data.long_share:g} and data.synthetic_share={data.synthetic_share:g} are more than all:"
            " give less of one"
        )
    if data.long_share > 0 and not SHORTEST <= data.long_min <= data.seq_len:
        yield f"data.long_min={data.long_min} is outside {SHORTEST} to data.seq_len={data.seq_len}: give a value inside"
    elif data.long_max is not None and not data.long_min <= data.long_max <= data.seq_len:
        yield (
            f"data.long_max={data.long_max} is outside data.long_min={data.long_min} to data.seq_len={data.seq_len}:"
            " give a value inside"
        )


def eval_tasks(config: RunConfig, world_size: int) -> Iterator[str]:
    longest = config.model.max_position_embeddings
    for length in config.eval.lengths:
        if not SHORTEST <= length <= longest:
            yield (
                f"eval.lengths={length} is outside {SHORTEST} to model.max_position_embeddings={longest}: give a value"
                " inside"
            )
    lengths = ",".join(map(str, config.eval.lengths))
    if lengths and not config.eval.tasks:
        yield f"eval.lengths={lengths} has no tasks to measure: give eval.tasks=needle,kv or others"
    if len(set(config.eval.lengths)) < len(config.eval.lengths):
        yield f"eval.lengths={lengths} names a value twice: leave one out"
    if len(set(config.eval.tasks)) < len(config.eval.tasks):
        yield f"eval.tasks={','.join(config.eval.tasks)} names a task twice, whose problems are the same: leave one out"


LONG_RULES = (long_mix, eval_tasks)
