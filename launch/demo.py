"""The whole way on one machine, on real text: base -> dense control | warm-up -> sparse adaptation -> GRPO.

    python launch/demo.py [--short] [--dir runs/demo]

Every stage is an ordinary command line (echoed, so that it can be copied) on two ranks; this file only strings them
together, reads what they wrote and checks it against what the recipe promises. A stage that is finished is not run
again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.report import write_report  # noqa: E402  (needs the path above when run from a bare checkout)
from launch.runner import Runner  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """Domains with their tasks, steps of each stage, and what must come of them."""

    tasks: dict[str, str]
    synthetic_share: float
    base: int
    base_batch: int  # sequences of a rank
    adapt: int
    warmup: int
    grpo: int
    prompts: int  # an iteration
    min_captured: float
    min_recall: float
    max_parity: float  # sparse loss over the dense control's, relative
    min_righted: float  # share of the wrong answers that GRPO puts right, in every domain


FULL = Plan(
    tasks={"arithmetic": "arithmetic:2", "words": "words:2", "counting": "counting:3"},
    synthetic_share=0.7,
    base=1800,
    base_batch=1,
    adapt=200,
    warmup=500,
    grpo=60,
    prompts=24,
    min_captured=0.9,
    min_recall=0.97,
    max_parity=0.01,
    min_righted=0.3,
)
SHORT = Plan(
    tasks={"arithmetic": "arithmetic:2"},
    synthetic_share=0.4,
    base=450,
    base_batch=2,
    adapt=60,
    warmup=150,
    grpo=25,
    prompts=16,
    min_captured=0.8,
    min_recall=0.95,
    max_parity=0.02,
    min_righted=0.1,
)
BATCH = "train.micro_batches=2"
VOCABULARY = "model=tiny model.vocab_size=512 data.tokenizer=train:512"
DOMAIN_ACCURACY = re.compile("domain/.+/accuracy")
ROWS = ("base", "base_continued", "warmup", "adapted", "grpo")


def data(plan: Plan) -> str:
    """Half of the problems in the corpus show their working, half answer at once and are then mostly wrong: GRPO can
    find out to reason first, and to reason without a slip."""
    mix = f"data.synthetic_share={plan.synthetic_share} data.worked_share=0.5"
    return f"data.source=stdlib {mix} data.tasks={','.join(plan.tasks.values())} data.seq_len=512"


def domains(plan: Plan) -> str:
    """One domain of mixed RL for each task."""
    each = ", ".join(f"{name}: {{tasks: [{task}]}}" for name, task in plan.tasks.items())
    return f"'rl.domains={{{each}}}' rl.outcome=task rl.max_new_tokens=48"


def commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(row name, arguments of launch/stage.py) in order. Adaptation and its control see the same tokens at the same
    rate."""
    mix, asked = data(plan), domains(plan)
    same = f"{mix} {BATCH} train.seed=1 train.steps={plan.adapt} optim.lr=1e-3"
    indexer = f"{mix} train.seed=2 train.steps={plan.warmup} optim.lr=1e-2"
    policy = (
        f"rl.prompts_per_step={plan.prompts} rl.group_size=16 rl.length_penalty=0 optim.lr=2e-4 optim.schedule=cosine"
    )
    curve = f"train.steps={plan.grpo} rl.eval_every={max(1, plan.grpo // 6)} rl.eval_prompts=128"
    stages = [
        ("base", f"+stage=pretrain {VOCABULARY} {mix} train.micro_batches={plan.base_batch} train.steps={plan.base}"),
        ("base_continued", f"+stage=pretrain init_from={out}/base {same}"),
        ("warmup", f"+stage=dense_warmup init_from={out}/base {indexer}"),
        ("adapted", f"+stage=sparse_adapt init_from={out}/warmup {same}"),
        ("grpo", f"+stage=grpo init_from={out}/adapted {asked} {policy} {curve}"),
    ]
    found = []
    for name, arguments in stages:
        measured = f"+stage=evaluate init_from={out}/{name} {mix} {asked} output_dir={out}/{name}_eval"
        found += [(name, f"{arguments} output_dir={out}/{name}"), (f"{name}_eval", measured)]
    return found


def run(name: str, arguments: str, ranks: int) -> None:
    """Runs one stage; its failure ends the demo with its own status."""
    print(f"\n[{name}] torchrun --standalone --nproc-per-node {ranks} launch/stage.py {arguments}", flush=True)
    with Runner() as runner:
        ended = runner.run(shlex.split(arguments), ranks, {"CUDA_VISIBLE_DEVICES": ""}, ROOT)  # CPU, as promised
    if ended.status != 0:
        print(f"demo: stage {name} ended with status {ended.status}; the command above repeats it", file=sys.stderr)
        raise SystemExit(ended.status)
    print(f"[{name}] {ended.seconds:.0f} s", flush=True)


def last_metrics(folder: Path) -> dict[str, float]:
    """The newest value of every key in metrics.jsonl."""
    latest: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        latest.update({k: v for k, v in json.loads(line).items() if v is not None})
    return latest


