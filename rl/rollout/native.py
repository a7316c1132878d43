"""The in-process rollout engine: shares the trainer's weights by reference, so weight sync is nothing at all.

Log-probs are those of the sampler's own forward (latent-KV cache, absorbed decode); the trainer's forward differs
from it by rounding alone, which `mismatch/k3` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.schema import RLConfig
from model import Transformer
from model.generate import Ask, Generation, Sampling, generate
from rl.messages import RolloutRequest, Sample, TokenColumns
from rl.stop import StopStrings


class NativeEngine:
    """See `RolloutEngine`. `autocast`: dtype of the matrix products, the trainer's; None is fp32. `sampling`: the
    configuration's where it is not given."""

    def __init__(
        self,
        net: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        rl: RLConfig,
        attention: str = "sparse",
        autocast: torch.dtype | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.net, self.tokenizer, self.attention, self.autocast = net, tokenizer, attention, autocast
        self.sampling = sampling or sampling_of(rl)
        self.stop = StopStrings(rl.stop, self._text)
        self.weight_version = 0

    def generate(
        self, requests: Sequence[RolloutRequest], done: Callable[[int], object] = lambda finished: None
    ) -> list[Sample]:
        """See `RolloutEngine`; `done` hears how many samples have finished since its last call."""
        if not requests:
            return []
        device = self.net.embed_tokens.weight.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            drawn = generate(
                self.net,
                [Ask(request.prompt_ids, request.seed, request.max_new_tokens) for request in requests],
                self.sampling,
                self.tokenizer.eos_token_id,
                self.attention,
                done,
                (lambda number, ids: self.stop.ended_by_last(ids)) if self.stop.strings else None,
            )
        return [self._sample(request, generation) for request, generation in zip(requests, drawn, strict=True)]

    def _sample(self, request: RolloutRequest, drawn: Generation) -> Sample:
        prompt, size = len(request.prompt_ids), len(request.prompt_ids) + len(drawn.ids)
        tokens = TokenColumns(
            ids=[*request.prompt_ids, *drawn.ids],
            loss_mask=[False] * prompt + [True] * len(drawn.ids),
            behaviour_logprobs=[0.0] * prompt + drawn.logprobs,
            weight_versions=[self.weight_version] * size,
            turns=[0] * size,
            kept_sets=None if drawn.kept is None else [[]] * prompt + drawn.kept,
            routed_experts=_one_more(drawn.experts),
            selected=_one_more(drawn.selected),
        )
        by_eos = drawn.ids[-1] == self.tokenizer.eos_token_id
        text = self.stop.cut(self._text(drawn.ids[:-1] if by_eos else drawn.ids))
        return Sample(request, tokens, text, drawn.finish_reason)

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def sampling_of(rl: RLConfig) -> Sampling:
    """How the run samples, and what it records for the trainer."""
    record = {"experts"} | ({"selected"} if rl.record_selection else set())
    return Sampling(rl.temperature, rl.top_p, rl.top_k, frozenset(record))


def _one_more(rows: Tensor | None) -> Tensor | None:
    """A record with a row for the last token, which did not run."""
    return None if rows is None else torch.cat([rows, torch.full_like(rows[:1], -1)])
