"""What the metrics are called, measured in and good for: labels, units, sections and number formats of the report.

A metric that is not listed is still drawn, under its own key; the list only makes the page read better.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

DOMAIN_KEY = re.compile(r"^(?P<group>domain|heldout)/(?P<domain>.+)/(?P<name>[^/]+)$")
LAYER_KEY = re.compile(r"^(?P<group>.+)/layer_(?P<layer>\d+)/(?P<name>.+)$")


@dataclass(frozen=True)
class Metric:
    """`unit` is '' | 'bytes' | a word after the number; `better` is 'low', 'high' or '' (neither)."""

    label: str
    unit: str = ""
    better: str = ""
    log: bool = False  # a logarithmic axis where the values span more than a decade or so
    share: bool = False  # lies in [0, 1]


METRICS = {
    "loss/lm": Metric("Language-model loss", "nats/token", "low"),
    "loss/lm_dense": Metric("LM loss, dense attention", "nats/token", "low"),
    "loss/lm_sparse": Metric("LM loss, sparse attention", "nats/token", "low"),
    "loss/mtp": Metric("Multi-token-prediction loss", "nats/token", "low"),
    "loss/mtp_dense": Metric("MTP loss, dense attention", "nats/token", "low"),
    "loss/policy": Metric("Policy loss"),
    "loss/indexer_kl": Metric("Indexer KL", "nats", "low", log=True),
    "indexer/kl_captured": Metric("KL captured", "", "high", share=True),
    "indexer/kl_captured_selected": Metric("KL captured on the selected set", "", "high", share=True),
    "indexer/kl_uniform": Metric("KL of the uniform distribution", "nats"),
    "indexer/mass_recall": Metric("Attention mass recalled", "", "high", share=True),
    "indexer/recall_of_oracle": Metric("Recall of the oracle", "", "high", share=True),
    "indexer/recall_of_oracle_min": Metric("Recall of the oracle, worst layer", "", "high", share=True),
    "kl": Metric("Indexer KL", "nats", "low", log=True),  # the last part of a per-layer key
    "kl_captured": Metric("KL captured", "", "high", share=True),
    "kl_captured_selected": Metric("KL captured on the selected set", "", "high", share=True),
    "kl_uniform": Metric("KL of the uniform distribution", "nats"),
    "mass_recall": Metric("Attention mass recalled", "", "high", share=True),
    "recall_of_oracle": Metric("Recall of the oracle", "", "high", share=True),
    "moe/load_max_over_mean": Metric("Busiest expert over the mean", "×", "low"),
    "load_max_over_mean": Metric("Busiest expert over the mean", "×", "low"),
    "reward/mean": Metric("Reward", "", "high"),
    "reward/accuracy": Metric("Exact-answer accuracy", "", "high", share=True),
    "reward/zero_spread_frac": Metric("Groups of equal rewards", share=True),
    "reward/failed_grades": Metric("Failed grades", "", "low"),
    "reward/failed_groups": Metric("Groups left out", "", "low"),
    "reward/num_problems": Metric("Problems"),
    "heldout/accuracy": Metric("Held-out accuracy, all domains", "", "high", share=True),
    "accuracy": Metric("Accuracy", "", "high", share=True),  # the last part of a domain's key
    "reward": Metric("Reward", "", "high"),
    "length_mean": Metric("Length of an answer", "tokens"),
    "truncated_frac": Metric("Truncated answers", "", "low", share=True),
    "zero_spread_frac": Metric("Groups of equal rewards", share=True),
    "kl_ref": Metric("KL to the reference", "nats/token", log=True),
    "samples": Metric("Samples"),
    "rollout/tokens_per_s": Metric("Sampling throughput", "tokens/s", "high"),
    "rollout/prompts_too_long": Metric("Prompts too long", "", "low"),
    "rollout/length_mean": Metric("Length of an answer", "tokens"),
    "rollout/truncated_frac": Metric("Truncated answers", "", "low", share=True),
    "rollout/missing_logprobs": Metric("Tokens without a sampler's log-prob", "", "low"),
    "rollout/resampled_groups": Metric("Groups replaced by further prompts"),
    "rollout/carried": Metric("Samples that go on in the next iteration"),
    "rollout/staleness_mean": Metric("Age of the weights that drew the trained tokens", "iterations", "low"),
    "rollout/idle_iterations": Metric("Iterations without a step", "", "low"),
    "policy/clip_frac": Metric("Clipped tokens", "", share=True),
    "policy/kl_ref": Metric("KL to the reference", "nats/token", log=True),
    "policy/off_policy_masked_frac": Metric("Masked as off-policy", "", "low", share=True),
    "policy/off_policy_above_delta_frac": Metric("Above delta, of those with A < 0", "", "low", share=True),
    "policy/off_policy_kl_p50": Metric("Off-policy KL of a sequence, median", "nats/token"),
    "policy/off_policy_kl_p90": Metric("Off-policy KL of a sequence, 90%", "nats/token"),
    "policy/off_policy_kl_p99": Metric("Off-policy KL of a sequence, 99%", "nats/token"),
    "policy/off_policy_kl_max": Metric("Off-policy KL of a sequence, largest", "nats/token"),
    "policy/importance_mean": Metric("Mean weight of trainer against sampler"),
    "policy/importance_capped_frac": Metric("Weights at the cap", "", "low", share=True),
    "policy/ratio_mean": Metric("Mean importance ratio"),
    "policy/entropy": Metric("Entropy", "nats/token"),
    "mismatch/k3": Metric("Trainer against sampler, K3", "nats/token", "low", log=True),
    "mismatch/route_agree": Metric("Same experts chosen", "", "high", share=True),
    "mismatch/index_overlap": Metric("Same keys selected", "", "high", share=True),
    "optim/grad_norm": Metric("Gradient norm", log=True),
    "optim/lr": Metric("Learning rate"),
    "optim/indexer_lr": Metric("Learning rate of the indexer"),
    "optim/skipped_steps": Metric("Steps lost to the guards", "", "low"),
    "perf/tokens_per_s": Metric("Throughput", "tokens/s", "high"),
    "perf/model_tflops": Metric("Model compute", "TFLOP/s", "high"),
    "perf/peak_memory_bytes": Metric("Peak memory", "bytes", "low"),
    "flops/rollout": Metric("Rollouts so far", "FLOP"),
    "flops/update": Metric("Updates so far", "FLOP"),
    "flops/reference": Metric("Reference so far", "FLOP"),
    "flops/reward": Metric("Rewards so far", "FLOP"),
    "flops/rl_over_pretrain": Metric("RL compute over pre-training"),
}

# (prefix of the key, title, one line for the reader), in the order of the page.
SECTIONS = (
    ("loss/", "Losses", "What training minimises, on the training batches."),
    ("indexer/", "Indexer health", "How much of the attention the lightning indexer finds, averaged over layers."),
    ("moe/", "Experts", "How evenly the router spreads its tokens."),
    ("heldout/", "Held-out problems", "One sample a problem that no training step sees, during the run."),
    ("domain/", "Domains", "The samples of each iteration, by domain."),
    ("reward/", "Rewards", "What the samples of each iteration earned."),
    ("rollout/", "Rollouts", "What sampling produced."),
    ("policy/", "Policy", "How far an update moves the policy."),
    ("mismatch/", "Trainer against sampler", "Where the trainer sees another model than the one that sampled."),
    ("optim/", "Optimiser", "Steps as they were taken."),
    ("perf/", "Performance", "Speed and memory of the slowest and fullest rank."),
    ("flops/", "Compute", "What the run has spent by formula, and as a share of all training before it."),
    ("", "Other metrics", ""),
)

HEADLINES = (
    "loss/lm",
    "loss/lm_dense",
    "loss/lm_sparse",
    "loss/mtp",
    "loss/indexer_kl",
    "indexer/kl_captured",
    "indexer/mass_recall",
    "indexer/recall_of_oracle",
    "indexer/recall_of_oracle_min",
    "reward/mean",
    "reward/accuracy",
    "heldout/accuracy",
    "rollout/length_mean",
    "mismatch/k3",
    "moe/load_max_over_mean",
    "optim/grad_norm",
    "perf/tokens_per_s",
    "perf/model_tflops",
    "perf/peak_memory_bytes",
)


def metric(key: str) -> Metric:
    """The metric of a key, or one that only knows the key's name."""
    match = DOMAIN_KEY.match(key)
    if match is not None and match["name"] in METRICS:
        known = METRICS[match["name"]]
        return replace(known, label=f"{known.label}, {match['domain']}")
    return METRICS.get(key) or Metric(key)


def section_of(key: str) -> str:
    """The prefix of the section that shows `key`."""
    return next(prefix for prefix, _, _ in SECTIONS if key.startswith(prefix))


def bytes_unit(largest: float) -> tuple[float, str]:
    """(bytes of one unit, its name) for values up to `largest`."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(names) - 1, max(0, int(math.log(largest, 1024)))) if largest >= 1 else 0
    return 1024.0**power, names[power]


def number(value: float) -> str:
    """A number in few characters, about four digits of it: `2.134`, `12.4k`, `7.3e-06`, `1.2M`."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e12:
        return re.sub(r"\.?0+e", "e", f"{value:.2e}").replace("e-0", "e-").replace("e+", "e")
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.4g}{suffix}"
    if value == int(value):
        return str(int(value))
    if size < 1:
        return f"{value:.4f}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:#.4g}"


def quantity(key: str, value: float | None) -> str:
    """The value with a unit where the number alone would not be read rightly."""
    if value is None:
        return "–"
    if metric(key).unit == "bytes":
        per, name = bytes_unit(abs(value))
        return f"{value / per:.4g} {name}"
    return number(value)