def summarise(out: Path) -> dict[str, dict[str, float]]:
    """One row a checkpoint: quality from its evaluation, speed and memory from the run that made it."""
    rows = {}
    for name in ROWS:
        evaluation = json.loads((out / f"{name}_eval" / "evaluation.json").read_text())
        training = last_metrics(out / name)
        rows[name] = {
            "loss/lm_dense": evaluation["loss/lm_dense"],
            "loss/lm_sparse": evaluation["loss/lm_sparse"],
            "indexer/kl_captured": evaluation["indexer/kl_captured"],
            "indexer/mass_recall": evaluation["indexer/mass_recall"],
            "indexer/recall_of_oracle": evaluation["indexer/recall_of_oracle"],
            "indexer/recall_of_oracle_min": min(
                v for k, v in evaluation.items() if k.endswith("/recall_of_oracle") and "layer_" in k
            ),
            "reward/accuracy": evaluation["reward/accuracy"],
            **{key: value for key, value in evaluation.items() if DOMAIN_ACCURACY.fullmatch(key)},
            "perf/tokens_per_s": training["perf/tokens_per_s"],
            "perf/peak_memory_bytes": training["perf/peak_memory_bytes"],
        }
    return rows


def accuracy(row: dict[str, float], domain: str) -> float:
    """A single domain is not told apart from the whole."""
    return row.get(f"domain/{domain}/accuracy", row["reward/accuracy"])


def righted(before: float, after: float) -> float:
    """Of what was wrong, the share that is right now: accuracy alone says little where not much was left to gain."""
    return (after - before) / (1 - before) if before < 1 else 1.0


def check(rows: dict[str, dict[str, float]], plan: Plan) -> list[str]:
    """What the recipe promises and this run did not keep, as readable lines."""
    captured = rows["warmup"]["indexer/kl_captured"]
    recall = rows["warmup"]["indexer/recall_of_oracle_min"]
    moved = abs(rows["warmup"]["loss/lm_dense"] - rows["base"]["loss/lm_dense"])
    parity = rows["adapted"]["loss/lm_sparse"] / rows["base_continued"]["loss/lm_dense"] - 1
    steps = {name: (accuracy(rows["adapted"], name), accuracy(rows["grpo"], name)) for name in plan.tasks}
    shares = {name: righted(*pair) for name, pair in steps.items()}
    promises = [
        (moved == 0.0, f"warm-up leaves the dense loss as it was: moved by {moved:.2e}"),
        (captured >= plan.min_captured, f"warm-up captures the KL: {captured:.3f} (at least {plan.min_captured})"),
        (recall >= plan.min_recall, f"recall of the oracle in every layer: {recall:.3f} (at least {plan.min_recall})"),
        (
            parity <= plan.max_parity,
            f"sparse loss over the dense control's: {parity:+.2%} (at most {plan.max_parity:.0%})",
        ),
        *(
            (
                share >= plan.min_righted,
                f"wrong answers that GRPO puts right, {name}: {share:.0%} (at least {plan.min_righted:.0%}), accuracy"
                f" {steps[name][0]:.3f} to {steps[name][1]:.3f}",
            )
            for name, share in shares.items()
        ),
    ]
    for kept, line in promises:
        print(f"  {'kept  ' if kept else 'BROKEN'}  {line}")
    return [line for kept, line in promises if not kept]


def table(rows: dict[str, dict[str, float]]) -> str:
    """The summary as aligned text."""
    by_domain = sorted({key for row in rows.values() for key in row if DOMAIN_ACCURACY.fullmatch(key)})
    heads = ["", "LM dense", "LM sparse", "KL captured", "mass", "of oracle", "accuracy"]
    heads += [key.split("/")[1] for key in by_domain] + ["tokens/s", "peak MiB"]
    keys = [
        "loss/lm_dense",
        "loss/lm_sparse",
        "indexer/kl_captured",
        "indexer/mass_recall",
        "indexer/recall_of_oracle",
        "reward/accuracy",
        *by_domain,
    ]
    lines = [heads]
    for name, row in rows.items():
        cells = [f"{row[k]:.3f}" for k in keys]
        lines.append([name, *cells, f"{row['perf/tokens_per_s']:.0f}", f"{row['perf/peak_memory_bytes'] / 2**20:.0f}"])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer steps and looser promises, for CI")
    parser.add_argument("--dir", default=None, help="folder of the runs (runs/demo, or runs/demo_short)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the plan as JSON (name: arguments) and run nothing")
    options = parser.parse_args()
    plan = SHORT if options.short else FULL
    out = Path(options.dir or ("runs/demo_short" if options.short else "runs/demo"))
    if options.list:
        domains_of_plan = {"domains": list(plan.tasks), "min_righted": plan.min_righted}
        print(json.dumps({"commands": dict(commands(plan, out)), **domains_of_plan}, indent=1))
        return
    start = time.monotonic()
    for name, arguments in commands(plan, out):
        run(name, arguments, options.ranks)
    rows = summarise(ROOT / out)
    print(f"\n{table(rows)}\n")
    (ROOT / out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")
    report = write_report([ROOT / out / name for name in ROWS], ROOT / out / "report", rows)
    broken = check(rows, plan)
    print(f"\n{time.monotonic() - start:.0f} s in all; report: {report}")
    if broken:
        raise SystemExit(f"demo: {len(broken)} promise(s) broken, see above")


if __name__ == "__main__":
    main()
