"""What a run will take before it is started: memory a GPU, FLOPs, traffic, time, GPU-hours and money.

    python launch/plan.py +stage=sparse_adapt model=deepseek_v3_2 cluster=h800_2048 [key=value ...] [--search]

Settings are those of launch/stage.py, and two more: `cluster=NAME` (conf/cluster, or a YAML file) and `gpus=N` of it.
What is left open is filled in and said: the paper's length and sequences a step, bf16 where it is faster, and, where no
`parallel.*` is given, the quickest layout that fits. `--as-is` fills in nothing: the plan of exactly the run that
launch/stage.py would start on these GPUs. `--search` ranks the layouts that fit.
`--hidden SHARE` asks what hiding that share of the waiting for the network would bring. `--out FILE`: where the JSON
goes (default runs/plan.json). Exit status: 0 it fits, 1 it does not, 2 the user's mistake. docs/planner.md explains.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a bare checkout

from conf.errors import UserError  # noqa: E402  (needs the path above)
from conf.hardware import Cluster, load_cluster  # noqa: E402
from conf.load import load  # noqa: E402
from conf.schema import RunConfig  # noqa: E402
from conf.validate import check  # noqa: E402
from conf.validate_pipeline import micro_batches_needed  # noqa: E402
from launch.plan_text import ranking, report  # noqa: E402
from train.budgets import PAPER_LENGTH, PAPER_SEQUENCES, Cost, budgets  # noqa: E402
from train.communication import flows  # noqa: E402
from train.flops import flops_per_token  # noqa: E402
from train.job import Job  # noqa: E402
from train.layouts import Found, enough_micro_batches, leanest, search  # noqa: E402
from train.memory_model import predict  # noqa: E402
from train.parameters import counts  # noqa: E402
from train.stages import STAGES  # noqa: E402
from train.step_time import predict_step  # noqa: E402

USER_MISTAKE, TOO_LARGE = 2, 1
OWN_KEYS = ("cluster", "gpus")
SEQUENCES = 64  # of a step where the paper names none


@dataclass(frozen=True)
class Question:
    """What is asked: the run, its cluster, the user's keys, and what was filled in for him."""

    config: RunConfig
    cluster: Cluster
    overrides: frozenset[str]
    filled: tuple[str, ...]
    as_is: bool
    hidden: float

    @property
    def free(self) -> bool:
        """Whether the layout is open."""
        return not self.as_is and not any(key.startswith("parallel.") for key in self.overrides)

    @property
    def sequences_open(self) -> bool:
        return not self.as_is and "train.micro_batches" not in self.overrides

    @property
    def step_sequences(self) -> int:
        return PAPER_SEQUENCES.get(self.config.stage, SEQUENCES)

    @property
    def held(self) -> dict[str, Any]:
        """What a search may not vary."""
        config, found = self.config, {}
        for key in ("zero", "ep", "cp", "pp", "offload"):
            if f"parallel.{key}" in self.overrides:
                found[key] = getattr(config.parallel, key)
        if not self.sequences_open:
            found["sequences"] = config.train.micro_batches
        if self.as_is or "train.activation_checkpointing" in self.overrides:
            found["checkpointing"] = config.train.activation_checkpointing
        return found


def whole_number(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"{key}={text} must be a whole number >= 1")
    return int(text)


