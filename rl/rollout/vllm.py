"""vLLM's protocol: `/inference/v1/generate`, and the routes that VLLM_SERVER_DEV_MODE=1 opens (docs/servers.md)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from conf.errors import UserError
from model.generate import Generation, Sampling
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

# from 0.28 on answers hold kept words, routed experts as .npy, and spans of weight versions
KNOWN = (("0.28", "0.34"),)
GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
MOST_STOPS = 4  # that COMPLETIONS takes; what comes of others is cut by whoever asked
# what a model's generation_config.json would say of requests to COMPLETIONS that do not
DEFAULTS = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Vllm:
    """See `Dialect`."""

    name = "vLLM"

    def __init__(self, treat_as: str | None = None) -> None:
        self.treat_as = treat_as

    async def health(self, api: ServerApi) -> None:
        await api.get("/health", QUICK_S)

    async def version(self, api: ServerApi) -> str:
        found = str((await api.get("/version", QUICK_S)).get("version"))
        refuse_version(self.name, api.url, found, self.treat_as, KNOWN)
        return found

    def path(self, wanted: Wanted) -> str:
        """GENERATE says the kept words of every token where the server was started to, which is the vocabulary where
        nothing is dropped; COMPLETIONS says none."""
        return GENERATE if wanted.sampling.drops_words or wanted.experts else COMPLETIONS

    def body(self, ids: Sequence[int], seed: int, tokens: int, wanted: Wanted) -> dict[str, Any]:
        sampling = wanted.sampling
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "max_tokens": tokens,
            "logprobs": 0,  # of the drawn word alone
            "stop_token_ids": [wanted.eos_id],
            "skip_special_tokens": False,
        }
        if wanted.stop:
            params |= {"stop": list(wanted.stop), "include_stop_str_in_output": True}
        if self.path(wanted) == GENERATE:
            return {"token_ids": list(ids), "sampling_params": params}
        if wanted.stop:
            params["stop"] = list(wanted.stop[:MOST_STOPS])
        return {"prompt": list(ids), "return_token_ids": True, "return_weight_versions": True} | DEFAULTS | params

    def read(self, answer: Mapping[str, Any], ids: Sequence[int], wanted: Wanted) -> Drawn:
        choice = answer["choices"][0]
        said = [int(word) for word in choice["token_ids"] or ()]
        kept, routed = choice.get("sampling_mask"), choice.get("routed_experts")
        experts = None
        if routed is not None and wanted.experts and said:
            record = np.load(io.BytesIO(base64.b64decode(routed, validate=True)), allow_pickle=False)
            experts = experts_of(record, len(ids) + len(said) - 1, wanted.model)
        found = Generation(
            said,
            _logprobs(choice.get("logprobs") or {}, said),
            choice["finish_reason"],
            [[int(word) for word in words] for words in kept] if wanted.kept and kept is not None else None,
            experts,
        )
        return Drawn(found, spans(choice.get("weight_versions") or [], len(said)))

    async def probe(self, api: ServerApi, wanted: Wanted) -> None:
        # of one word in the running the processed log-prob is 0, the raw one is not
        cold = Sampling(wanted.sampling.temperature, 1.0, 1)
        only = Wanted(cold, wanted.model, wanted.eos_id, wanted.stop)
        choice = (await api.post(GENERATE, self.body([0], 0, PROBE_TOKENS, only), QUICK_S))["choices"][0]
        entries = (choice.get("logprobs") or {}).get("content") or []
        bare = self.body([0], 0, PROBE_TOKENS, Wanted(Sampling(), wanted.model, wanted.eos_id))
        plain = (await api.post(COMPLETIONS, bare, QUICK_S))["choices"][0]
        missing = []
        if any(abs(float(entry["logprob"])) > 1e-4 for entry in entries):
            missing.append("--logprobs-mode processed_logprobs")
        if wanted.kept and choice.get("sampling_mask") is None:
            missing.append("--return-sampling-mask")
        if wanted.experts and choice.get("routed_experts") is None:
            missing.append("--enable-return-routed-experts")
        refuse_missing(api.url, missing)
        if not (entries and choice.get("weight_versions") and plain.get("weight_versions") and plain.get("token_ids")):
            raise UserError(f"{api.url} stamps no weight versions or log-probs on its tokens: run vLLM 0.33")
        if choice.get("sampling_mask") is not None and wanted.experts and not wanted.sampling.drops_words:
            raise UserError(
                f"{api.url} sends all words of the vocabulary back with each token, as nothing is dropped: start it"
                " without --return-sampling-mask"
            )

    async def weight_version(self, api: ServerApi) -> str:
        found = await unless_refused(api.get("/weight_info", QUICK_S), (404,))
        if found is None:
            raise UserError(f"{api.url} takes no new weights: start it with VLLM_SERVER_DEV_MODE=1 in its environment")
        return str(found.get("weight_version"))

    async def pause(self, api: ServerApi, mode: str, timeout_s: float) -> None:
        await api.post("/pause", None, timeout_s, mode=mode)  # its modes have our names

    async def resume(self, api: ServerApi) -> None:
        await api.post("/resume", None, QUICK_S)

    async def load(self, api: ServerApi, folder: str, timeout_s: float) -> None:
        # one that was started with --load-format dummy knows no other way to read weights until it is told
        real = {"overrides": {"load_config": {"load_format": "auto"}}}
        await api.post("/collective_rpc", {"method": "update_config", "kwargs": real, "timeout": QUICK_S}, QUICK_S)
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": timeout_s}
        await api.post("/collective_rpc", body, timeout_s)
        await _forget(api)

    async def stamp(self, api: ServerApi, label: str) -> None:
        await api.post("/update_weight_version", {"new_version": label}, QUICK_S)

    async def checksum(self, api: ServerApi, timeout_s: float) -> Any:
        found = await unless_refused(api.post("/weight_checker", {"action": "checksum"}, timeout_s), NO_ROUTE)
        return None if found is None else found.get("checksums")

    async def world_size(self, api: ServerApi) -> int:
        found = (await api.get("/get_world_size?include_dp=true", QUICK_S)).get("world_size")
        if not isinstance(found, int):
            raise Failed(f"{api.url}/get_world_size: an answer that cannot be read")
        return found

    async def join(self, api: ServerApi, group: Mapping[str, Any], rank_offset: int, timeout_s: float) -> None:
        info: dict[str, Any] = {"rank_offset": rank_offset, "world_size": group["world_size"], "packed": False}
        if group["unique_id"] is None:
            info |= {"master_address": group["host"], "master_port": group["port"]}
        else:
            info["nccl_unique_id_b64"] = base64.b64encode(group["unique_id"]).decode()
        await api.post("/init_weight_transfer_engine", {"init_info": info}, timeout_s)

    async def begin_receiving(self, api: ServerApi, timeout_s: float) -> None:
        await api.post("/start_weight_update", None, timeout_s)

    async def receive(self, api: ServerApi, tensors: Mapping[str, tuple[str, list[int]]], timeout_s: float) -> None:
        info = {
            "names": list(tensors),
            "dtype_names": [dtype for dtype, _ in tensors.values()],
            "shapes": [shape for _, shape in tensors.values()],
        }
        await api.post("/update_weights", {"update_info": info}, timeout_s)

    async def end_receiving(self, api: ServerApi, timeout_s: float) -> None:
        await api.post("/finish_weight_update", {}, timeout_s)
        await _forget(api)

    async def leave(self, api: ServerApi) -> None:
        with suppress(Failed):  # HTTP 500 where none is open
            await api.post("/finish_weight_update", {}, QUICK_S)
        await api.post("/shutdown_weight_transfer_engine", None, QUICK_S)


async def _forget(api: ServerApi) -> None:
    """Cached prefixes. What a pause keeps in work holds some, and is read again after it."""
    found = await api.post("/reset_prefix_cache", None, QUICK_S, reset_running_requests="true")
    if found.get("success") is False:
        raise Failed(f"{api.url}/reset_prefix_cache: it did not forget its cached prefixes")


def _logprobs(found: Mapping[str, Any], said: Sequence[int]) -> list[float]:
    """Of the drawn words, from either route."""
    if "token_logprobs" in found:
        return [float(value) for value in found["token_logprobs"]]
    entries = found.get("content") or []
    if [_word(entry) for entry in entries] != list(said):
        raise ValueError("log-probs of other words than those that were drawn")
    return [float(entry["logprob"]) for entry in entries]


def _word(entry: Mapping[str, Any]) -> int:
    """The id of a log-prob's word; earlier releases write it as `token_id:N`."""
    return int(entry["token_id"]) if "token_id" in entry else int(str(entry["token"]).removeprefix("token_id:"))
