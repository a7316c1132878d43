"""The rules for pipeline parallelism: what a schedule needs, and what does not live with it.
`conf/validate.py` holds a config against them."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import RunConfig

PARTS = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}  # that each of the pp groups of ranks holds


def micro_batches_needed(schedule: str, pp: int, given: int) -> int:
    """The number of micro-batches nearest to `given`, from below where there is one, that the schedule can run."""
    if schedule == "dualpipev":
        return max(given, 2 * pp)  # its main step begins where both directions are full
    if schedule == "interleaved" and given >= pp:
        rounds = given // pp
        return given - given % rounds
    return max(given, pp)


def pipeline_runs(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, layers, given = config.parallel, config.model.num_hidden_layers, config.train.micro_batches
    pp, schedule = parallel.pp, parallel.pp_schedule
    if pp < 2 or schedule not in PARTS:
        if pp == 1 and schedule != "1f1b":
            yield f"parallel.pp_schedule={schedule} has nothing to order in parallel.pp=1: give parallel.pp=2 or more"
        return  # numbers_in_range and known_names say the rest
    if world_size % pp:
        yield f"parallel.pp={pp} does not divide the world of {world_size} processes: start a multiple of {pp}"
    parts = pp * PARTS[schedule]
    if layers < parts:
        yield (
            f"parallel.pp={pp} with parallel.pp_schedule={schedule} cuts the model into {parts} parts and"
            f" model.num_hidden_layers={layers} has fewer layers: use a smaller pp"
            + (", or pp_schedule=1f1b" if parts > pp else "")
        )
    needed = micro_batches_needed(schedule, pp, given)
    if needed != given:
        yield (
            f"train.micro_batches={given} cannot be run by parallel.pp_schedule={schedule} with parallel.pp={pp}:"
            f" give train.micro_batches={needed}"
        )


def pipeline_refuses(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pp < 2:
        return
    key = f"parallel.pp={parallel.pp}"
    if config.stage in ("grpo", "evaluate"):
        yield f"{key} is not supported in stage {config.stage}, where a rank runs the whole model: use parallel.pp=1"
    if parallel.zero != 1:
        yield f"{key} has an optimiser of its own, which shares out its state alone: use parallel.zero=1"
    if parallel.offload != "none":
        yield f"{key} keeps the optimiser on the device: use parallel.offload=none"


PIPELINE_RULES = (pipeline_runs, pipeline_refuses)