def ask(argv: Sequence[str], as_is: bool, hidden: float) -> Question:
    """Reads the command line. UserError with one line where it is wrong."""
    own = {key: text for key, _, text in (arg.partition("=") for arg in argv) if key in OWN_KEYS}
    loaded = load([arg for arg in argv if arg.partition("=")[0] not in OWN_KEYS])
    if "cluster" not in own:
        raise UserError("no cluster is given: add cluster=NAME, a file of conf/cluster or your own")
    cluster = load_cluster(own["cluster"])
    gpus = whole_number("gpus", own.get("gpus", str(cluster.network.gpus)))
    if gpus > cluster.network.gpus:
        raise UserError(f"gpus={gpus} is more than the {cluster.network.gpus} of cluster={own['cluster']}: give fewer")
    cluster = replace(cluster, network=replace(cluster.network, gpus=gpus))
    config, overrides = loaded.config, loaded.overrides
    filled: list[str] = []
    if STAGES[config.stage].runner == "evaluate":
        raise UserError("+stage=evaluate trains nothing: plan a stage that trains")
    schedule = config.parallel.pp_schedule
    if schedule != "1f1b":
        raise UserError(f"parallel.pp_schedule={schedule} is not planned, 1f1b alone is: leave it out for the plan")
    if not as_is:
        config, filled = fill_in(config, cluster, overrides)
    return Question(config, cluster, overrides, tuple(filled), as_is, hidden)


def fill_in(config: RunConfig, cluster: Cluster, overrides: frozenset[str]) -> tuple[RunConfig, list[str]]:
    """What the user left open and the plan needs."""
    filled: list[str] = []
    key = "rl.pack_len" if STAGES[config.stage].runner == "rl" else "data.seq_len"
    if key not in overrides:
        length = min(PAPER_LENGTH, config.model.max_position_embeddings)
        length = min(length, 32768) if key.startswith("rl") else length
        section = key.partition(".")[0]
        part = replace(getattr(config, section), **{key.partition(".")[2]: length})
        config, filled = replace(config, **{section: part}), [f"{key}={length}"]
    gpus = cluster.network.gpus
    if key.startswith("rl") and "rl.prompts_per_step" not in overrides and config.rl.prompts_per_step % gpus:
        prompts = -(-config.rl.prompts_per_step // gpus) * gpus
        config = replace(config, rl=replace(config.rl, prompts_per_step=prompts))
        filled.append(f"rl.prompts_per_step={prompts}")
    gpu = cluster.gpu
    if not {"precision", "precision.name"} & overrides and gpu.bf16_tflops > gpu.fp32_tflops:
        config = replace(config, precision=replace(config.precision, name="bf16"))
        filled.append("precision=bf16")
    if "train.activation_checkpointing" not in overrides and any(key.startswith("parallel.") for key in overrides):
        config = replace(config, train=replace(config.train, activation_checkpointing=True))
        filled.append("train.activation_checkpointing=true")
    return config, filled


def job_of(question: Question) -> Job:
    """The run as the formulas take it. Rollouts of RL are its own where a copy of the model takes less than half of a
    GPU; else servers draw them."""
    config, cluster = question.config, question.cluster
    stage, world = STAGES[config.stage], cluster.network.gpus
    is_rl = stage.runner == "rl"
    length = config.rl.pack_len if is_rl else config.data.seq_len
    native = is_rl and 4 * counts(config.model).total < 0.5e9 * cluster.gpu.memory_gb
    drawn = config.rl.prompts_per_step * config.rl.group_size
    return Job(
        config.model, stage, config.parallel, world, length, config.precision.name, config.train.micro_batches,
        config.train.activation_checkpointing, cluster.network.gpus_per_node > 1 or world > 1,
        math.ceil(drawn / world) if native else 0,
    )  # fmt: skip


def check_layout(question: Question) -> None:
    """The rules of launch/stage.py. What is open is taken as it does no harm: another part finds the best of it."""
    config = question.config
    if question.free:
        config = replace(config, parallel=replace(config.parallel, zero=1, ep=1, cp=1, pp=1))
    elif question.sequences_open:
        enough = micro_batches_needed("1f1b", config.parallel.pp, config.train.micro_batches)
        config = replace(config, train=replace(config.train, micro_batches=enough))
    check(config, question.cluster.network.gpus)


def answer(question: Question, wanted: int) -> tuple[Found | None, list[Found]]:
    """The layout that is planned (None: nothing fits) and, where they were searched for, those that fit."""
    check_layout(question)
    job = job_of(question)
    ranked: list[Found] = []
    if question.free or wanted:
        ranked = search(job, question.cluster, question.step_sequences, question.held, question.hidden)
        if question.free or ranked:
            return (ranked[0] if ranked else None), ranked
    if question.sequences_open:
        job = replace(job, sequences=enough_micro_batches(job, question.step_sequences))
    return Found(job, predict(job), predict_step(job, question.cluster, question.hidden)), ranked


def cost_json(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"hours": cost.hours}


def as_json(question: Question, found: Found, ranked: list[Found]) -> dict[str, Any]:
    job, node = found.job, question.cluster.network.gpus_per_node
    traffic = []
    for flow in flows(job, floor=found.time.floor):
        inside, outside = flow.sent(node)
        traffic.append({**asdict(flow), "sent_in_node": inside, "sent_between_nodes": outside})
    costs = [
        {"dsa": cost_json(dsa), "dense": None if dense is None else cost_json(dense)}
        for dsa, dense in budgets(found, question.cluster, question.hidden)
    ]
    return {
        "settings": found.settings,
        "filled": question.filled,
        "stage": job.stage.name,
        "gpus": job.world,
        "seq_len": job.seq_len,
        "precision": job.precision,
        "cluster": asdict(question.cluster),
        "parameters": asdict(counts(job.model)),
        "memory": asdict(found.memory) | {"total": found.memory.total, "allocated": found.memory.allocated},
        "fits": found.memory.total <= question.cluster.gpu.memory_gb * 1e9,
        "flops_per_token": flops_per_token(job.model, job.stage, job.seq_len),
        "traffic": traffic,
        "step": asdict(found.time) | {"seconds": found.time.total, "tokens_per_s": found.time.tokens_per_s},
        "budgets": costs,
        "ranked": [
            {"settings": one.settings, "tokens_per_s": one.time.tokens_per_s, "memory": one.memory.total}
            for one in ranked
        ],
    }


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be within [0, 1]")
    return value


class Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"plan.py: {message}")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--top", default="10")
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--hidden", type=share, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("runs/plan.json"))
    options, settings = parser.parse_known_args(list(argv))
    odd = [word for word in settings if word.startswith("-")]
    if odd:
        raise UserError(f"{odd[0]} is no option: valid: --search, --top, --as-is, --hidden, --out")
    options.top = whole_number("--top", options.top)
    return options, settings


