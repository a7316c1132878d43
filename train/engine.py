"""DeepSpeed's engine behind ours: forward, backward, gradient norm, step, and what each rank holds of the state.

`train/parallel/ep.py` and `zero3.py` know a part of DeepSpeed each, nothing else does.

DeepSpeed averages gradients over its ranks; the losses here are already parts of a global mean, so `backward` scales by
the world size and the result is the exact gradient of the sum over ranks and micro-batches. Parameters stay fp32; under
bf16 and fp8 the forward runs in autocast and the model keeps in fp32 what needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import OptimConfig, ParallelConfig
from model import ForwardOutput
from model.indexer import LightningIndexer
from train import distributed
from train.ds_config import ds_config
from train.engine_base import EngineBase, Stretch
from train.optim import SkippableAdamW, apply_rates
from train.parallel.ep import expert_group, frozen_checksum, mark
from train.parallel.zero3 import full_shape, stretch
from train.precision import training_autocast


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


def no_nvme(folder: Path) -> str | None:
    """Why DeepSpeed cannot keep tensors in files of `folder`, which is made; None if it can.

    The first call on a machine compiles DeepSpeed's op, for minutes. The op reports success for transfers that moved
    nothing (sizes and addresses that are no multiple of the disk's block), so one is tried.
    """
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.builder import CUDAMismatchException
    from torch.utils import cpp_extension

    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        return "DeepSpeed's async_io op needs the CUDA toolkit to be built beside a GPU, and CUDA_HOME names none"
    values = (1 << 18) + 256  # 1 MiB and 1 KiB: its files are of 1 MiB or more, in steps of 1 KiB
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _without_stderr(), TemporaryDirectory(dir=folder) as own:  # the compiler's words, and the op's
            if not AsyncIOBuilder().is_compatible():
                return "DeepSpeed's async_io op needs a C++ compiler and libaio's headers (apt install libaio-dev)"
            handle, path = AsyncIOBuilder().load(verbose=False).aio_handle(), Path(own) / "tried"
            sent, found = (handle.new_cpu_locked_tensor(values, torch.empty(0)).zero_() for _ in range(2))
            sent.copy_(torch.arange(values))
            moved = handle.async_pwrite(sent, str(path), 0) == 0 and handle.wait() == 1
            moved = moved and path.stat().st_size == sent.nbytes  # it ends the process that reads beyond the end
            moved = moved and handle.async_pread(found, str(path), 0) == 0 and handle.wait() == 1
            return None if moved and torch.equal(sent, found) else f"{folder} does not give back what is written to it"
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    except (RuntimeError, CUDAMismatchException) as error:
        return f"DeepSpeed's async_io op cannot be built ({str(error).splitlines()[0]})"


class _Visible(nn.Module):
    """The model with its outputs in a dict: DeepSpeed hooks the output tensors, and a dataclass hides them from it."""

    def __init__(self, net: nn.Module, precision: str) -> None:
        super().__init__()
        self.net, self.precision = net, precision

    def forward(self, **inputs: Any) -> dict[str, Any]:
        with training_autocast(distributed.device(), self.precision):
            return dict(vars(self.net(**inputs)))


class Engine(EngineBase):
    """One model and its optimiser on all ranks. A step is any number of `forward` + `backward`, then `step`."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: str = "fp32",
    ) -> None:
        """`optimizer` holds exactly the parameters that require gradients; `precision`: fp32, bf16 or fp8."""
        deepspeed = import_deepspeed()
        self.net, self.optimizer, self.zero = net, optimizer, parallel.zero
        trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._swap: TemporaryDirectory[str] | None = None
        if parallel.offload == "nvme":  # of this rank alone: other runs may use the same disk
            self._swap = TemporaryDirectory(prefix=f"winnow_rank_{distributed.rank()}_", dir=parallel.nvme_path)
            parallel = replace(parallel, nvme_path=self._swap.name)
        config = ds_config(optim, parallel, sum(full_shape(p).numel() for p in trainable), distributed.world_size())
        root = _Visible(net, precision)
        self._trainable, self._deepspeed = trainable, deepspeed
        self._parameters = {name for name, _ in net.named_parameters()}
        self._last: tuple[str, Tensor] = ("", torch.empty(0))
        self._ep_rank = distributed.rank() % parallel.ep
        self.frozen = frozen_checksum(net)
        if parallel.ep > 1:
            mark(net, parallel.zero)
        self._engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config)
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
        self._last = ("", torch.empty(0))

    # What a checkpoint and an export need: the whole of what ZeRO and expert parallelism have cut

    def stretches(self, load: bool = False) -> Iterator[Stretch]:
        """What this rank holds the fp32 weights and the optimiser's state of; with `load` what must be written.

        A flat tensor on NVMe is in memory until the next one's stretches begin.
        """
        names = {id(p): name for name, p in self.net.named_parameters()}
        for p, start, flat, offset, length in self._held(load):
            if length > 0:
                first = self._ep_rank * full_shape(p).numel() if hasattr(p, "group_name") else 0
                yield Stretch(names[id(p)], first + start, length, flat, offset)

    def _held(self, load: bool) -> Iterator[tuple[Any, int, Tensor, int, int]]:
        """(parameter, start within it, the optimiser's flat tensor, offset there, length)."""
        optimizer = self._engine.optimizer
        if self.zero == 0:
            for p in self._trainable if distributed.rank() == 0 or load else []:
                yield p, 0, p, 0, p.numel()
        elif self.zero == 3:
            for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                with self._in_memory(group, load):
                    for p in optimizer.fp16_groups[group]:
                        _, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
                        start, length = stretch(p)
                        yield p, start, flat, offset, length
        else:
            flats = optimizer.single_partition_of_fp32_groups
            for flat, group in zip(flats, optimizer.bit16_groups, strict=True):
                for p in group:
                    held = p._hp_mapping
                    if held is not None:
                        here, there = held.lp_fragment_address, held.hp_fragment_address
                        yield p, here.start, flat, there.start, here.numel

    @contextmanager
    def _in_memory(self, group: int, changed: bool) -> Iterator[None]:
        """ZeRO-3's flat tensor `group` and its state, read from NVMe where they lie there; `changed` ones go back and
        into the model's parameters."""
        optimizer = self._engine.optimizer
        swapped = optimizer._swappable_optimizer_subgroup(group)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if changed:
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if swapped and changed:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            optimizer._release_swap_buffers(group)

    def _loaded(self) -> None:
        self._last = ("", torch.empty(0))
        optimizer = self._engine.optimizer
        if self.zero in (1, 2):
            optimizer.update_lp_params()
        elif self.zero == 3:
            small = optimizer.persistent_parameters
            if small:
                small[0].partition(small)
                small[0].all_gather(small)

    @torch.no_grad()
    def whole(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter or buffer in full, or one expert of it; on rank 0 at least. All ranks call it alike."""
        p = self.net.get_parameter(name) if name in self._parameters else self.net.get_buffer(name)
        value = self._together(name, p) if self.zero == 3 and name in self._parameters else p.detach()
        if expert is None:
            return value
        count = value.shape[0]
        owner, held = divmod(expert, count)
        if not hasattr(p, "group_name"):
            return value[expert]
        from torch.distributed import broadcast, get_global_rank

        group = expert_group(self.net)
        found = value[held].contiguous() if owner == self._ep_rank else torch.empty_like(value[0])
        broadcast(found, get_global_rank(group, owner), group=group)
        return found

    def _together(self, name: str, p: Any) -> Tensor:
        """A ZeRO-3 parameter's local whole; the last one is kept, for the experts in it are asked for one by one."""
        if self._last[0] != name:
            with self._deepspeed.zero.GatheredParameters([p]):
                self._last = (name, p.detach().clone())
        return self._last[1]

    def close(self) -> None:
        self._engine.destroy()
        if self._swap is not None:
            self._swap.cleanup()
