"""How idle the floors of a pipeline are, four times for each schedule:

formula       the closed form, F = I = W
table         the schedule's own table of actions, run in thought with F = I = W: must be the formula's
expected      the same as torch runs it: the first part has no gradient to hand on, so its whole backward is its W;
              and what DualPipeV pairs runs one after the other, both results leaving together
measured      wall clock of torch's runtime over real processes and messages, passes that sleep for a set time: neither
              the number of cores nor other work on the machine decides then, so four floors fit on two cores

And for the model itself on two floors, one thread each: CPU seconds of the passes of each part, how idle floors are
that take these (`from_costs`, by the table), and by the wall clock (`model_measured`, which means something only where
two cores have nothing else to do).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from bench.pipeline_picture import picture
from bench.registry import benchmark
from conf.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from conf.validate_pipeline import PARTS
from train.parallel.depth import parts_of_floor
from train.parallel.schedules import Action, bubble, formula, make_schedule, simulate, table, unit_cost

PP, MICRO_BATCHES, SECONDS, REPEATS = 4, 8, 0.1, 3
SIZES = [(2, 4), (4, 8), (8, 16), (8, 64), (16, 240)]  # floors, micro-batches
MAX_OFF = 0.03  # of `measured`, from `expected`
MODEL_PP, MODEL_MICRO_BATCHES, LENGTH = 2, 4, 256
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pipeline.svg"
METHODS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}
Pass = tuple[Action, float, float]  # with its start and end


def as_torch_runs(cost: Callable[[Action], float]) -> Callable[[Action], float]:
    """The first part's I does nothing and its W all of the backward."""

    def found(action: Action) -> float:
        if action.part or action.kind not in "IW":
            return cost(action)
        return 0.0 if action.kind == "I" else cost(action._replace(kind="B"))

    return found


class _Sleep(torch.autograd.Function):
    """The identity, which takes `forward` seconds there and `backward` on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        time.sleep(ctx.seconds)
        return grad.contiguous(), None, None


class _SleptPart(nn.Module):
    """F, I and W take `SECONDS` by the number of parts on a floor; a matrix would take what the machine has left."""

    def __init__(self, seconds: float, begins: bool, ends: bool) -> None:
        super().__init__()
        self.seconds, self.begins, self.ends = seconds, begins, ends
        self.start, self.weight = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        x = self.start + 0.0 if self.begins else x
        out = _Sleep.apply(x, self.seconds, self.seconds) + _Sleep.apply(self.weight, 0.0, self.seconds)
        return out.sum() if self.ends else out


@contextmanager
def _timed(stages: list[Any], found: list[Pass], clock: Callable[[], float]) -> Iterator[None]:
    """Notes every pass of the stages; what is outside of them waits."""

    def watched(real: Callable[..., Any], kind: str, part: int) -> Callable[..., Any]:
        def run(number: int, *args: Any, **kwargs: Any) -> Any:
            start = clock()
            answer = real(number, *args, **kwargs)
            half = kind == "B" and not kwargs.get("full_backward", True)
            found.append((Action("I" if half else kind, part, number), start, clock()))
            return answer

        return run

    for stage in stages:
        for name, kind in METHODS.items():
            setattr(stage, name, watched(getattr(stage, name), kind, stage.stage_index))
    yield
    for stage in stages:
        for name in METHODS:
            delattr(stage, name)


def measured_bubble(ranks: list[list[Pass]]) -> float:
    """Share of all ranks' time between the first start and the last end that no pass takes."""
    span = max(end for mine in ranks for _, _, end in mine) - min(start for mine in ranks for _, start, _ in mine)
    return 1 - sum(end - start for mine in ranks for _, start, end in mine) / (span * len(ranks))


def slept(schedule: str) -> dict[str, Any]:
    """On each of PP processes."""
    rank, each = dist.get_rank(), SECONDS / PARTS[schedule]
    count = PP * PARTS[schedule]
    states, loss, number = (
        torch.zeros(8, requires_grad=True),
        torch.zeros((), requires_grad=True),
        torch.zeros(1, dtype=torch.int64),
    )
    stages = [
        PipelineStage(
            _SleptPart(each, index == 0, index == count - 1),
            index,
            count,
            torch.device("cpu"),
            input_args=states if index else number,
            output_args=states if index < count - 1 else loss,
        )
        for index in parts_of_floor(schedule, PP, rank)
    ]
    made = make_schedule(schedule, stages, MICRO_BATCHES, lambda output, target: output)
    numbers, bubbles = torch.arange(MICRO_BATCHES), []
    indices = [stage.stage_index for stage in stages]
    args, target = ((numbers,) if 0 in indices else ()), (numbers if count - 1 in indices else None)
    for repeat in range(REPEATS + 1):  # the first one opens connections
        mine: list[Pass] = []
        dist.barrier()
        with _timed(stages, mine, time.monotonic):
            made.step(*args, target=target, return_outputs=False, which=numbers)
        ranks: list[Any] = [None] * PP
        dist.all_gather_object(ranks, mine)
        if repeat:
            bubbles.append(measured_bubble(ranks))
    return {"measured": round(statistics.median(bubbles), 4), "of": [round(value, 4) for value in bubbles]}


