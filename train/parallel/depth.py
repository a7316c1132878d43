"""Which layers are where when a model is cut in depth. The engine (`train/parallel/pp.py`) and the planner ask here; no
torch, so that a plan needs none."""

from __future__ import annotations

from conf.schema import ModelConfig
from conf.validate_pipeline import PARTS


def cut_in_depth(model: ModelConfig, count: int) -> list[range]:
    """The main layers of `count` parts of about as many layers, MTP's counted to the last; each has one at least."""
    layers, mtp = model.num_hidden_layers, model.num_mtp_layers
    assert layers >= count, f"{layers} layers cannot be cut into {count} parts"
    each, more = divmod(layers + mtp, count)
    sizes = [each + (i < more) for i in range(count)]
    sizes[-1] -= mtp
    while sizes[-1] < 1:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[-1] += 1
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def parts_of_floor(schedule: str, size: int, floor: int) -> list[int]:
    """Numbers of the parts that a floor holds, ascending."""
    if PARTS[schedule] == 1:
        return [floor]
    return [floor, floor + size if schedule == "interleaved" else 2 * size - 1 - floor]
