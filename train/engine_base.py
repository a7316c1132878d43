"""What loops, checkpoints and exports ask of an engine: DeepSpeed's (`train/engine.py`) or the pipelined one
(`train/pipeline_engine.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Transformer
from train import distributed
from train.shards import Reader, key_of

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW, beside its count of steps


@dataclass(frozen=True)
class Stretch:
    """`length` values from `start` of the flat parameter `name`, kept at `offset` of the optimiser's tensor `flat`."""

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int


class EngineBase(ABC):
    """One model and its optimiser on all ranks. A step leaves gradients to be looked at (`grad_norm`), then `step`."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    frozen: int  # checksum of the weights that do not train

    @abstractmethod
    def grad_norm(self) -> float:
        """L2 norm of the whole step's gradient before clipping, the same on every rank; inf where it is not finite.

        Valid between the step's last backward and `step`.
        """

    @abstractmethod
    def step(self, rates: Mapping[str, float], skip: bool = False) -> None:
        """Clips and takes the optimiser's step at `rates` (role -> lr), or leaves it out; gradients are cleared."""

    @abstractmethod
    def stretches(self, load: bool = False) -> Iterator[Stretch]:
        """What this rank holds the fp32 weights and the optimiser's state of; with `load` what must be written."""

    @abstractmethod
    def whole(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter or buffer in full, or one expert of it; on rank 0 at least. All ranks call it alike."""

    @abstractmethod
    def close(self) -> None: ...

    def trained(self) -> set[str]:
        """Names of the parameters that train, wherever they are. All ranks call it."""
        return {name for name, p in self.net.named_parameters() if p.requires_grad}

    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        """`counts` [MoE layers, E] of the whole model: see `Transformer.update_router_bias`."""
        assert isinstance(self.net, Transformer)
        self.net.update_router_bias(counts, speed)

    @property
    def keeps_buffers(self) -> bool:
        """Whether this rank's part of a checkpoint has the buffers."""
        return distributed.rank() == 0

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """This rank's stretches by `shards.key_of`, copied to the CPU; of one rank with the buffers."""
        found: dict[str, Tensor] = {}
        for part in self.stretches():
            kinds = {"weight": part.flat} | {k: self.optimizer.state[part.flat].get(k) for k in STATES}
            for kind, tensor in kinds.items():
                if tensor is not None:
                    value = tensor.detach().view(-1).narrow(0, part.offset, part.length)
                    found[key_of(part.name, part.start, kind)] = value.to("cpu", copy=True)
        if self.keeps_buffers:
            found |= {name: buffer.to("cpu", copy=True) for name, buffer in self.net.named_buffers()}
        return found

    @property
    def steps_taken(self) -> int:
        """Steps of the optimiser, those left out not counted; of rank 0."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

    @torch.no_grad()
    def load(self, reader: Reader, steps_taken: int) -> None:
        """What the ranks of any layout wrote from `state`. All ranks call it."""
        for part in self.stretches(load=True):
            if steps_taken and "step" not in self.optimizer.state[part.flat]:
                zeros = {kind: torch.zeros_like(part.flat, requires_grad=False) for kind in STATES}
                self.optimizer.state[part.flat] = {"step": torch.tensor(float(steps_taken)), **zeros}
            kinds = {"weight": part.flat} | {k: self.optimizer.state[part.flat][k] for k in STATES if steps_taken}
            for kind, tensor in kinds.items():
                value = reader.read(part.name, part.start, part.length, kind)
                tensor.detach().view(-1).narrow(0, part.offset, part.length).copy_(value)
        for name, buffer in self.net.named_buffers():
            buffer.copy_(reader.tensor(name))
        self._loaded()

    @abstractmethod
    def _loaded(self) -> None:
        """The optimiser's weights were written: the model's follow."""
