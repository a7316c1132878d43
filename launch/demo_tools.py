"""Reasoning in tool use on one machine: traces -> copying -> base -> warm-up -> cold start -> GRPO with tools, and what
tools are worth.

    python launch/demo_tools.py [--short] [--dir runs/demo_tools]

The policy first learns to copy (data/tasks/copying.py), then to call a calculator for arithmetic beyond its head and to
search a corpus for answers that take two documents, in the middle of its reasoning. Every stage is an ordinary command
line (echoed, so that it can be copied) on two ranks; a stage that is finished is not run again. At the end each policy
is asked the same held-out problems with and without its tools.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.demo import aligned, run  # noqa: E402  (needs the path above when run from a bare checkout)
from launch.report import write_report  # noqa: E402
from launch.samples import write_viewer  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """Environments with their levels, traces and steps of each stage, and what must come of them."""

    environments: dict[str, str]
    traces: int
    at_once: float  # share of the cold start's traces that answer from the head: GRPO is to find that calling pays
    copying: int
    base: int
    warmup: int
    cold_start: int
    grpo: int
    prompts: int  # an iteration
    eval_prompts: int  # held-out problems of each environment
    min_gap: float  # accuracy that tools add, in every environment
    min_gain: float  # accuracy that GRPO adds over the cold start, on the mean


FULL = Plan(
    environments={"calculator": "calculator:1", "search": "search:1"},
    traces=16000,
    at_once=0.3,
    copying=600,
    base=2400,
    warmup=60,
    cold_start=150,
    grpo=12,
    prompts=12,
    eval_prompts=96,
    min_gap=0.3,
    min_gain=0.05,
)
SHORT = Plan(
    environments={"calculator": "calculator:1"},
    traces=1000,
    at_once=0.3,
    copying=20,
    base=40,
    warmup=10,
    cold_start=20,
    grpo=2,
    prompts=4,
    eval_prompts=16,
    min_gap=-1.0,
    min_gain=-1.0,
)
STAGES = ("copying", "base", "warmup", "cold_start", "grpo")
MEASURED = ("cold_start", "grpo")


def trace_commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(file, arguments of launch/traces.py): for the base mostly without schemas, for the cold start with them."""
    names = " ".join([*plan.environments.values(), *list(plan.environments.values())[1:]])  # the first is soon learned
    return [
        ("base_traces.jsonl", f"{names} --num {plan.traces} --bare 0.9 --seed 0 --out {out}/base_traces.jsonl"),
        (
            "traces.jsonl",
            f"{names} --num {plan.traces // 4} --at-once {plan.at_once} --seed 1 --out {out}/traces.jsonl",
        ),
    ]


def commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(name, arguments of launch/stage.py) in order."""
    mixed = f"data.source=files data.path={out}/base_traces.jsonl data.tasks=copying:1,copying:2 data.seq_len=512"
    mixed += " data.packing=best_fit"
    traces = f"data.source=files data.path={out}/traces.jsonl data.seq_len=1280 data.packing=best_fit"
    # the first is soon learned
    shares = dict.fromkeys(plan.environments, 3) | {next(iter(plan.environments)): 1}
    each = ", ".join(f"{name}: {{env: {env}, share: {shares[name]}}}" for name, env in plan.environments.items())
    asked = f"'rl.domains={{{each}}}' rl.outcome=environment rl.max_new_tokens=224 rl.tools.max_turns=5"
    policy = (
        f"rl.prompts_per_step={plan.prompts} rl.group_size=8 rl.length_penalty=0 optim.lr=5e-4 optim.schedule=cosine"
    )
    curve = f"rl.eval_every={max(1, plan.grpo // 2)} rl.eval_prompts={plan.eval_prompts // 2}"
    vocabulary = "model=tiny model.vocab_size=768 model.index_topk=128 model.num_nextn_predict_layers=0"
    vocabulary += " data.tokenizer=train:768"
    spread = "train.spike_factor=20"  # losses of packs of short rows and of long ones differ by more than 3
    copies = "data.synthetic_share=0.9 optim.lr=2e-3 optim.schedule=constant"
    found = [
        ("copying", f"+stage=pretrain {vocabulary} {mixed} {copies} train.steps={plan.copying}"),
        ("base", f"+stage=pretrain init_from={out}/copying {mixed} {spread} train.steps={plan.base} optim.lr=2e-3"),
        ("warmup", f"+stage=dense_warmup init_from={out}/base {traces} train.steps={plan.warmup} optim.lr=1e-2"),
        ("cold_start", f"+stage=sft init_from={out}/warmup {traces} train.steps={plan.cold_start} optim.lr=1e-3"),
        ("grpo", f"+stage=grpo init_from={out}/cold_start {asked} {policy} {curve} train.steps={plan.grpo}"),
    ]
    for name in MEASURED:
        measured = f"+stage=evaluate init_from={out}/{name} {traces} {asked} rl.eval_prompts={plan.eval_prompts}"
        measured += " train.eval_sequences=8"
        found.append((f"{name}_eval", measured))
        found.append((f"{name}_without_tools", f"{measured} rl.use_tools=false"))
    return [(name, f"{arguments} output_dir={out}/{name}") for name, arguments in found]


def write_traces(plan: Plan, out: Path) -> None:
    for name, arguments in trace_commands(plan, out):
        if (ROOT / out / name).exists():
            continue
        line = f"python launch/traces.py {arguments}"
        print(f"\n[traces] {line}", flush=True)
        ended = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=ROOT, check=False)
        if ended.returncode != 0:
            raise SystemExit(ended.returncode)


def summarise(out: Path, plan: Plan) -> dict[str, dict[str, float]]:
    """Of each policy, with and without tools: accuracy, by environment as well, and how it used them."""
    rows = {}
    for name in (f"{policy}_{how}" for policy in MEASURED for how in ("eval", "without_tools")):
        found = json.loads((ROOT / out / name / "evaluation.json").read_text())
        rows[name] = {"accuracy": found["reward/accuracy"]}
        for environment in plan.environments:
            key = f"domain/{environment}/accuracy"
            rows[name][environment] = found.get(key, found["reward/accuracy"])
        for key in ("tool/calls_mean", "tool/resumed_frac", "tool/error_frac", "rollout/length_mean"):
            rows[name][key] = found[key]
    return rows


def check(rows: dict[str, dict[str, float]], plan: Plan) -> list[str]:
    """What was promised and this run did not keep, as readable lines."""
    promises = []
    for name in plan.environments:
        gap = rows["grpo_eval"][name] - rows["grpo_without_tools"][name]
        promises.append((gap >= plan.min_gap, f"accuracy that tools add, {name}: {gap:+.3f} (at least {plan.min_gap})"))
    gain = rows["grpo_eval"]["accuracy"] - rows["cold_start_eval"]["accuracy"]
    promises.append((gain >= plan.min_gain, f"accuracy that GRPO adds: {gain:+.3f} (at least {plan.min_gain})"))
    resumed = rows["grpo_eval"]["tool/resumed_frac"]
    print(f"  trajectories that think on after a tool's result: {'none' if resumed is None else f'{resumed:.3f}'}")
    for kept, line in promises:
        print(f"  {'kept  ' if kept else 'BROKEN'}  {line}")
    return [line for kept, line in promises if not kept]


def table(rows: dict[str, dict[str, float]], plan: Plan) -> str:
    keys = ["accuracy", *plan.environments, "tool/calls_mean", "tool/resumed_frac", "tool/error_frac"]
    lines = [["", *(key.removeprefix("tool/") for key in keys)]]
    for name, row in rows.items():
        lines.append([name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)])
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps of everything, without promises, for CI")
    parser.add_argument("--dir", default=None, help="folder of the runs (runs/demo_tools, or runs/demo_tools_short)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the plan as JSON (name: arguments) and run nothing")
    options = parser.parse_args()
    plan = SHORT if options.short else FULL
    out = Path(options.dir or ("runs/demo_tools_short" if options.short else "runs/demo_tools"))
    if options.list:
        print(json.dumps({"traces": dict(trace_commands(plan, out)), "commands": dict(commands(plan, out))}, indent=1))
        return
    start = time.monotonic()
    write_traces(plan, out)
    for name, arguments in commands(plan, out):
        run(name, arguments, options.ranks)
    rows = summarise(out, plan)
    print(f"\n{table(rows, plan)}\n")
    (ROOT / out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")
    write_viewer([ROOT / out / "grpo"], ROOT / out / "report")
    report = write_report([ROOT / out / name for name in STAGES], ROOT / out / "report", {})
    broken = check(rows, plan)
    print(f"\n{time.monotonic() - start:.0f} s in all; report: {report}")
    if broken:
        raise SystemExit(f"demo_tools: {len(broken)} promise(s) broken, see above")


if __name__ == "__main__":
    main()
