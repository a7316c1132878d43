"""A plan as text for the terminal; docs/planner.md shows one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from conf.hardware import Cluster
from train.budgets import RL, budgets
from train.communication import flows
from train.flops import flops_per_token
from train.job import Job
from train.layouts import Found
from train.memory_model import KINDS
from train.parameters import counts
from train.step_time import step_flops

if TYPE_CHECKING:
    from launch.plan import Question

SAID = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimiser": "optimiser (moments, own copy of weights)",
    "activations": "activations",
    "indexer": "indexer (selection, ready gradients)",
    "weight_copies": "weights narrowed by autocast",
    "buffers": "buffers (buckets, gathered weights)",
    "workspace": "workspace (op blocks, logits tile, layer at work)",
    "kv": "KV and index-key cache of rollouts",
}


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)] if head else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        line[:] = [cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(line)]
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in lines)


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 or not count else f"{count / 1e9:.2g}"


def amount(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "


def dollars(value: float) -> str:
    return f"${value / 1e6:.2f} M" if value >= 1e5 else f"${value:,.0f}"


def ranking(found: Sequence[Found], total: int, cluster: Cluster) -> str:
    rows = []
    for one in found:
        job, parallel = one.job, one.job.parallel
        rows.append(
            [
                f"zero {parallel.zero}", str(parallel.ep), str(parallel.cp), str(job.pp), str(job.sequences),
                "yes" if job.checkpointing else "no", parallel.offload, gb(one.memory.total),
                f"{one.time.total:.1f}", f"{one.time.tokens_per_s:,.0f}",
            ]
        )  # fmt: skip
    head = ("", "ep", "cp", "pp", "micro-batches", "checkpointing", "offload", "GB a GPU", "s a step", "tokens/s")
    body = table(rows, head) if rows else "  none"
    return f"{total} layouts fit {cluster.network.gpus} x {cluster.gpu.memory_gb:g} GB; the quickest:\n{body}"


def report(question: Question, found: Found) -> str:
    parts = [_head(question, found), _memory(question, found), _flops(found), _traffic(question, found)]
    return "\n\n".join([*parts, _time(found), _budgets(question, found)])


def _head(question: Question, found: Found) -> str:
    job, cluster, size = found.job, question.cluster, counts(found.job.model)
    filled = f"\nfilled in: {' '.join(question.filled)}" if question.filled else ""
    what = f"stage {job.stage.name}: {job.world:,} x {cluster.gpu.name}"
    kept = f"{what}, {job.seq_len:,} tokens a sequence, {job.precision}"
    values = (
        f"parameters: {amount(size.total)} ({amount(size.experts)} routed experts, {amount(size.indexer)} indexer,"
        f" {amount(size.mtp)} MTP), active a token {amount(size.active)}"
    )
    return f"{kept}\nlayout: {found.settings}{filled}\n{values}"


def _of_floor(job: Job, floor: int) -> str:
    return f" on floor {floor} of {job.pp}" if job.pp > 1 else ""


def _memory(question: Question, found: Found) -> str:
    memory, limit = found.memory, question.cluster.gpu.memory_gb * 1e9
    rows = [[SAID[kind], gb(memory.kinds[kind])] for kind in KINDS if memory.kinds[kind] > 0]
    if memory.outside:
        rows.append(["CUDA, NCCL (assumed)", gb(memory.outside)])
        rows.append(["fragmentation (assumed)", gb(memory.margin)])
    rows.append(["together", gb(memory.total)])
    verdict = "fits" if memory.total <= limit else "DOES NOT FIT: try --search without parallel.*"
    when = ", ".join(f"{name} {gb(count)}" for name, count in memory.phases.items())
    where = f"{memory.moment}{_of_floor(found.job, memory.floor)}"
    return (
        f"memory of a GPU, GB, at its fullest ({where}); {limit / 1e9:g} GB there: {verdict}\n{table(rows)}\n"
        f"  by moment, before assumptions: {when}; CPU memory a process: {gb(memory.host)}"
    )


def _flops(found: Found) -> str:
    job = found.job
    parts = step_flops(job.model, job.stage, job.seq_len, False)
    needed = flops_per_token(job.model, job.stage, job.seq_len)
    rows = [[name.replace("_", " "), amount(count / job.seq_len)] for name, count in parts.items() if count]
    return f"FLOPs a token, forward and backward, {amount(needed)}:\n{table(rows)}"


def _traffic(question: Question, found: Found) -> str:
    node, rows = question.cluster.network.gpus_per_node, []
    for flow in flows(found.job, floor=found.time.floor):
        inside, outside = flow.sent(node)
        rows.append(
            [f"{flow.what}, {flow.moment}", flow.collective, str(flow.ranks), gb(flow.size), gb(inside), gb(outside)]
        )
    if not rows:
        return "traffic: none, one process"
    head = ("GB a GPU and step", "collective", "ranks", "buffer", "sent in its node", "between nodes")
    return f"traffic{_of_floor(found.job, found.time.floor)}:\n{table(rows, head)}"


def _time(found: Found) -> str:
    time, job = found.time, found.job
    rows = [[name.replace("_", " "), f"{seconds:.2f}"] for name, seconds in time.compute.items() if seconds >= 0.005]
    rows.append(["optimiser", f"{time.optimiser:.2f}"])
    rows.append(["waiting for the network", f"{time.waiting:.2f}"])
    if time.bubble:
        rows.append(["pipeline bubble", f"{time.bubble:.2f}"])
    needed = flops_per_token(job.model, job.stage, job.seq_len) * time.tokens_per_s / job.world / 1e12
    on_wire = sum(time.network.values())
    where = f"{_of_floor(job, time.floor)}, the slowest," if job.pp > 1 else ","
    return (
        f"a step of {time.tokens:,} tokens, {time.total:.4g} s: {time.tokens_per_s:,.0f} tokens/s,"
        f" {needed:.0f} model TFLOP/s a GPU (on the wire {on_wire:.1f} s{where} of which waited for as below)\n"
        + table(rows)
    )


def _budgets(question: Question, found: Found) -> str:
    rent, rows = question.cluster.gpu.dollars_per_hour, []
    for dsa, dense in budgets(found, question.cluster, question.hidden):
        row = [dsa.name, amount(dsa.tokens), f"{dsa.hours:,.0f}", dollars(dsa.hours * rent)]
        row += ["", "", ""]
        if dense is not None:
            row[-3:] = [f"{dense.hours:,.0f}", dollars(dense.hours * rent), f"{dense.hours / dsa.hours:.2f}"]
        rows.append(row)
    head = ("", "tokens", "GPU-hours", f"at ${rent:g} an hour", "dense: GPU-hours", "money", "dense / DSA")
    note = f"RL: {RL.answer:,} tokens answer {RL.prompt:,} of a prompt, decoded on such GPUs, scored {RL.scored}x more"
    note = "RL: no layout in depth runs it" if found.job.pp > 1 else note
    length = f"{found.job.seq_len:,} tokens a sequence"
    return f"the paper's budgets in this layout, {length}:\n{table(rows, head)}\n  {note}"
