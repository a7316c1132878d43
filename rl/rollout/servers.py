"""Rollouts by servers of vLLM or SGLang, over HTTP with token ids in and out (docs/servers.md).

A request that fails is asked again, of whichever server has least to do then and with the same seed, so it matters to
no sample which server draws it or how often it was asked. What a server breaks off (`abort`: somebody paused it) is
kept and goes on, as a sample that was cut. Every token carries the version of the weights that drew it, as the server
stamps them; with `exact` what other weights drew is thrown away and asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.errors import UserError
from conf.schema import ModelConfig, RLConfig
from model.generate import Generation, Sampling
from rl.messages import CUT, RolloutRequest, Sample, TokenColumns, prompt_columns
from rl.rollout.dialect import ABORT, Dialect, Drawn, Wanted, read_answer
from rl.rollout.fleet import Fleet, Server, ServersLost
from rl.rollout.grown import columns_after, grown, left_to_draw
from rl.rollout.native import text_of
from rl.rollout.server_api import Busy, Failed, Refused
from rl.stop import StopStrings
from rl.tools.loop_thread import LoopThread

BACKOFF_S = 0.1  # before a request is asked again; doubles each time
LONGEST_PAUSE_S = 5.0


def wanted_of(rl: RLConfig, model: ModelConfig, eos_id: int) -> Wanted:
    """What the run needs of each token; what it only measures (`mismatch/*`) is asked for where it is cheap."""
    sampling = Sampling(rl.temperature, rl.top_p, rl.top_k)
    experts = rl.keep_routing and model.first_k_dense_replace < model.num_hidden_layers
    selected = rl.keep_selection or rl.record_selection is True
    return Wanted(sampling, model, eos_id, rl.stop, rl.keep_sampling_mask and sampling.drops_words, experts, selected)


def seed_behind(seed: int, drawn: int) -> int:
    """63 bits for the piece of a sample that begins after `drawn` tokens: a server starts each request's randomness
    anew. The first piece has the sample's own."""
    if drawn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}+{drawn}".encode(), digest_size=8).digest(), "little") >> 1


