"""vLLM 0.33's routes, as far as a trainer uses them."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from model.generate import Sampling
from rl.rollout.broadcast import TorchGroup
from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import Answer, Protocol, Request

VERSION = "0.33.0"
FLAGS = ("processed_logprobs", "return_sampling_mask", "enable_return_routed_experts", "dev_mode")


def vllm(decoding: Decoding, missing: Collection[str] = (), version: str = VERSION) -> Protocol:
    """`missing`: of FLAGS, what it was started without."""
    group: list[TorchGroup] = []

    def generate(request: Request) -> dict[str, Any]:
        if decoding.paused in ("abort", "wait"):
            raise Answer(503, {"error": {"message": "generation is paused"}})
        body, params = request.body, request.body["sampling_params"]
        drops = params.get("top_p", 1.0) < 1 or params.get("top_k", 0) > 0
        work = decoding.submit(
            body.get("request_id") or uuid.uuid4().hex,
            body["token_ids"],
            params["seed"],
            params.get("max_tokens", 16),
            Sampling(params.get("temperature", 1.0), params.get("top_p", 1.0), max(0, params.get("top_k", 0))),
            params.get("stop") or (),
            [*(params.get("stop_token_ids") or ()), decoding.tokenizer.eos_token_id],
        )
        found, spans = request.wait(work)
        if protocol.fault("other_weights"):
            spans = [("nobody-7", start, end) for _, start, end in spans]
        shift = 0.5 if "processed_logprobs" in missing else 0.0
        entries = [
            {"token_id": word, "logprob": value - shift, "rank": None, "top_logprobs": []}
            for word, value in zip(found.ids, found.logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "finish_reason": found.finish_reason,
            "stop_reason": None,
            "token_ids": found.ids,
            "logprobs": None if params.get("logprobs") is None else {"content": entries},
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": [{"version": label, "start": start, "end": end} for label, start, end in spans],
        }
        if found.experts is not None and "enable_return_routed_experts" not in missing:
            held, dense = found.experts.numpy(), decoding.net.config.first_k_dense_replace
            whole = np.concatenate([np.zeros((len(held), dense, held.shape[2])), held], 1).astype(np.uint8)
            file = io.BytesIO()
            np.save(file, whole)
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        if "return_sampling_mask" not in missing and drops:
            choice["sampling_mask"] = found.kept
        return {"request_id": work.id, "choices": [choice]}

    def pause(request: Request) -> dict[str, Any]:
        decoding.pause(request.query.get("mode", "abort")).result(60)
        return {"status": "paused"}

    def resume(request: Request) -> dict[str, Any]:
        decoding.resume()
        return {"status": "resumed"}

    def abort(request: Request) -> dict[str, Any]:
        return {"status": "aborted", "aborted": decoding.abort(request.body.get("request_ids") or None)}

    def collective_rpc(request: Request) -> dict[str, Any]:
        if request.body["method"] != "reload_weights":
            raise Answer(400, {"error": f"no method {request.body['method']}"})
        if protocol.fault("refuse_weights"):
            raise Answer(500, {"error": "no weights"})
        decoding.load(request.body["kwargs"]["weights_path"], decoding.label)
        spoil(protocol)
        return {"results": [None]}

    def relabel(request: Request) -> dict[str, Any]:
        decoding.relabel(request.body["new_version"])
        return {"success": True, "new_version": decoding.label}

    def checker(request: Request) -> dict[str, Any]:
        return {"checksums": decoding.checksums()}

    def join(request: Request) -> dict[str, Any]:
        info = request.body["init_info"]
        leave(request)
        group.append(
            TorchGroup(info["master_address"], info["master_port"], info["rank_offset"], info["world_size"], "gloo", 20)
        )
        return {"message": "Weight transfer initialized"}

    def leave(request: Request) -> dict[str, Any]:
        while group:
            group.pop().close()
        return {}

    def receive(request: Request) -> dict[str, Any]:
        if protocol.fault("refuse_weights"):
            raise Answer(500, {"error": "no weights"})
        info = request.body["update_info"]
        decoding.write(received(group[0], info["names"], info["dtype_names"], info["shapes"]))
        return {"message": "Weights updated"}

    def finish(request: Request) -> dict[str, Any]:
        if request.body.get("weight_version"):
            decoding.relabel(request.body["weight_version"])
        spoil(protocol)
        return {"message": "Weight update finished"}

    routes = {
        "GET /health": lambda request: {},
        "GET /version": lambda request: {"version": version},
        f"POST {'/inference/v1/generate'}": generate,
    }
    if "dev_mode" not in missing:
        routes |= {
            "POST /pause": pause,
            "POST /resume": resume,
            "GET /is_paused": lambda request: {"is_paused": bool(decoding.paused)},
            "POST /abort_requests": abort,
            "POST /collective_rpc": collective_rpc,
            "POST /reset_prefix_cache": lambda request: decoding.forget() or {},
            "POST /update_weight_version": relabel,
            "GET /weight_info": lambda request: {"weight_version": decoding.label},
            "POST /weight_checker": checker,
            "GET /get_world_size": lambda request: {"world_size": 1},
            "POST /init_weight_transfer_engine": join,
            "POST /start_weight_update": lambda request: {"message": "Weight update started"},
            "POST /update_weights": receive,
            "POST /finish_weight_update": finish,
            "POST /shutdown_weight_transfer_engine": leave,
        }
    protocol = Protocol(decoding, "/inference/v1/generate", routes)
    return protocol


def received(
    group: TorchGroup, names: list[str], dtypes: list[str], shapes: list[list[int]]
) -> dict[str, torch.Tensor]:
    found = {}
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        group.broadcast(found[name])
    return found


def spoil(protocol: Protocol) -> None:
    if protocol.fault("spoil_weights"):
        norm = protocol.decoding.net.norm.weight
        protocol.decoding.call(lambda: norm.mul_(1.5))
