"""Which samples an iteration draws: the run's prompts in order, dealt to ranks, each sample with a seed of its own.

Everything is a pure function of (train.seed, iteration, global index of the prompt, index in the group), so results
depend on neither the number of ranks nor on whether the run was killed and resumed, and no generator's state is
saved.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count

from conf.errors import UserError, nearest
from conf.schema import RLConfig, RunConfig
from data.mixture import mixture
from data.prompts import Prompt, prompts, train_domains
from data.tasks import TASKS, distinct
from rl.env.registry import choose
from rl.messages import RolloutRequest

PATIENCE = 1000  # prompts in a row that may be too long before it is an error


def sample_seed(seed: int, iteration: int, prompt_index: int, sample_index: int) -> int:
    """63 bits that no two samples of a run share, but by chance."""
    packed = struct.pack("<4q", seed, iteration, prompt_index, sample_index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def needed_columns(rl: RLConfig) -> tuple[str, ...]:
    """What a row must have besides its prompt for the outcome to be graded."""
    return {"judge": ("rubric",), "proof": ()}.get(rl.outcome, ("answer",))


def train_prompts(config: RunConfig, start: int = 0) -> Iterator[Prompt]:
    """The run's prompts from number `start` on, without end: of one source, or of its domains by their shares."""
    rl = config.rl
    if not rl.mixes:
        return _prompts(config, rl, "train", start)
    sources = {name: partial(_of_domain, config, name, "train") for name in rl.domains}
    shares = {name: domain.share for name, domain in rl.domains.items()}
    return mixture(sources, shares, config.train.seed, rl.prompts_per_step, start)


def heldout_prompts(config: RunConfig) -> list[Iterator[Prompt]]:
    """The held-out prompts of each source; each ends."""
    rl = config.rl
    if not rl.mixes:
        return [_prompts(config, rl, "heldout")]
    return [_of_domain(config, name, "heldout") for name in rl.domains]


def _of_domain(config: RunConfig, name: str, split: str, start: int = 0) -> Iterator[Prompt]:
    """The prompts that a domain brings, under its name; rows that name no task are of the task of that name, if any."""
    for prompt in _prompts(config, config.rl.of(name), split, start):
        yield replace(prompt, domain=name, task=prompt.task or (name if name in TASKS else ""))


def _prompts(config: RunConfig, rl: RLConfig, split: str, start: int = 0) -> Iterator[Prompt]:
    """Of one source, `rl.env`, `rl.path` or `rl.tasks`."""
    data = config.data
    if rl.env is not None:
        return env_prompts(rl.env, split, config.train.seed, data.heldout, start)
    return prompts(
        rl.path, split, config.train.seed, data.operand_digits, data.heldout, start=start,
        max_bad_rows=data.max_bad_rows, needs=lambda domain: needed_columns(rl.of(domain)), tasks=_tasks(config, rl),
        hf_split=data.split,
    )  # fmt: skip


def env_prompts(env: str, split: str, seed: int, heldout: float, start: int = 0) -> Iterator[Prompt]:
    """The problems of ENV or ENV:LEVEL from number `start` on. train: no end; heldout: each key once, then it ends."""
    environment, level = choose(env)
    numbers = count(start if split == "train" else 0)
    made = (environment.problem_at(number, split, seed, level, heldout) for number in numbers)
    for problem in made if split == "train" else distinct(made, lambda problem: problem.key):
        yield Prompt(problem.prompt, problem.answer, environment.name, problem.key, env=env, state=problem.state)


def _tasks(config: RunConfig, rl: RLConfig) -> tuple[str, ...]:
    return rl.tasks or config.data.tasks


def refuse_unknown_domains(config: RunConfig) -> None:
    """UserError where `rl.domains` names a domain that no prompt is of: a typo would leave the run's settings in
    force."""
    rl = config.rl
    if rl.mixes or not rl.domains:
        return
    data = config.data
    known = {choose(rl.env)[0].name} if rl.env is not None else train_domains(
        rl.path, data.heldout, data.max_bad_rows, lambda domain: needed_columns(rl.of(domain)), _tasks(config, rl),
        data.split,
    )  # fmt: skip
    for name in rl.domains:
        if name not in known:
            raise UserError(f"rl.domains names {name}, a domain without any prompt: {nearest(name, sorted(known))}")


