"""SGLang's protocol: `/generate`, and its routes for weights (docs/servers.md)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from model.generate import Generation, Sampling
from rl.rollout.broadcast import NAME
from rl.rollout.dialect import (
    NO_ROUTE,
    PROBE_TOKENS,
    QUICK_S,
    Drawn,
    Wanted,
    experts_of,
    refuse_missing,
    refuse_version,
    spans,
    unless_refused,
)
from rl.rollout.server_api import Failed, ServerApi

KNOWN = (("0.5.23", "0.6"),)
PAUSE_MODES = {"abort": "abort", "keep": "in_place"}


class Sglang:
    """See `Dialect`."""

    name, path = "SGLang", "/generate"

    def __init__(self, treat_as: str | None = None) -> None:
        self.treat_as = treat_as

    async def version(self, api: ServerApi) -> str:
        found = str((await _either(api, "/server_info", "/get_server_info")).get("version"))
        refuse_version(self.name, api.url, found, self.treat_as, KNOWN)
        return found

    def body(self, ids: Sequence[int], seed: int, tokens: int, wanted: Wanted) -> dict[str, Any]:
        sampling = wanted.sampling
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "sampling_seed": seed,
            "max_new_tokens": tokens,
            "stop_token_ids": [wanted.eos_id],
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        if wanted.stop:
            params["stop"] = list(wanted.stop)
        body: dict[str, Any] = {"input_ids": list(ids), "sampling_params": params, "return_logprob": True}
        if sampling.drops_words:  # the log-prob under the distribution that was sampled from comes with the kept words
            body |= {"return_sampling_mask": True, "sampling_logprobs_mode": "selected"}
        if wanted.experts:
            body["return_routed_experts"] = True
        if wanted.selected:
            body["return_indexer_topk"] = True
        return body

    def read(self, answer: Mapping[str, Any], ids: Sequence[int], wanted: Wanted) -> Drawn:
        meta, model = answer["meta_info"], wanted.model
        said = [int(word) for word in answer["output_ids"]]
        rows = len(ids) + len(said) - 1
        kept, logprobs = None, []
        if said and wanted.sampling.drops_words:
            logprobs = [float(value) for value in meta["output_token_sampling_logprobs"]]
            kept = [[int(word) for word in words] for words in meta["output_token_sampling_mask"]]
        elif said:
            entries = meta["output_token_logprobs"]
            if [int(entry[1]) for entry in entries] != said:
                raise ValueError("log-probs of other words than those that were drawn")
            logprobs = [float(entry[0]) for entry in entries]
        experts = selected = None
        if said and wanted.experts:
            shape = (rows, model.num_hidden_layers, model.num_experts_per_tok)
            experts = experts_of(_int32(meta["routed_experts"], shape), rows, model)
        if said and wanted.selected:
            shape = (rows, model.num_hidden_layers, model.index_topk)
            selected = ascending(torch.from_numpy(_int32(meta["indexer_topk"], shape).copy()))
        reason = meta["finish_reason"]["type"]
        found = Generation(said, logprobs, reason, kept if wanted.kept else None, experts, selected)
        stamped = meta.get("weight_versions")
        if stamped is None:
            raise ValueError("no weight versions")
        return Drawn(found, spans([_span(each) for each in stamped], len(said)))

    async def probe(self, api: ServerApi, wanted: Wanted) -> None:
        # so cold that one word has all the mass: its log-prob after temperature is about 0, before it is not
        only = Wanted(Sampling(1e-3, 1.0, 1 if wanted.sampling.drops_words else 0), wanted.model, wanted.eos_id)
        body = self.body([0], 0, PROBE_TOKENS, only)
        body |= {"return_routed_experts": wanted.experts, "return_indexer_topk": wanted.selected}
        meta = (await api.post(self.path, body, QUICK_S))["meta_info"]
        missing = []
        if wanted.sampling.drops_words and meta.get("output_token_sampling_mask") is None:
            missing.append("--sampling-mask-max-tokens 4096")
        if wanted.experts and meta.get("routed_experts") is None:
            missing.append("--enable-return-routed-experts")
        if wanted.selected and meta.get("indexer_topk") is None:
            missing.append("--enable-return-indexer-topk")
        refuse_missing(api.url, missing)
        if any(float(entry[0]) < -1 for entry in meta.get("output_token_logprobs") or ()):
            raise UserError(
                f"{api.url} returns log-probs from before the temperature: start it without"
                " SGLANG_RETURN_ORIGINAL_LOGPROB in its environment"
            )
        if not meta.get("weight_versions"):
            raise UserError(f"{api.url} stamps no weight versions on its tokens: run SGLang {KNOWN[-1][0]} or later")

    async def weight_version(self, api: ServerApi) -> str:
        return str((await _either(api, "/model_info", "/get_model_info")).get("weight_version"))

    async def pause(self, api: ServerApi, mode: str, timeout_s: float) -> None:
        await api.post("/pause_generation", {"mode": PAUSE_MODES[mode]}, timeout_s)

    async def resume(self, api: ServerApi) -> None:
        await api.post("/continue_generation", {}, QUICK_S)

    async def load(self, api: ServerApi, folder: str, timeout_s: float) -> None:
        body = {"model_path": folder, "flush_cache": True, "keep_pause": True}
        await _done(api, "/update_weights_from_disk", body, timeout_s)

    async def stamp(self, api: ServerApi, label: str) -> None:
        await _done(api, "/update_weight_version", {"new_version": label, "abort_all_requests": False}, QUICK_S)

    async def checksum(self, api: ServerApi, timeout_s: float) -> Any:
        unknown = (400, *NO_ROUTE)  # 400: an action that it does not know
        found = await unless_refused(api.post("/weights_checker", {"action": "checksum"}, timeout_s), unknown)
        return None if found is None else found.get("ranks") or found.get("checksums")

    async def world_size(self, api: ServerApi) -> int:
        info = await _either(api, "/server_info", "/get_server_info")
        return int(info.get("tp_size") or 1) * int(info.get("pp_size") or 1)

    async def join(self, api: ServerApi, group: Mapping[str, Any], rank_offset: int, timeout_s: float) -> None:
        body = {
            "master_address": group["host"],
            "master_port": group["port"],
            "rank_offset": rank_offset,
            "world_size": group["world_size"],
            "group_name": NAME,
            "backend": group["backend"],
        }
        await _done(api, "/init_weights_update_group", body, timeout_s)

    async def begin_receiving(self, api: ServerApi, timeout_s: float) -> None:
        """Each bucket says for itself."""

    async def receive(self, api: ServerApi, tensors: Mapping[str, tuple[str, list[int]]], timeout_s: float) -> None:
        body = {
            "names": list(tensors),
            "dtypes": [dtype for dtype, _ in tensors.values()],
            "shapes": [shape for _, shape in tensors.values()],
            "group_name": NAME,
            "flush_cache": False,
        }
        await _done(api, "/update_weights_from_distributed", body, timeout_s)

    async def end_receiving(self, api: ServerApi, timeout_s: float) -> None:
        await api.post("/flush_cache", {}, QUICK_S)

    async def leave(self, api: ServerApi) -> None:
        await api.post("/destroy_weights_update_group", {"group_name": NAME}, QUICK_S)


async def _either(api: ServerApi, path: str, earlier: str) -> dict[str, Any]:
    """A route that had another name in earlier releases."""
    found = await unless_refused(api.get(path, QUICK_S), (404,))
    return await api.get(earlier, QUICK_S) if found is None else found


async def _done(api: ServerApi, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
    answer = await api.post(path, body, timeout_s)
    if answer.get("success") is False:
        raise Failed(f"{api.url}{path}: {str(answer.get('message'))[:300]}")


def _int32(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=np.int32).reshape(shape)


def _span(span: Any) -> Mapping[str, Any]:
    """{version, start, end}, which some releases write as a list."""
    return span if isinstance(span, dict) else dict(zip(("version", "start", "end"), span, strict=True))


def ascending(positions: Tensor) -> Tensor:
    """Selected positions [..., k] in order, what is -1 behind them."""
    last = torch.iinfo(positions.dtype).max
    found = positions.where(positions >= 0, last).sort(-1).values
    return found.where(found < last, -1)
