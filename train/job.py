"""What a plan is made of: a stage's step in a layout, and the parameters that each of its floors holds.

A floor is a group of ranks with the same layers (train/parallel/pp.py); without pp there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from conf.schema import ModelConfig, ParallelConfig
from train.activations import Shape
from train.parallel.depth import cut_in_depth
from train.parameters import Parameter, parameters
from train.stages import Stage


@dataclass(frozen=True)
class Job:
    """A stage's step in a layout. `world`: processes; `sequences` of `seq_len` tokens that a replica takes in a step;
    `fused`: on GPUs, with the Triton kernels. In depth only 1F1B is known."""

    model: ModelConfig
    stage: Stage
    parallel: ParallelConfig
    world: int
    seq_len: int
    precision: str = "fp32"
    sequences: int = 1
    checkpointing: bool = False
    fused: bool = False
    samples: int = 0  # RL: that a rank draws at a time with its own sampler; 0: servers draw them

    @property
    def pp(self) -> int:
        return self.parallel.pp

    @property
    def ranks(self) -> int:
        """That share a floor's parameters."""
        return self.world // self.pp

    @property
    def replicas(self) -> int:
        return self.ranks // self.parallel.cp

    @property
    def shape(self) -> Shape:
        return Shape(
            self.model, self.stage, self.precision, self.seq_len // self.parallel.cp, self.seq_len,
            self.model.n_routed_experts // self.parallel.ep, self.fused,
        )  # fmt: skip

    @property
    def with_mtp(self) -> bool:
        stage, model = self.stage, self.model
        serves = stage.indexer_loss is not None or stage.lm_loss
        return stage.runner == "train" and model.num_mtp_layers > 0 and serves


@dataclass(frozen=True)
class Held:
    """Values of a floor (of the one that there is without pp) on a rank before ZeRO cuts them: by group of the
    optimiser, and those that a layer owns."""

    floor: int
    groups: dict[tuple[bool, bool, bool, bool], int]  # (trains, indexer, matrix, expert)
    layers: dict[int | None, int]  # trainable values by layer
    largest: dict[int | None, int]  # trainable parameter by layer
    copy: int  # of the embedding that the last floor has for MTP, beside its groups

    def sum(self, trains: bool | None = None) -> int:
        return sum(size for key, size in self.groups.items() if trains is None or key[0] == trains)


@cache
def floor_parameters(model: ModelConfig, pp: int, floor: int) -> tuple[Parameter, ...]:
    """The first floor has the embedding, the last the head and MTP."""
    layers, last = cut_in_depth(model, pp)[floor], floor == pp - 1

    def here(p: Parameter) -> bool:
        if p.layer is None:
            return floor == 0 if p.name.startswith("embed") else last
        return p.layer in layers or last and p.layer >= model.num_hidden_layers

    return tuple(p for p in parameters(model) if here(p))


@cache
def held(model: ModelConfig, stage: Stage, ep: int, pp: int, floor: int) -> Held:
    groups: dict[tuple[bool, bool, bool, bool], int] = {}
    layers: dict[int | None, int] = {}
    largest: dict[int | None, int] = {}
    for p in floor_parameters(model, pp, floor):
        size, trains = p.size // (ep if p.is_expert else 1), p.trains(stage)
        key = (trains, p.is_indexer, len(p.shape) > 1, p.is_expert and ep > 1)
        groups[key] = groups.get(key, 0) + size
        if trains:
            layers[p.layer] = layers.get(p.layer, 0) + size
            largest[p.layer] = max(largest.get(p.layer, 0), size)
    has_copy = 0 < floor == pp - 1 and model.num_mtp_layers > 0
    return Held(floor, groups, layers, largest, embedding(model) if has_copy else 0)


def embedding(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size
