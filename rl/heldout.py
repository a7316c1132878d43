"""How well a policy answers problems that no training step sees: one sample a problem, at temperature 1 and from the
whole distribution, graded like a training sample. A failed grade is left out and counted.

The problems and the seeds depend on the configuration alone, so that every policy, and every moment of a run, is asked
the same with the same luck.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import TokenizersBackend

from conf.errors import UserError
from conf.schema import RunConfig
from rl.groups import Experience, grade
from rl.messages import RolloutRequest
from rl.offer import Offer
from rl.prompts import heldout_prompts, request_of, sample_seed
from rl.rewards.client import JudgeClient
from rl.rewards.pool import RewardPool
from rl.rollout import RolloutEngine
from rl.rollout.tool_loop import ToolLoop
from rl.summary import rollout_row
from train import distributed

EVALUATION = -1  # the "iteration" of the seeds here: no training sample shares them


class Heldout:
    """The held-out problems of a run, `rl.eval_prompts` of each source, and `engine`, which answers them from the whole
    distribution; `too_long`: prompts that do not fit.

    UserError where a source has none that fits.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: TokenizersBackend,
        engine: RolloutEngine,
        offer: Offer,
    ) -> None:
        self.config = config
        rl, room = config.rl, config.model.max_position_embeddings
        self.engine = ToolLoop(engine, tokenizer, rl, offer, room)
        self.requests: list[RolloutRequest] = []
        self.too_long = 0
        for source in heldout_prompts(config):
            first = len(self.requests)
            for prompt in source:
                of_domain = rl.of(prompt.domain)
                ids = tuple(offer.encode(offer.messages(prompt)))
                if len(ids) + of_domain.max_new_tokens > room:
                    self.too_long += 1
                    continue
                index = len(self.requests)
                seed = sample_seed(config.train.seed, EVALUATION, index - first, 0)
                self.requests.append(request_of(prompt, ids, index, 0, seed, of_domain.max_new_tokens))
                if index + 1 - first == rl.eval_prompts:
                    break
            if len(self.requests) == first:
                raise UserError(f"no held-out prompt fits into {room} tokens with its answer: give shorter ones")

    def mine(self) -> list[RolloutRequest]:
        """This rank's share."""
        return self.requests[distributed.rank() :: distributed.world_size()]

    def measure(
        self, pool: RewardPool, client: JudgeClient | None, done: Callable[[int], object] = lambda finished: None
    ) -> dict[str, float]:
        """`reward/accuracy`, `reward/num_problems`, and the metrics of rollouts and rewards; all ranks call it."""
        rl = self.config.rl
        start = time.monotonic()
        samples = self.engine.generate(self.mine(), done)
        seconds = time.monotonic() - start
        samples, failures = grade(samples, pool, rl, client)
        counts = {} if client is None else client.take_counts()
        row, sums = rollout_row(Experience(samples, failures=failures), rl, seconds, counts)
        of_groups = ("/zero_spread_frac", "_groups")  # there are none here
        row = {key: value for key, value in row.items() if not key.endswith(of_groups)}
        accuracy = sums["outcome"] / sums["graded"] if sums["graded"] else float("nan")
        return row | {"reward/accuracy": accuracy, "reward/num_problems": sums["graded"]}

    def curve(self, pool: RewardPool, client: JudgeClient | None) -> dict[str, float]:
        """`heldout/accuracy` and `heldout/NAME/accuracy` of each domain, for a point of a run's curve, with the grades
        that failed and what the judge was asked."""
        row = self.measure(pool, client)
        by_domain = {
            f"heldout/{key.removeprefix('domain/')}": value
            for key, value in row.items()
            if key.startswith("domain/") and key.endswith("/accuracy")
        }
        counts = {f"heldout/{key.replace('/', '_')}": value for key, value in row.items() if key.startswith("judge/")}
        counts["heldout/failed_grades"] = row["reward/failed_grades"]
        return {"heldout/accuracy": row["reward/accuracy"]} | by_domain | counts
