"""Pipeline parallelism: a model cut in depth into parts, which `pp` groups of ranks hold, one or two each.

World = pp x replicas x cp, the depth outermost: ranks `k * W / pp` to `(k + 1) * W / pp - 1` are a *floor*. All that
the ranks of a floor do among themselves (slices of a sequence, experts, shares of the optimiser) stays on it; between
floors travel the hidden states [T / cp, D] and their gradients.

The schedules are those of `torch.distributed.pipelining`. Its "stage" is called a part here, for a stage is something
else in this house. `interleaved` gives floor k parts k and k + pp, the V schedules give it k and 2 pp - 1 - k, so that
floor 0 has both ends of the model and the embedding that MTP reads is there already.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from conf.schema import ModelConfig
from conf.validate_pipeline import PARTS
from model.transformer import Part, Transformer
from train import distributed
from train.parallel.depth import cut_in_depth, parts_of_floor


class PipelineParallel:
    """This rank's place: floor `rank` of `size`. Every rank of the world makes one at the same time.

    `column`: the ranks with the same place on each floor; `floor`: the ranks of this rank's floor.
    """

    def __init__(self, size: int, schedule: str, model: ModelConfig) -> None:
        world, rank = distributed.world_size(), distributed.rank()
        assert world % size == 0, f"pp={size} in a world of {world}"
        self.size, self.schedule, self.breadth = size, schedule, world // size
        self.rank, self.place = divmod(rank, self.breadth)
        cut = cut_in_depth(model, size * PARTS[schedule]) if size > 1 else []
        self.parts = [Part(layers.start, layers.stop, model.num_hidden_layers) for layers in cut]
        self.mine = parts_of_floor(schedule, size, self.rank) if size > 1 else []
        self.column: dist.ProcessGroup | None = None
        self.floor: dist.ProcessGroup | None = None
        if size > 1:
            self.column = own_group(range(place, world, self.breadth) for place in range(self.breadth))
            self.floor = own_group(range(k * self.breadth, (k + 1) * self.breadth) for k in range(size))

    def cut(self, net: Transformer) -> None:
        """Leaves this rank the layers of its floor, on the meta device or with their values."""
        if self.size > 1:
            net.keep(self.parts[number] for number in self.mine)

    def floor_of(self, part: int) -> int:
        return next(k for k in range(self.size) if part in parts_of_floor(self.schedule, self.size, k))

    def holder(self, name: str) -> int:
        """The floor whose parameter or buffer `name` is: of the embedding that the last part has a copy of, the
        first's."""
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            return self.floor_of(next(i for i, part in enumerate(self.parts) if part.first <= layer < part.end))
        return self.floor_of(0 if name.startswith("embed_tokens.") else len(self.parts) - 1)


def own_group(groups: Iterable[Iterable[int]]) -> dist.ProcessGroup:
    """Makes all of `groups`, lists of ranks that cover the world -> the one with this rank. All ranks call it."""
    found = None
    for ranks in map(list, groups):
        group = dist.new_group(ranks)
        found = group if distributed.rank() in ranks else found
    assert found is not None
    return found
