"""The in-process rollout engine: shares the trainer's weights by reference, so weight sync is nothing at all.

Log-probs are those of the sampler's own forward (latent-KV cache, absorbed decode); the trainer's forward differs
from it by rounding alone, which `mismatch/k3` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from conf.schema import ModelConfig, RLConfig
from model import Transformer
from model.generate import Ask, Sampling, generate
from rl.messages import RolloutRequest, Sample, TokenColumns
from rl.rollout.grown import grown, left_to_draw
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
        self.stop = StopStrings(rl.stop, partial(text_of, tokenizer))
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
        asks = []
        for request, before in work:
            ids, already, left = left_to_draw(request, before, limit)
            asks.append(Ask(ids, request.seed, left, drawn=already))
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
        now, eos = self.weight_version, self.tokenizer.eos_token_id
        return [
            grown(request, before, found, [now] * len(found.ids), now, self.stop, eos)
            for (request, before), found in zip(work, drawn, strict=True)
        ]

    def _stopped(self, begun: Sequence[TokenColumns | None]) -> Callable[[int, list[int]], bool]:
        """Whether an ask's sample ends by a stop string, which may have begun before the sample was cut."""
        answers = [[] if columns is None else columns.ids[columns.open_message :] for columns in begun]

        def stopped(number: int, ids: list[int]) -> bool:
            answers[number].append(ids[-1])
            return self.stop.ended_by_last(answers[number])

        return stopped


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def sampling_of(rl: RLConfig, model: ModelConfig) -> Sampling:
    """How the run samples, and what it records for the trainer."""
    record = {"experts"} | ({"selected"} if rl.records_selection(model) else set())
    return Sampling(rl.temperature, rl.top_p, rl.top_k, frozenset(record))
