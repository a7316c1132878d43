"""The in-process rollout engine: shares the trainer's weights by reference, so weight sync is nothing at all.

Log-probs are those of the sampler's own forward (latent-KV cache, absorbed decode); the trainer's forward differs
from it by rounding alone, which `mismatch/k3` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.schema import ModelConfig, RLConfig
from model import Transformer
from model.generate import Ask, Generation, Sampling, generate
from rl.messages import CUT, RolloutRequest, Sample, TokenColumns, prompt_columns
from rl.rollout.lock_step import LockStep
from rl.stop import StopStrings


class NativeEngine:
    """See `RolloutEngine`. `autocast`: dtype of the matrix products, the trainer's; None is fp32. `sampling`: the
    configuration's where it is not given. `lock_step`: where the net's weights are cut."""

    def __init__(
        self,
        net: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        rl: RLConfig,
        attention: str = "sparse",
        autocast: torch.dtype | None = None,
        sampling: Sampling | None = None,
        lock_step: LockStep | None = None,
    ) -> None:
        self.net, self.tokenizer, self.attention, self.autocast = net, tokenizer, attention, autocast
        self.sampling = sampling or sampling_of(rl, net.config)
        self.stop = StopStrings(rl.stop, self._text)
        self.lock_step = lock_step
        self.weight_version = 0

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        done: Callable[[int], object] = lambda finished: None,
        *,
        begun: Sequence[Sample] = (),
        limit: int | None = None,
    ) -> list[Sample]:
        """See `RolloutEngine`."""
        work: list[tuple[RolloutRequest, TokenColumns | None]] = [(request, None) for request in requests]
        work += [(sample.request, sample.tokens) for sample in begun]
        if not work and self.lock_step is None:
            return []
        asks = [self._ask(request, before, limit) for request, before in work]
        device = self.net.embed_tokens.weight.device.type
        kept = self.lock_step is None  # autocast's casts of the weights, which come to a whole copy
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=kept):
            drawn = generate(
                self.net,
                asks,
                self.sampling,
                self.tokenizer.eos_token_id,
                self.attention,
                done,
                self._stopped([before for _, before in work]) if self.stop.strings else None,
                turn=(lambda kind: None) if self.lock_step is None else self.lock_step.turn,
            )
            if self.lock_step is not None:
                self.lock_step.finish()
        return [self._sample(request, before, found) for (request, before), found in zip(work, drawn, strict=True)]

    def _ask(self, request: RolloutRequest, before: TokenColumns | None, limit: int | None) -> Ask:
        if before is None:
            ids, drawn = request.prompt_ids, 0
        else:
            ids, drawn = tuple(before.ids), before.num_sampled
        left = request.max_new_tokens - drawn
        return Ask(ids, request.seed, left if limit is None else min(left, limit), drawn=drawn)

    def _stopped(self, begun: Sequence[TokenColumns | None]) -> Callable[[int, list[int]], bool]:
        """Whether an ask's sample ends by a stop string, which may have begun before the sample was cut."""
        answers = [[] if columns is None else columns.ids[columns.open_message :] for columns in begun]

        def stopped(number: int, ids: list[int]) -> bool:
            answers[number].append(ids[-1])
            return self.stop.ended_by_last(answers[number])

        return stopped

    def _sample(self, request: RolloutRequest, before: TokenColumns | None, drawn: Generation) -> Sample:
        """The sample with what was `drawn` behind what it had `before`, which stays as it was recorded then."""
        now, size = self.weight_version, len(drawn.ids)
        if before is None:
            before = prompt_columns(request.prompt_ids, now)
        tokens = TokenColumns(
            ids=before.ids + drawn.ids,
            loss_mask=before.loss_mask + [True] * size,
            behaviour_logprobs=before.behaviour_logprobs + drawn.logprobs,
            weight_versions=before.weight_versions + [now] * size,
            turns=before.turns + before.turns[-1:] * size,
            kept_sets=None if drawn.kept is None else (before.kept_sets or [[]] * len(before)) + drawn.kept,
            routed_experts=_rows(before.routed_experts, drawn.experts),
            selected=_rows(before.selected, drawn.selected),
        )
        answer, reason = tokens.ids[before.open_message :], drawn.finish_reason
        if reason == "length" and tokens.num_sampled < request.max_new_tokens:
            reason = CUT
        by_eos = answer[-1] == self.tokenizer.eos_token_id
        return Sample(request, tokens, self.stop.cut(self._text(answer[:-1] if by_eos else answer)), reason)

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def sampling_of(rl: RLConfig, model: ModelConfig) -> Sampling:
    """How the run samples, and what it records for the trainer."""
    record = {"experts"} | ({"selected"} if rl.records_selection(model) else set())
    return Sampling(rl.temperature, rl.top_p, rl.top_k, frozenset(record))


def _rows(before: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """A record of all tokens: `rows` of those that ran, one for the last, which did not, and in place of what ran again
    after a cut what was recorded `before`."""
    if rows is None:
        return None
    found = torch.cat([rows, torch.full_like(rows[:1], -1)])
    if before is not None:
        ran = (before >= 0).flatten(1).any(1).nonzero().squeeze(1)  # its last token runs now for the first time
        found[ran] = before[ran]
    return found
