"""The one file that knows DeepSpeed: forward, backward, gradient norm, step, and the state of a checkpoint.

DeepSpeed averages gradients over its ranks; the losses here are already parts of a global mean, so `backward` scales by
the world size and the result is the exact gradient of the sum over ranks and micro-batches. Parameters stay fp32; under
bf16 the forward runs in autocast and the model keeps in fp32 what needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import OptimConfig, ParallelConfig
from model import ForwardOutput
from model.indexer import LightningIndexer
from train import distributed
from train.ds_config import ds_config
from train.optim import SkippableAdamW, apply_rates
from train.parallel.ep import mark

_TAG = "state"


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what child processes write to stderr: on import DeepSpeed asks a compiler for optional libraries."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def import_deepspeed() -> Any:
    """DeepSpeed without its chatter and without the C++ op that it would compile for a minute at the first start."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with _without_stderr():
        import deepspeed
        import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's calls
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on one even where a process group exists
    return deepspeed


class _Visible(nn.Module):
    """The model with its outputs in a dict: DeepSpeed hooks the output tensors, and a dataclass hides them from it."""

    def __init__(self, net: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.net, self.autocast = net, autocast

    def forward(self, **inputs: Any) -> dict[str, Any]:
        with torch.autocast(distributed.device().type, self.autocast, enabled=self.autocast is not None):
            return dict(vars(self.net(**inputs)))


class Engine:
    """One model and its optimiser on all ranks. A step is any number of `forward` + `backward`, then `step`."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: str = "fp32",
    ) -> None:
        """`optimizer` holds exactly the parameters that require gradients; `precision` is fp32 or bf16."""
        assert precision in ("fp32", "bf16"), precision
        deepspeed = import_deepspeed()
        self.net, self.optimizer, self.zero = net, optimizer, parallel.zero
        trainable = [p for group in optimizer.param_groups for p in group["params"]]
        config = ds_config(optim, parallel, sum(p.numel() for p in trainable), distributed.world_size())
        module = _Visible(net, torch.bfloat16 if precision == "bf16" else None)
        self._trainable = trainable
        if parallel.ep > 1:
            mark(net, parallel.zero)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if parallel.zero == 3:
            for module in net.modules():
                if isinstance(module, LightningIndexer):  # its gradients are made within its forward
                    for p in module.parameters():
                        deepspeed.zero.register_external_parameter(module, p)

    def forward(self, **inputs: Any) -> ForwardOutput:
        """Arguments of the model's forward, tensors on this rank's device."""
        return ForwardOutput(**self._engine(**inputs))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`, this micro-batch's share of the global mean.

        `last`: it is the step's last one, on all ranks alike.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def grad_norm(self) -> float:
        """L2 norm of the whole step's gradient before clipping, the same on every rank; inf where it is not finite.

        Valid between the last `backward` and `step`.
        """
        if self.zero == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self._engine.optimizer._get_norm_groups()))  # as its step does
            return norm if norm >= 0 else float("inf")
        if self.zero:
            return float(self._engine.optimizer.scaled_global_norm())
        norms = [torch.linalg.vector_norm(p.grad.float()) for p in self._trainable if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        return norm if norm == norm else float("inf")

    def step(self, rates: Mapping[str, float], skip: bool = False) -> None:
        """Clips and takes the optimiser's step at `rates` (role -> lr), or leaves it out; gradients are cleared."""
        apply_rates(self.optimizer, dict(rates))
        if isinstance(self.optimizer, SkippableAdamW):
            self.optimizer.skip_next = skip
        else:
            assert not skip, f"{type(self.optimizer).__name__} cannot skip a step"
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Weights that train, buffers and optimiser state, each rank its part. All ranks call it."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """What `save` wrote, into an engine of the same layout whose frozen weights are in place."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"{folder} holds no DeepSpeed state")

    def close(self) -> None:
        self._engine.destroy()
