"""The six stages as declarations: what a stage attends with, what it trains and on which losses. The loop only reads
them.

Learning rates at full size are DeepSeek-V3.2's (warm-up 1e-3, adaptation 7.3e-6; the report gives the indexer's rate
during adaptation no number of its own, and its gradient is disjoint from the trunk's: ours is ten times the trunk's).
Models narrower than `NARROW` need larger ones: the `*_narrow` values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.errors import UserError
from conf.schema import OptimConfig

NARROW = 1024  # hidden_size below which the narrow rates hold


@dataclass(frozen=True)
class Stage:
    """A stage of the way from a dense checkpoint to a sparse one that reasons."""

    name: str
    runner: str  # train | rl | evaluate: whose loop runs it
    attention: str = "sparse"  # dense | sparse
    indexer_loss: str | None = None  # None | dense (all causal positions) | selected (over S_t)
    lm_loss: bool = True
    trunk_grad: bool = True  # False: the trunk runs under no_grad
    trains: str = "all"  # indexer | trunk | all: what the optimiser holds
    router_bias: bool = True  # whether the aux-loss-free balancing moves the router's bias
    conversations: bool = False  # rows must hold messages
    previous: tuple[str, ...] = ()  # stages whose newest finished run is the default of init_from
    lr: float = 0.0  # of what the stage trains; of the trunk where it trains both
    lr_narrow: float = 0.0
    indexer_lr: float | None = None  # only where both train
    indexer_lr_narrow: float | None = None

    @property
    def trains_trunk(self) -> bool:
        return self.trains in ("trunk", "all")

    @property
    def trains_indexer(self) -> bool:
        return self.trains in ("indexer", "all")


_DECLARED = (
    Stage(
        name="pretrain",  # makes a small dense base where none exists
        runner="train",
        attention="dense",
        trains="trunk",
        lr=3e-4,
        lr_narrow=3e-3,
    ),
    Stage(
        name="dense_warmup",  # DeepSeek-V3.2, sec. 2.1.1: dense warm-up stage
        runner="train",
        attention="dense",
        indexer_loss="dense",
        lm_loss=False,
        trunk_grad=False,
        trains="indexer",
        router_bias=False,
        previous=("pretrain",),
        lr=1e-3,
        lr_narrow=5e-3,
    ),
    Stage(
        name="sparse_adapt",  # DeepSeek-V3.2, sec. 2.1.1: sparse training stage
        runner="train",
        indexer_loss="selected",
        previous=("dense_warmup",),
        lr=7.3e-6,
        lr_narrow=1e-3,
        indexer_lr=7.3e-5,
        indexer_lr_narrow=2e-3,
    ),
    Stage(
        name="sft",  # cold start for RL: LM loss on the assistant's tokens
        runner="train",
        indexer_loss="selected",
        conversations=True,
        previous=("sparse_adapt",),
        lr=1e-5,
        lr_narrow=1e-3,
        indexer_lr=1e-4,
        indexer_lr_narrow=2e-3,
    ),
    Stage(
        name="grpo",
        runner="rl",
        trains="trunk",
        router_bias=False,
        previous=("sft", "sparse_adapt"),
        lr=1e-6,
        lr_narrow=3e-4,
    ),
    Stage(
        name="evaluate",
        runner="evaluate",
        lm_loss=False,
        trunk_grad=False,
        trains="nothing",
        router_bias=False,
        previous=("grpo", "sft", "sparse_adapt", "dense_warmup", "pretrain"),
    ),
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _DECLARED}


def resolve_rates(stage: Stage, optim: OptimConfig, hidden_size: int) -> OptimConfig:
    """Fills `lr` and `indexer_lr` left null from the declaration, by the width of the model.

    Raises UserError where `optim.indexer_lr` is set for a stage that does not train trunk and indexer both.
    """
    both = stage.trains == "all"
    if optim.indexer_lr is not None and not both:
        raise UserError(
            f"optim.indexer_lr={optim.indexer_lr:g} is not used by stage {stage.name}, which trains the {stage.trains}"
            " alone: give optim.lr"
        )
    if stage.trains == "nothing":
        return optim
    narrow = hidden_size < NARROW
    lr = optim.lr if optim.lr is not None else (stage.lr_narrow if narrow else stage.lr)
    own = stage.indexer_lr_narrow if narrow else stage.indexer_lr
    indexer_lr = (optim.indexer_lr if optim.indexer_lr is not None else own) if both else None
    return replace(optim, lr=lr, indexer_lr=indexer_lr)
