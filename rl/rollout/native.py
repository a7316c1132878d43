"""The in-process rollout engine: shares the trainer's weights by reference, so weight sync is nothing at all.

Log-probs are those of the sampler's own forward (latent-KV cache, absorbed decode); the trainer's forward differs
from it by rounding alone, which `mismatch/k3` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from conf.schema import RLConfig
from model import Transformer
from model.generate import Generation, generate
from rl.messages import RolloutRequest, Sample, TokenColumns


class NativeEngine:
    """See `RolloutEngine`. `autocast`: dtype of the matrix products, the trainer's; None is fp32. `temperature` and
    `top_p` are the configuration's where they are not given."""

    def __init__(
        self,
        net: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        rl: RLConfig,
        attention: str = "sparse",
        autocast: torch.dtype | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> None:
        self.net, self.tokenizer, self.attention, self.autocast = net, tokenizer, attention, autocast
        self.max_new_tokens = rl.max_new_tokens
        self.temperature = rl.temperature if temperature is None else temperature
        self.top_p = rl.top_p if top_p is None else top_p
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
                [request.prompt_ids for request in requests],
                self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                eos_id=self.tokenizer.eos_token_id,
                seeds=[request.seed for request in requests],
                attention=self.attention,
                done=done,
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
        )
        said = drawn.ids[:-1] if drawn.finish_reason == "stop" else drawn.ids
        text = self.tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return Sample(request, tokens, text, drawn.finish_reason)