def model_costs(schedule: str) -> dict[str, Any]:
    """CPU seconds of a pass by part and kind, on each of MODEL_PP processes."""
    from model import Transformer
    from train.losses import global_counts
    from train.optim import build_optimizer, select_trainable
    from train.parallel.cp import ContextParallel
    from train.parallel.ep import ExpertParallel
    from train.parallel.pp import PipelineParallel
    from train.pipeline_engine import PipelineEngine
    from train.stages import STAGES

    config = RunConfig(
        "sparse_adapt",
        "",
        model=ModelConfig(num_hidden_layers=8),
        data=DataConfig(seq_len=LENGTH),
        train=TrainConfig(micro_batches=MODEL_MICRO_BATCHES),
        optim=OptimConfig(lr=1e-3),
        parallel=ParallelConfig(pp=MODEL_PP, pp_schedule=schedule),
    )
    with torch.device("meta"):
        net = Transformer(config.model)
    pp, cp = PipelineParallel(MODEL_PP, schedule, config.model), ContextParallel(1, MODEL_PP)
    pp.cut(net)
    net.init_weights(0)
    select_trainable(net, STAGES[config.stage])
    engine = PipelineEngine(net, build_optimizer(net, config.optim), config, pp, ExpertParallel(1, MODEL_PP))
    ids, rows = torch.randint(0, config.model.vocab_size, (LENGTH,)), torch.arange(LENGTH)
    batch = dict.fromkeys(("input_ids", "next_ids", "labels", "mtp_labels"), ids)
    batch |= {"positions": rows, "doc_start": torch.zeros_like(rows)}
    batches = [batch] * MODEL_MICRO_BATCHES
    counts = global_counts(batches, cp.copies)

    def run(clock: Callable[[], float]) -> list[list[Pass]]:
        mine: list[Pass] = []
        dist.barrier()
        with _timed(engine.stages, mine, clock):
            engine.run([cp.share(each) for each in batches], counts, False)
        ranks: list[Any] = [None] * MODEL_PP
        dist.all_gather_object(ranks, mine)
        return ranks

    run(time.monotonic)  # the first one opens connections
    wall = [measured_bubble(run(time.monotonic)) for _ in range(REPEATS)]
    seconds: dict[tuple[str, int], list[float]] = {}
    for action, start, end in (each for rank in run(time.thread_time) for each in rank):
        seconds.setdefault((action.kind, action.part), []).append(end - start)
    mean = {key: statistics.mean(values) for key, values in seconds.items()}
    actions = table(schedule, MODEL_PP, MODEL_MICRO_BATCHES)
    found = simulate(actions, lambda action: mean[action.kind, action.part], pairs_send_last=True)
    return {
        "cpu_ms": {f"{kind}{part}": round(1e3 * value, 1) for (kind, part), value in sorted(mean.items())},
        "from_costs": round(bubble(found), 4),
        "model_measured": round(statistics.median(wall), 4),
    }


def on_ranks(what: str, ranks: int) -> list[dict[str, Any]]:
    """A row for each schedule, from `ranks` processes of this file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "bench.pipeline", what]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=alone)
    return json.loads(done.stdout.splitlines()[-1])


@benchmark
def pipeline() -> dict[str, Any]:
    """How idle the floors of each schedule are: by formula, by its table, and measured."""
    rows: list[dict[str, Any]] = []
    for schedule in PARTS:
        for pp, number in SIZES:
            by_table = bubble(simulate(table(schedule, pp, number), unit_cost))
            row = {"schedule": schedule, "pp": pp, "micro_batches": number}
            rows.append(row | {"formula": round(formula(schedule, pp, number), 4), "table": round(by_table, 4)})
    exact = all(abs(row["formula"] - row["table"]) < 1e-3 for row in rows)
    for row in on_ranks("slept", PP):
        name = str(row["schedule"])
        expected = bubble(simulate(table(name, PP, MICRO_BATCHES), as_torch_runs(unit_cost), pairs_send_last=True))
        wanted = formula(name, PP, MICRO_BATCHES)
        size = {"pp": PP, "micro_batches": MICRO_BATCHES}
        rows.append(row | size | {"formula": round(wanted, 4), "expected": round(expected, 4)})
        print(f"{name:12} measured {row['measured']:.3f}, expected {expected:.3f}, formula {wanted:.3f}")
    near = all(abs(row["measured"] - row["expected"]) <= MAX_OFF for row in rows if "measured" in row)
    rows += on_ranks("model", MODEL_PP)
    PICTURE.write_text(picture(PP, MICRO_BATCHES), encoding="utf-8")
    config = {"seconds_a_pass": SECONDS, "repeats": REPEATS, "max_off": MAX_OFF, "model_tokens": LENGTH, "threads": 1}
    config |= {"model_pp": MODEL_PP, "model_micro_batches": MODEL_MICRO_BATCHES}
    return {"config": config, "rows": rows, "passed": exact and near}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = {"slept": slept, "model": model_costs}[sys.argv[1]]
    answers = [{"schedule": schedule, **work(schedule)} for schedule in PARTS]
    if dist.get_rank() == 0:
        print(json.dumps(answers), flush=True)
    dist.destroy_process_group()