class ServerEngine:
    """See `RolloutEngine`. The fleet must have been given weights.

    exact: what is drawn comes from the weights that the fleet was given last; else from any that it was given. cuts: a
    sample that a server breaks off is returned as `CUT`, and does not go on here.
    """

    def __init__(
        self,
        fleet: Fleet,
        loop: LoopThread,
        tokenizer: PreTrainedTokenizerBase,
        wanted: Wanted,
        exact: bool = True,
        cuts: bool = False,
    ) -> None:
        self.fleet, self.loop, self.wanted, self.exact, self.cuts = fleet, loop, wanted, exact, cuts
        self.stop = StopStrings(wanted.stop, partial(text_of, tokenizer))
        self.weight_version = 0
        self.asked_again = 0  # requests, so far
        self._jitter = random.Random()  # noqa: S311  (of pauses: it changes no number)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        done: Callable[[int], object] = lambda finished: None,
        *,
        begun: Sequence[Sample] = (),
        limit: int | None = None,
    ) -> list[Sample]:
        """See `RolloutEngine`. ServersLost where no server can be asked any more, UserError where one refuses."""
        work: list[tuple[RolloutRequest, TokenColumns | None]] = [(request, None) for request in requests]
        work += [(sample.request, sample.tokens) for sample in begun]
        finished = told = 0

        async def one(request: RolloutRequest, before: TokenColumns | None) -> Sample:
            nonlocal finished
            sample = await self.draw(request, before, limit)
            finished += 1
            return sample

        def tell() -> None:
            nonlocal told
            now = finished
            done(now - told)
            told = now

        found = self.loop.wait(_all([one(*each) for each in work]), tell)
        tell()
        return found

    async def draw(self, request: RolloutRequest, before: TokenColumns | None, limit: int | None) -> Sample:
        """One sample, in the loop of the fleet; `before`: what it goes on from."""
        first = 0 if before is None else before.num_sampled
        prompt, broken_off = prompt_columns(request.prompt_ids, self.weight_version), 0
        while True:
            left = None if limit is None else limit - (0 if before is None else before.num_sampled - first)
            ids, drawn, tokens = left_to_draw(request, before, left)
            answer = await self._ask(ids, seed_behind(request.seed, drawn), tokens)
            generation = self._ended_by_string(answer.generation, before)
            versions = [self.fleet.versions[label] for label in islice(answer.versions, len(generation.ids))]
            if generation.finish_reason == ABORT and len(generation.ids) == tokens:
                generation = replace(generation, finish_reason="length")
            if generation.finish_reason != ABORT:
                return grown(request, before, generation, versions, self.weight_version, self.stop, self.wanted.eos_id)
            if generation.ids:
                before, broken_off = columns_after(prompt, before, generation, versions), 0
            elif broken_off == self.fleet.settings.retries:
                raise ServersLost(f"a request was broken off {broken_off + 1} times before its first token")
            else:
                broken_off += 1
                await self._rest(broken_off)
            if self.cuts:
                return Sample(request, before or prompt, "", CUT)

    async def _ask(self, ids: Sequence[int], seed: int, tokens: int) -> Drawn:
        """One answer that may be used, from whoever has least to do."""
        fleet, settings = self.fleet, self.fleet.settings
        body = fleet.dialect.body(ids, seed, tokens, self.wanted)
        failed: Counter[Server] = Counter()
        put_off: float | None = None  # since when it meets nothing but servers that are paused or full
        while True:
            server = await fleet.take(failed)
            try:
                answer = await fleet.post(server, fleet.dialect.path(self.wanted), body, settings.request_s)
                drawn = read_answer(fleet.dialect, answer, ids, self.wanted, server.url)
                self._refuse_versions(drawn, server)
                return drawn
            except Refused as refusal:
                raise UserError(f"a rollout server refused a request: {refusal}") from refusal
            except Busy as failure:  # paused, for as long as weights may take to load
                now = time.monotonic()
                put_off = put_off or now
                if now - put_off > settings.sync_s + settings.dead_s:
                    raise ServersLost(f"a request was put off for too long: {failure}") from failure
                pause = 1
            except Failed as failure:
                fleet.doubt(server)
                failed[server] += 1
                pause, put_off = failed.total(), None
                if pause > settings.retries:
                    raise ServersLost(f"a request failed {pause} times, at last so: {failure}") from failure
            finally:
                await fleet.release(server)
            self.asked_again += 1
            await self._rest(pause)

    async def _rest(self, times: int) -> None:
        seconds = min(BACKOFF_S * 2 ** (times - 1), LONGEST_PAUSE_S)
        await asyncio.sleep(seconds * self._jitter.uniform(0.5, 1.5))

    def _refuse_versions(self, drawn: Drawn, server: Server) -> None:
        """Failed where tokens are of weights that they may not be of."""
        for label in set(drawn.versions):
            if label not in self.fleet.versions or (self.exact and label != self.fleet.label):
                raise Failed(f"{server.url} drew with the weights {label}, not {self.fleet.label}")

    def _ended_by_string(self, drawn: Generation, before: TokenColumns | None) -> Generation:
        """What was drawn up to the token with which the message first holds a stop string: servers may find one
        later than we do."""
        answer = [] if before is None else before.ids[before.open_message :]
        if not self.stop.strings or not drawn.ids:
            return drawn
        for number, word in enumerate(drawn.ids, 1):
            answer.append(word)
            if word != self.wanted.eos_id and self.stop.ended_by_last(answer):
                behind = len(drawn.ids) - number
                return Generation(
                    drawn.ids[:number],
                    drawn.logprobs[:number],
                    "stop",
                    None if drawn.kept is None else drawn.kept[:number],
                    None if drawn.experts is None else drawn.experts[: len(drawn.experts) - behind],
                    None if drawn.selected is None else drawn.selected[: len(drawn.selected) - behind],
                )
        return drawn


async def _all(work: Sequence[Coroutine[Any, Any, Sample]]) -> list[Sample]:
    """Their results in order; the first failure ends the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        ended = (await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))[0] if tasks else set()
        for task in ended:
            task.result()  # raises what it raised
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # else each other failure is shown as one never looked at


def dialect_of(rl: RLConfig) -> Dialect:
    from rl.rollout.sglang import Sglang
    from rl.rollout.vllm import Vllm

    return Vllm(rl.servers.treat_as) if rl.engine == "vllm" else Sglang(rl.servers.treat_as)
