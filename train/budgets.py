"""What the paper's budgets cost on a cluster: GPU-hours and money, dense attention against DSA.

Known, from the reports: tokens of warm-up and adaptation and their length (DeepSeek-V3.2, sec. 2.1.1), tokens of
pre-training and its cost of 2.664 M H800-hours (DeepSeek-V3, table 1 and sec. 4.1), more than 10% of that cost for RL
(V3.2, sec. 3). Assumed: everything in `RL`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.hardware import Cluster
from conf.schema import ModelConfig
from train.flops import Row, flops_per_token, row_flops, sampler_flops
from train.layouts import Found
from train.roofline import token_seconds
from train.stages import STAGES, Stage
from train.step_time import predict_step

PAPER_TOKENS = {"dense_warmup": 2.1e9, "sparse_adapt": 943.7e9}
PAPER_SEQUENCES = {"dense_warmup": 16, "sparse_adapt": 480}  # of a step
PAPER_LENGTH = 131072
PRETRAIN_TOKENS, PRETRAIN_LENGTH, PRETRAIN_HOURS = 14.8e12, 4096, 2.664e6
RL_SHARE = 0.1


@dataclass(frozen=True)
class RolloutAssumption:
    """Of a sample: prompt, answer, and forwards that score it beside the training step (reference, old policy)."""

    prompt: int = 1024
    answer: int = 16384
    scored: int = 1


RL = RolloutAssumption()


@dataclass(frozen=True)
class Cost:
    """`flops`: of the model's mathematics, a token; `seconds`: GPU seconds a token."""

    name: str
    tokens: float
    flops: float
    seconds: float

    @property
    def hours(self) -> float:
        return self.tokens * self.seconds / 3600


def training_cost(name: str, found: Found, cluster: Cluster, stage: str, tokens: float, hidden: float = 0.0) -> Cost:
    """`tokens` of `stage` in the layout of `found`."""
    job = replace(found.job, stage=STAGES[stage])
    time = predict_step(job, cluster, hidden)
    flops = flops_per_token(job.model, job.stage, job.seq_len)
    return Cost(name, tokens, flops, job.world / time.tokens_per_s)


def rl_tokens(found: Found) -> float:
    """Drawn tokens that RL_SHARE of pre-training's FLOPs pay for, under sparse attention."""
    model = found.job.model
    pretraining = PRETRAIN_TOKENS * flops_per_token(model, STAGES["pretrain"], PRETRAIN_LENGTH)
    return RL_SHARE * pretraining / _rl_flops(model, "sparse")


def _rl_stage(kind: str) -> Stage:
    return replace(STAGES["grpo"], attention=kind)


def _rl_flops(model: ModelConfig, kind: str) -> float:
    """A drawn token: drawing, scoring and learning of its sample."""
    length, stage = RL.prompt + RL.answer, _rl_stage(kind)
    row = Row((length,), RL.answer)
    drawn = sum(sampler_flops(model, kind, 0, length, RL.answer).values())
    learnt = sum(row_flops(model, stage, row, mtp=False).values())
    scored = RL.scored * sum(row_flops(model, stage, row, mtp=False, backward=False).values())
    return (drawn + learnt + scored) / RL.answer


def rl_cost(name: str, found: Found, cluster: Cluster, kind: str, hidden: float = 0.0) -> Cost:
    """The same tokens for both kinds of attention (dense | sparse): a token is decoded, scored and learnt from.

    A sample of its length takes fewer ranks than a sequence of the plan's, so that a rank has as many rows as there.
    """
    job, length = found.job, RL.prompt + RL.answer
    cp = 1 << (max(1, job.parallel.cp * length // job.seq_len) - 1).bit_length()
    while job.ranks % cp:
        cp //= 2
    parallel = replace(job.parallel, cp=cp)
    job = replace(job, stage=_rl_stage(kind), seq_len=length, parallel=parallel)
    time = predict_step(job, cluster, hidden)
    learning = job.world * time.total / (job.replicas * job.sequences * RL.answer)
    middle = RL.prompt + RL.answer // 2
    decoding = sum(token_seconds(job.model, cluster, kind, "decode", middle).values())
    seconds = decoding + learning * (1 + RL.scored / 3)  # a forward is a third of a step
    return Cost(name, rl_tokens(found), _rl_flops(job.model, kind), seconds)


def budgets(found: Found, cluster: Cluster, hidden: float = 0.0) -> list[tuple[Cost, Cost | None]]:
    """(DSA, dense) of each budget; the warm-up has no dense counterpart, and RL does not run in depth."""
    warm, adapt = (PAPER_TOKENS[name] for name in ("dense_warmup", "sparse_adapt"))
    costs: list[tuple[Cost, Cost | None]] = [
        (training_cost("indexer warm-up", found, cluster, "dense_warmup", warm, hidden), None),
        (
            training_cost("sparse adaptation", found, cluster, "sparse_adapt", adapt, hidden),
            training_cost("the same tokens, dense", found, cluster, "pretrain", adapt, hidden),
        ),
    ]
    if found.job.pp == 1:
        name = f"RL on {RL_SHARE:.0%} of pre-training's FLOPs"
        sparse, dense = (rl_cost(name, found, cluster, kind, hidden) for kind in ("sparse", "dense"))
        costs.append((sparse, replace(dense, name="the same tokens, dense")))
    return costs
