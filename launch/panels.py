"""What a person watching a stage wants to see, most wanted first: the one declaration behind the W&B workspace
(launch/workspace.py) and the live page (launch/live.py).

Labels, units and axes are those of launch/report_names.py. A test runs every stage and holds each key against what the
run logged, so that no panel stays empty because a metric was renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from launch.report_names import Metric, metric


@dataclass(frozen=True)
class Panel:
    """One chart. `keys`: a line each; `*` stands for one part of a key (a layer, a domain), a line for each there is.

    `needs`: the setting without which a run of the stage does not log it; '' where every run does.
    """

    keys: tuple[str, ...]
    title: str
    needs: str = ""

    @property
    def metric(self) -> Metric:
        """Unit, axis and direction: those of the first key."""
        return metric(self.keys[0].rsplit("/", 1)[-1] if "*" in self.keys[0] else self.keys[0])

    @property
    def pattern(self) -> str:
        """A regular expression that matches all of its keys and no other."""
        return "^(" + "|".join(re.escape(key).replace(r"\*", "[^/]+") for key in self.keys) + ")$"

    @property
    def is_pattern(self) -> bool:
        return any("*" in key for key in self.keys)

    def matching(self, logged: Iterable[str]) -> list[str]:
        """Its keys among those that were logged, in the order of `keys`, then by name."""
        patterns = [re.compile(re.escape(key).replace(r"\*", "[^/]+")) for key in self.keys]
        found = sorted(logged)
        return [key for pattern in patterns for key in found if pattern.fullmatch(key)]


def _one(key: str, title: str = "", needs: str = "") -> Panel:
    return Panel((key,), title or metric(key).label, needs)


STEPS = (_one("optim/grad_norm"), _one("optim/skipped_steps"))
COST = (_one("perf/tokens_per_s"), _one("perf/model_tflops"), _one("perf/peak_memory_bytes"))
BALANCE = _one("moe/load_max_over_mean")
RATES = Panel(("optim/lr", "optim/indexer_lr"), "Learning rates, trunk and indexer")
ADAPTATION = (
    _one("loss/lm"),
    _one("indexer/kl_captured_selected"),
    _one("loss/indexer_kl"),
    _one("indexer/layer_*/kl_captured_selected", "KL captured on the selected set, by layer"),
    _one("loss/mtp"),
    *STEPS,
    BALANCE,
    RATES,
    *COST,
)

PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (_one("loss/lm"), _one("loss/mtp"), *STEPS, BALANCE, _one("optim/lr"), *COST),
    "dense_warmup": (
        _one("indexer/recall_of_oracle"),
        _one("indexer/kl_captured"),
        _one("loss/indexer_kl"),
        _one("indexer/layer_*/recall_of_oracle", "Recall of the oracle, by layer"),
        _one("indexer/mass_recall"),
        *STEPS,
        _one("optim/lr"),
        *COST,
    ),
    "sparse_adapt": ADAPTATION,
    "sft": ADAPTATION,
    "grpo": (
        _one("reward/mean"),
        _one("heldout/accuracy", needs="rl.eval_every"),
        _one("rollout/length_mean"),
        _one("rollout/truncated_frac"),
        _one("policy/kl_ref", needs="rl.beta"),
        _one("mismatch/k3"),
        _one("domain/*/accuracy", "Accuracy by domain", needs="several domains"),
        _one("reward/zero_spread_frac"),
        _one("policy/clip_frac"),
        _one("policy/off_policy_masked_frac"),
        Panel(("policy/off_policy_kl_p50", "policy/off_policy_kl_p99"), "Off-policy KL of a sequence, 50% and 99%"),
        Panel(("mismatch/route_agree", "mismatch/index_overlap"), "Same experts, same keys as the sampler"),
        _one("reward/failed_grades"),
        *STEPS,
        _one("optim/lr"),
        _one("rollout/tokens_per_s"),
        *COST,
    ),
    "evaluate": (
        Panel(("loss/lm_dense", "loss/lm_sparse"), "LM loss, dense and sparse attention"),
        _one("reward/accuracy", needs="a tokenizer with the chat's words"),
        _one("indexer/recall_of_oracle"),
        _one("indexer/mass_recall"),
        _one("indexer/layer_*/recall_of_oracle", "Recall of the oracle, by layer"),
        _one("domain/*/accuracy", "Accuracy by domain", needs="several domains"),
        _one("rollout/length_mean", needs="a tokenizer with the chat's words"),
        _one("rollout/truncated_frac", needs="a tokenizer with the chat's words"),
        _one("perf/tokens_per_s"),
        _one("perf/peak_memory_bytes"),
    ),
}
TITLES = {
    "pretrain": "Pre-training",
    "dense_warmup": "Dense warm-up",
    "sparse_adapt": "Sparse adaptation",
    "sft": "SFT",
    "grpo": "GRPO",
    "evaluate": "Evaluation",
}
TABLES = {"grpo": ("samples",)}  # W&B tables of a stage: rl/samples.py TABLE
