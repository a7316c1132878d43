"""SGLang's protocol: `/generate`, and its routes for weights (docs/servers.md)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from model.generate import Generation, Sampling
from rl.rollout.broadcast import NAME
from rl.rollout.dialect import (
    ABORT,
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
# its own `in_place` would keep what the old weights have read, and with it every cached prefix
PAUSE_MODES = {"abort": "abort", "keep": "retract"}


class Sglang:
    """See `Dialect`."""

    name = "SGLang"

    def __init__(self, treat_as: str | None = None) -> None:
        self.treat_as = treat_as

    async def health(self, api: ServerApi) -> None:
        """`weight_version` asks enough: /health draws a token, which while it is paused takes until that fails."""

    async def version(self, api: ServerApi) -> str:
        info = await unless_refused(api.get("/server_info", QUICK_S), (404,))
        info = await api.get("/get_server_info", QUICK_S) if info is None else info  # of earlier releases
        found = str(info.get("version"))
        refuse_version(self.name, api.url, found, self.treat_as, KNOWN)
        return found

    def path(self, wanted: Wanted) -> str:
        return "/generate"

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
        reason = meta["finish_reason"]["type"]
        said = [int(word) for word in answer["output_ids"]]
        if reason == ABORT and not self._records(wanted) <= meta.keys():  # it waited for its turn to go on
            said = []
        rows = len(ids) + len(said) - 1
        kept, logprobs = None, []
        if said and wanted.sampling.drops_words:
            logprobs = [float(value) for value in meta["output_token_sampling_logprobs"]]
            kept = [sorted(int(word) for word in words) for words in meta["output_token_sampling_mask"]]
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
            selected = positions_of(torch.from_numpy(_int32(meta["indexer_topk"], shape).copy()))
        found = Generation(said, logprobs, reason, kept if wanted.kept else None, experts, selected)
        return Drawn(found, spans(meta["weight_versions"], len(said)) if said else [])

    def _records(self, wanted: Wanted) -> set[str]:
        """What an answer must hold beside its tokens."""
        names = {
            "weight_versions": True,
            "output_token_sampling_mask": wanted.sampling.drops_words,
            "output_token_logprobs": not wanted.sampling.drops_words,
            "routed_experts": wanted.experts,
            "indexer_topk": wanted.selected,
        }
        return {name for name, needed in names.items() if needed}

    async def probe(self, api: ServerApi, wanted: Wanted) -> None:
        # so cold that one word has all the mass: its log-prob after temperature is about 0, before it is not
        sampling = wanted.sampling if wanted.sampling.drops_words else Sampling(1e-3)
        asked = replace(wanted, sampling=sampling)
        # a row selects once there is more to see than it may select
        prompt = [0] * (1 + wanted.model.index_topk * wanted.selected)
        answer = await api.post(self.path(asked), self.body(prompt, 0, PROBE_TOKENS, asked), QUICK_S)
        meta = answer["meta_info"]
        missing = []
        if wanted.experts and meta.get("routed_experts") is None:
            missing.append("--enable-return-routed-experts")
        if wanted.selected and meta.get("indexer_topk") is None:
            missing.append("--enable-return-indexer-topk")
        refuse_missing(api.url, missing)
        drops = wanted.sampling.drops_words  # then the sampler's own log-probs are read
        if not drops and any(float(entry[0]) < -1 for entry in meta.get("output_token_logprobs") or ()):
            raise UserError(
                f"{api.url} returns log-probs from before the temperature: start it without"
                " SGLANG_RETURN_ORIGINAL_LOGPROB in its environment"
            )
        if not meta.get("weight_versions"):
            raise UserError(f"{api.url} stamps no weight versions on its tokens: run SGLang {KNOWN[-1][0]} or later")
        try:
            self.read(answer, prompt, asked)
        except OtherPlaces as error:
            raise UserError(
                f"{api.url} returns places in its cache for selected positions: start it with SGLANG_DSA_FUSE_TOPK=0 in"
                " its environment"
            ) from error

    async def weight_version(self, api: ServerApi) -> str:
        return str((await api.get("/model_info", QUICK_S)).get("weight_version"))

    async def pause(self, api: ServerApi, mode: str, timeout_s: float) -> None:
        await api.post("/pause_generation", {"mode": PAUSE_MODES[mode]}, timeout_s)

    async def resume(self, api: ServerApi) -> None:
        await api.post("/continue_generation", {}, QUICK_S)

    async def load(self, api: ServerApi, folder: str, timeout_s: float) -> None:
        # without a format it takes the one that it was started with, and with `dummy` would make weights up
        body = {"model_path": folder, "load_format": "auto", "flush_cache": False}
        await _done(api, "/update_weights_from_disk", body, timeout_s)
        await api.tell("/flush_cache", QUICK_S)  # HTTP 400 where something is in work

    async def stamp(self, api: ServerApi, label: str) -> None:
        await _done(api, "/update_weight_version", {"new_version": label, "abort_all_requests": False}, QUICK_S)

    async def checksum(self, api: ServerApi, timeout_s: float) -> Any:
        unknown = (400, *NO_ROUTE)  # 400: an action that it does not know
        found = await unless_refused(api.post("/weights_checker", {"action": "checksum"}, timeout_s), unknown)
        return None if found is None else found.get("ranks")

    async def world_size(self, api: ServerApi) -> int:
        """Its processes take the ranks behind `rank_offset` by their place in the tensor-parallel group alone."""
        info = await api.get("/server_info", QUICK_S)
        for key, flag in (("dp_size", "--dp-size"), ("pp_size", "--pp-size")):
            if int(info.get(key) or 1) > 1:
                raise UserError(
                    f"{api.url} was started with {flag} {info[key]}, and takes no broadcast so: start it without, or"
                    " give rl.servers.sync=disk"
                )
        return int(info.get("tp_size") or 1)

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
        await _done(api, "/begin_weight_update", {}, timeout_s)

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
        await _done(api, "/end_weight_update", {}, timeout_s)
        await api.tell("/flush_cache", QUICK_S)

    async def leave(self, api: ServerApi) -> None:
        await unless_refused(api.post("/end_weight_update", {}, QUICK_S), (400,))  # where none is open
        await api.post("/destroy_weights_update_group", {"group_name": NAME}, QUICK_S)


async def _done(api: ServerApi, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
    answer = await api.post(path, body, timeout_s)
    if answer.get("success") is False:
        raise Failed(f"{api.url}{path}: {str(answer.get('message'))[:300]}")


def _int32(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=np.int32).reshape(shape)


class OtherPlaces(ValueError):
    """Selected positions that are behind the row that selects."""


def positions_of(record: Tensor) -> Tensor:
    """SGLang's selected positions [rows, L, k] -> ours: in order, what is -1 behind them.

    A row that sees no more than it may select selects all of it; of such rows the record may hold anything, for prompts
    that short are read by another kernel.
    """
    rows, _, width = record.shape
    short, at = min(rows, width), torch.arange(rows, dtype=record.dtype)[:, None, None]
    if bool((record[short:] > at[short:]).any()):
        raise OtherPlaces("a selected position behind the row that selects it")
    found = ascending(record)
    every = torch.arange(width, dtype=record.dtype)
    found[:short] = every.where(every <= at[:short], -1)
    return found


def ascending(positions: Tensor) -> Tensor:
    """Selected positions [..., k] in order, what is -1 behind them."""
    last = torch.iinfo(positions.dtype).max
    found = positions.where(positions >= 0, last).sort(-1).values
    return found.where(found < last, -1)
