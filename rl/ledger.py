"""What RL has cost: FLOPs of rollout, update and reference by the formulas of train/flops.py, beside the compute of all
training before it (DeepSeek-V3.2 spends over 10% of pre-training on RL, sec. 3).

The ledger is cumulative over the run and kept in its checkpoints. `flops/reward` is 0: rule-based graders multiply
nothing, and what a judge behind an endpoint computes is not known here. An earlier RL run in `init_from` counts on
neither side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.convert import load_yaml
from conf.errors import UserError
from conf.schema import ModelConfig, RunConfig
from rl.messages import Sample, Stretch
from train.flops import Row, flops_per_token, row_flops, sampler_flops, trunk_weights
from train.metrics import FILE_NAME, read_metrics
from train.stages import STAGES, Stage

PARTS = ("rollout", "update", "reference", "reward")


def iteration_flops(
    model: ModelConfig,
    stage: Stage,
    drawn: Sequence[Stretch],
    trained: Sequence[Sample],
    reference: bool,
    scored_before: Sequence[Sample] = (),
) -> dict[str, float]:
    """One iteration on this rank: `drawn` what was sampled in it, `trained` the samples that an update saw;
    `reference`: whether one scored them; `scored_before`: those whose log pi_old the trainer computed, part of the
    update. A group's prompt is read once; a sample that goes on, after a cut or with a tool's results, reads all it has
    again; a last token does not run."""
    rollout = 0
    for part in drawn:
        request = part.sample.request
        for number, (start, stop) in enumerate(part.messages):
            if request.sample_index == 0 or number or start > len(request.prompt_ids):
                rollout += sum(sampler_flops(model, stage.attention, 0, start, 0).values())
            rollout += sum(sampler_flops(model, stage.attention, start, stop - 1, stop - start).values())
    rows = _rows(trained)
    update = sum(sum(row_flops(model, stage, row, mtp=False).values()) for row in rows)
    scored, before = _forward(model, stage, trained), _forward(model, stage, scored_before)
    return {
        "rollout": float(rollout),
        "update": float(update + before),
        "reference": float(scored if reference else 0),
        "reward": 0.0,
    }


def _forward(model: ModelConfig, stage: Stage, samples: Sequence[Sample]) -> int:
    return sum(sum(row_flops(model, stage, row, mtp=False, backward=False).values()) for row in _rows(samples))


def _rows(samples: Sequence[Sample]) -> list[Row]:
    return [Row((len(columns),), columns.num_sampled) for sample in samples for columns in sample.rows]


def add(ledger: dict[str, float], spent: dict[str, float]) -> dict[str, float]:
    """The ledger with one more iteration."""
    return {part: ledger.get(part, 0.0) + spent[part] for part in PARTS}


def ledger_metrics(ledger: dict[str, float], pretrain: float | None) -> dict[str, float]:
    """`flops/*` of the run so far; the ratio only where the compute of pre-training is known."""
    found = {f"flops/{part}": ledger[part] for part in PARTS}
    if pretrain is not None:
        found["flops/rl_over_pretrain"] = sum(ledger.values()) / pretrain
    return found


def pretrain_flops(config: RunConfig) -> tuple[float | None, str]:
    """Training compute behind the policy, or None and why it is not known.

    With `rl.pretrain_tokens` 6 FLOPs a token and weight that it meets (attention left out: nobody says at what length);
    else what the runs behind `init_from` have logged, each by the formula of its own stage.
    """
    tokens = config.rl.pretrain_tokens
    if tokens is not None:
        return 6.0 * trunk_weights(config.model) * tokens, ""
    total, at, seen = 0.0, config.init_from, set[Path]()
    while at is not None:
        run = run_folder(at)
        if run is None:
            return None, f"{at} is no run of this project"
        if run in seen:
            return None, f"{at} starts from itself"
        seen.add(run)
        try:
            behind = load_yaml(run / "config.yaml")
            rows, _ = read_metrics(run / FILE_NAME)
        except (UserError, OSError) as error:
            return None, str(error)
        stage = STAGES.get(behind.stage)
        if stage is None or not rows or rows[-1].get("tokens") is None:
            return None, f"{run / FILE_NAME} counts no tokens"
        if stage.runner == "train":
            total += (rows[-1]["tokens"] or 0) * flops_per_token(behind.model, stage, behind.data.seq_len)
        at = behind.init_from
    return (total, "") if total > 0 else (None, "no training run lies behind init_from")


def run_folder(init_from: str) -> Path | None:
    """The run that `init_from` names, by its output_dir or the `hf/` inside; None for anything else."""
    given = Path(init_from)
    for folder in (given, given.parent) if given.name == "hf" else (given,):
        if (folder / "config.yaml").is_file() and (folder / FILE_NAME).is_file():
            return folder.resolve()
    return None
