"""The reference policy of the KL term: a frozen copy of the policy, refreshed every so many iterations (R1: 400).

The first reference is the weights that the run starts from. A refreshed one is written to
`reference/step_N.safetensors` before any checkpoint that needs it, and the checkpoint holds N: a resumed run goes on
with the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from model import Transformer
from model.transformer import ForwardOutput
from train import distributed


class Reference:
    """`step` is the iteration whose weights it holds; 0 the start of the run."""

    def __init__(self, net: Transformer, run: Path, autocast: torch.dtype | None = None, on_cpu: bool = False) -> None:
        """`net` holds the weights that the run starts from; they are copied. `autocast`: as the policy's forward has
        it. `on_cpu`: it lives in CPU memory while it has no work."""
        self.folder, self.step, self.autocast = run / "reference", 0, autocast
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.net.mtp = nn.ModuleList()  # it has no part in the policy, and rollout copies have none
        if on_cpu:
            self.net.to("cpu")

    def restore(self, step: int) -> None:
        """Goes back to the reference of iteration `step`, as a checkpoint names it."""
        if step > 0:
            from safetensors.torch import load_file

            stored = load_file(self._file(step))
            self.net.load_state_dict({name: tensor for name, tensor in stored.items() if _of_policy(name)})
        self.step = step

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step}.safetensors"

    @contextmanager
    def at_work(self, device: torch.device) -> Iterator[Callable[..., ForwardOutput]]:
        """Its forward, on the device that the policy is on; where it lives in CPU memory it goes back there."""
        home = self.net.embed_tokens.weight.device
        self.net.to(device)
        with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            yield self.net
        self.net.to(home)

    def refresh(self, net: Transformer, step: int) -> None:
        """Takes over the policy of `step`; rank 0 keeps it on disk. All ranks call it."""
        self.net.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if _of_policy(name)})
        self.step = step
        if distributed.rank() == 0:
            from safetensors.torch import save_file

            self.folder.mkdir(exist_ok=True)
            partial = self.folder / ".tmp"
            save_file({name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}, partial)
            partial.replace(self._file(step))
        distributed.barrier()

    def drop_unused(self, needed: Iterable[int]) -> None:
        """Removes the files of references that no checkpoint names any more (rank 0)."""
        keep = {self._file(step) for step in (*needed, self.step)}
        for path in self.folder.glob("step_*.safetensors"):
            if path not in keep:
                path.unlink()


def _of_policy(name: str) -> bool:
    return not name.startswith("mtp.")