class PromptStream:
    """The prompts of the run, `prompts_per_step` an iteration. Every rank walks all of them and encodes its own.

    open_source: number of the first prompt -> the prompts from there on, without end; encode: prompt -> token ids;
    room: tokens that a prompt and its answer may have together. Longer ones are passed over and counted in `too_long`.
    It starts with `go_to`.
    """

    def __init__(
        self,
        open_source: Callable[[int], Iterator[Prompt]],
        encode: Callable[[Prompt], list[int]],
        rl: RLConfig,
        seed: int,
        room: int,
    ) -> None:
        self.open_source, self.encode, self.rl, self.seed, self.room = open_source, encode, rl, seed, room
        self.iteration = self.position = self.too_long = 0
        self.source: Iterator[Prompt] = iter(())

    def go_to(self, iteration: int, position: int, too_long: int) -> None:
        """On with `iteration`, for which the prompts before `position` are used up. UserError where there are none."""
        self.iteration, self.position, self.too_long = iteration, position, too_long
        source = iter(self.open_source(position))
        first = next(source, None)
        if first is None:
            raise UserError(f"rl.path={self.rl.path} holds no prompt to train on: give rows of prompt and answer")
        self.source = chain((first,), source)

    def _next(self) -> tuple[Prompt, tuple[int, ...], int]:
        """A prompt, its ids and the tokens that its answer may have."""
        for _ in range(PATIENCE):
            prompt = next(self.source)
            self.position += 1
            ids, answer = self.encode(prompt), self.rl.of(prompt.domain).max_new_tokens
            if len(ids) + answer <= self.room:
                return prompt, tuple(ids), answer
            self.too_long += 1
        raise UserError(
            f"{PATIENCE} prompts in a row are longer than {self.room - answer} tokens, the room beside"
            f" rl.max_new_tokens={answer} in rl.pack_len={self.rl.pack_len}: raise rl.pack_len"
        )

    def requests(self, rank: int, world: int, taken: Collection[int] = ()) -> list[RolloutRequest]:
        """This rank's samples of the next iteration: prompts rank, rank + world, ..., whole groups; `taken` are the
        places where all ranks' groups of earlier iterations go on."""
        self.iteration += 1
        return self._deal([place for place in range(self.rl.prompts_per_step) if place not in taken], rank, world)

    def replacements(self, left_out: Sequence[int], rank: int, world: int) -> list[RolloutRequest]:
        """This rank's samples of further prompts in the same iteration, one prompt for each `prompt_index` left out, by
        all ranks and in order; it takes over the place of the one it replaces."""
        return self._deal([index + self.rl.prompts_per_step for index in left_out], rank, world)

    def group(self, number: int) -> list[RolloutRequest]:
        """The samples of the next prompt, which is number `number` of the run: those that iteration
        number // prompts_per_step would ask for it."""
        (prompt, ids, answer), (iteration, index) = self._next(), divmod(number, self.rl.prompts_per_step)
        return [
            request_of(prompt, ids, index, sample, sample_seed(self.seed, iteration, index, sample), answer)
            for sample in range(self.rl.group_size)
        ]

    def _deal(self, indices: Sequence[int], rank: int, world: int) -> list[RolloutRequest]:
        dealt, places = [self._next() for _ in indices], self.rl.prompts_per_step
        stays = self.rl.rollout_tokens is not None  # a group that may go on later belongs to the rank of its place
        return [
            request_of(prompt, ids, index, sample, sample_seed(self.seed, self.iteration - 1, index, sample), answer)
            for number, (index, (prompt, ids, answer)) in enumerate(zip(indices, dealt, strict=True))
            if (index % places if stays else number) % world == rank
            for sample in range(self.rl.group_size)
        ]


def request_of(
    prompt: Prompt, ids: tuple[int, ...], prompt_index: int, sample_index: int, seed: int, max_new_tokens: int
) -> RolloutRequest:
    """The prompt as a request for one sample."""
    return RolloutRequest(
        prompt_index=prompt_index,
        sample_index=sample_index,
        domain=prompt.domain,
        prompt=prompt.prompt,
        answer=prompt.answer,
        prompt_ids=ids,
        seed=seed,
        max_new_tokens=max_new_tokens,
        rubric=prompt.rubric,
        task=prompt.task,
        env=prompt.env,
        state=prompt.state,
    )