def run(argv: Sequence[str]) -> int:
    options, settings = parse(argv)
    question = ask(settings, options.as_is, options.hidden)
    found, ranked = answer(question, options.top if options.search else 0)
    if found is None:
        job = job_of(question)
        least = leanest(job, question.step_sequences, question.held)
        if least is None:
            raise UserError(
                f"{question.step_sequences} sequences of {job.seq_len} tokens a step are too few for {job.world} GPUs:"
                " give fewer (gpus=N), or train.micro_batches of each replica"
            )
        job, memory = least
        raise UserError(
            f"no layout fits: the leanest, {Found(job, memory, predict_step(job, question.cluster)).settings}, takes"
            f" {memory.total / 1e9:.0f} GB of {question.cluster.gpu.memory_gb:g}: give more GPUs or a shorter length"
        )
    if options.search:
        print(ranking(ranked[: options.top], len(ranked), question.cluster), end="\n\n")
    print(report(question, found))
    result = as_json(question, found, ranked[: options.top])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")
    return 0 if result["fits"] else TOO_LARGE


def main(argv: Sequence[str]) -> int:
    try:
        return run(argv)
    except UserError as error:
        print("; ".join(str(error).splitlines()), file=sys.stderr)
        return USER_MISTAKE
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (what is left is dropped at exit)
        return 0
    except OSError as error:
        print(f"{error.filename}: {error.strerror}: give another --out", file=sys.stderr)
        return USER_MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
