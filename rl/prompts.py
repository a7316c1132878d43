"""Which samples an iteration draws: the run's prompts in order, dealt to ranks, each sample with a seed of its own.

Everything is a pure function of (train.seed, iteration, global index of the prompt, index in the group), so results
depend on neither the number of ranks nor on whether the run was killed and resumed, and no generator's state is
saved.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain

from conf.errors import UserError, nearest
from conf.schema import RLConfig
from data.prompts import Prompt
from rl.messages import RolloutRequest
from rl.rewards.proof import generator_prompt

PATIENCE = 1000  # prompts in a row that may be too long before it is an error


def sample_seed(seed: int, iteration: int, prompt_index: int, sample_index: int) -> int:
    """63 bits that no two samples of a run share, but by chance."""
    packed = struct.pack("<4q", seed, iteration, prompt_index, sample_index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def needed_columns(rl: RLConfig) -> tuple[str, ...]:
    """What a row must have besides its prompt for the run's outcome to be graded."""
    return {"judge": ("rubric",), "proof": ()}.get(rl.outcome, ("answer",))


def asked(prompt: str, rl: RLConfig) -> str:
    """The user's message: the prompt, which rl.outcome=proof puts into the format that its reward asks for."""
    return generator_prompt(prompt) if rl.outcome == "proof" else prompt


def refuse_unknown_domains(rl: RLConfig, known: Collection[str]) -> None:
    """UserError where `rl.domain_beta` names a domain that no prompt is of: a typo would leave the default in force."""
    for name in rl.domain_beta:
        if name not in known:
            raise UserError(f"rl.domain_beta names {name}, a domain without any prompt: {nearest(name, sorted(known))}")


class PromptStream:
    """The prompts of the run, `prompts_per_step` an iteration. Every rank walks all of them and encodes its own.

    open_source: number of the first prompt -> the prompts from there on, without end; encode: text -> token ids;
    longest: tokens that a prompt may have. Longer ones are passed over and counted in `too_long`.
    """

    def __init__(
        self,
        open_source: Callable[[int], Iterator[Prompt]],
        encode: Callable[[str], list[int]],
        rl: RLConfig,
        seed: int,
        longest: int,
    ) -> None:
        self.open_source, self.encode, self.rl, self.seed, self.longest = open_source, encode, rl, seed, longest
        self.go_to(0, 0, 0)

    def go_to(self, iteration: int, position: int, too_long: int) -> None:
        """On with `iteration`, for which the prompts before `position` are used up. UserError where there are none."""
        self.iteration, self.position, self.too_long = iteration, position, too_long
        source = iter(self.open_source(position))
        first = next(source, None)
        if first is None:
            raise UserError(f"rl.path={self.rl.path} holds no prompt to train on: give rows of prompt and answer")
        self.source = chain((first,), source)

    def _next(self) -> tuple[Prompt, tuple[int, ...]]:
        for _ in range(PATIENCE):
            prompt = next(self.source)
            self.position += 1
            ids = self.encode(prompt.prompt)
            if len(ids) <= self.longest:
                return prompt, tuple(ids)
            self.too_long += 1
        raise UserError(
            f"{PATIENCE} prompts in a row are longer than {self.longest} tokens, the room beside"
            f" rl.max_new_tokens={self.rl.max_new_tokens} in rl.pack_len={self.rl.pack_len}: raise rl.pack_len"
        )

    def requests(self, rank: int, world: int) -> list[RolloutRequest]:
        """This rank's samples of the next iteration: prompts rank, rank + world, ..., whole groups."""
        self.iteration += 1
        return self._deal(range(self.rl.prompts_per_step), rank, world)

    def replacements(self, left_out: Sequence[int], rank: int, world: int) -> list[RolloutRequest]:
        """This rank's samples of further prompts in the same iteration, one prompt for each `prompt_index` left out, by
        all ranks and in order; it takes over the place of the one it replaces."""
        return self._deal([index + self.rl.prompts_per_step for index in left_out], rank, world)

    def _deal(self, indices: Sequence[int], rank: int, world: int) -> list[RolloutRequest]:
        prompts = [self._next() for _ in indices]
        return [
            RolloutRequest(
                prompt_index=index,
                sample_index=sample,
                domain=prompt.domain,
                prompt=prompt.prompt,
                answer=prompt.answer,
                prompt_ids=ids,
                seed=sample_seed(self.seed, self.iteration - 1, index, sample),
                rubric=prompt.rubric,
            )
            for number, (index, (prompt, ids)) in enumerate(zip(indices, prompts, strict=True))
            if number % world == rank
            for sample in range(self.rl.group_size)
        ]
