"""vLLM 0.33's routes, as far as a trainer uses them, after its source: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from model.generate import Generation, Sampling
from rl.rollout.broadcast import TorchGroup
from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import Answer, Protocol, Request

VERSION = "0.33.0"
FLAGS = ("processed_logprobs", "return_sampling_mask", "enable_return_routed_experts", "dev_mode")


def vllm(decoding: Decoding, missing: Collection[str] = (), version: str = VERSION) -> Protocol:
    """`missing`: of FLAGS, what it was started without."""
    group: list[TorchGroup] = []
    updating: list[bool] = []  # an update is open

    def failed(status: int, message: str) -> Answer:
        return Answer(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def draw(request: Request, ids: list[int], params: dict[str, Any]) -> tuple[dict[str, Any], Generation]:
        """What a choice of either route holds."""
        if decoding.paused in ("abort", "wait"):
            raise failed(503, "generation is paused")
        if not 0 <= params["temperature"] <= 2:
            raise failed(400, f"temperature must be in [0, 2], got {params['temperature']}.")
        work = decoding.submit(
            uuid.uuid4().hex,
            ids,
            params["seed"],
            params.get("max_tokens", 16),
            Sampling(params.get("temperature", 1.0), params.get("top_p", 1.0), max(0, params.get("top_k", 0))),
            params.get("stop") or (),
            [*(params.get("stop_token_ids") or ()), decoding.tokenizer.eos_token_id],
        )
        found, spans = request.wait(work)
        if protocol.fault("other_weights"):
            spans = [("nobody-7", start, end) for _, start, end in spans]
        choice = {
            "index": 0,
            "finish_reason": found.finish_reason,
            "stop_reason": None,
            "token_ids": found.ids,
            "routed_experts": None,
            "weight_versions": [{"version": label, "start": start, "end": end} for label, start, end in spans],
        }
        if found.experts is not None and "enable_return_routed_experts" not in missing:
            held, dense = found.experts.numpy(), decoding.net.config.first_k_dense_replace
            whole = np.concatenate([np.zeros((len(held), dense, held.shape[2])), held], 1).astype(np.uint8)
            file = io.BytesIO()
            np.save(file, whole)
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        return choice, found

    def generate(request: Request) -> dict[str, Any]:
        params = request.body["sampling_params"]
        choice, found = draw(request, request.body["token_ids"], params)
        shift = 0.5 if "processed_logprobs" in missing else 0.0
        drawn = [
            {"token_id": word, "logprob": value - shift, "rank": 1}
            for word, value in zip(found.ids, found.logprobs, strict=True)
        ]
        content = [entry | {"top_logprobs": [entry]} for entry in drawn]
        choice["logprobs"] = None if params.get("logprobs") is None else {"content": content}
        choice["sampling_mask"] = None
        if "return_sampling_mask" not in missing and found.ids:  # of every request, whatever it drops
            whole = list(range(decoding.net.config.vocab_size))
            choice["sampling_mask"] = found.kept or [whole] * len(found.ids)
        return {"request_id": uuid.uuid4().hex, "output_mode": "tokens", "choices": [choice]}

    def completions(request: Request) -> dict[str, Any]:
        body = request.body
        if len(body.get("stop") or ()) > 4:
            raise failed(400, "1 validation error: stop")
        choice, found = draw(request, body["prompt"], body)
        choice["text"] = ""
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": found.logprobs, "tokens": [], "top_logprobs": [], "text_offset": []}
        if not body.get("return_token_ids"):
            choice["token_ids"] = None
        if not body.get("return_weight_versions"):
            choice["weight_versions"] = None
        return {"id": uuid.uuid4().hex, "object": "text_completion", "choices": [choice]}

    def pause(request: Request) -> dict[str, Any]:
        decoding.pause(request.query.get("mode", "abort")).result(60)
        return {"status": "paused"}

    def resume(request: Request) -> dict[str, Any]:
        decoding.resume()
        return {"status": "resumed"}

    def abort(request: Request) -> dict[str, Any]:
        return {"status": "aborted", "aborted": decoding.abort(request.body.get("request_ids") or None)}

    def collective_rpc(request: Request) -> dict[str, Any]:
        if request.body["method"] == "update_config":
            assert request.body["kwargs"]["overrides"] == {"load_config": {"load_format": "auto"}}
            return {"results": [None]}
        if request.body["method"] != "reload_weights":
            raise failed(500, f"no method {request.body['method']}")
        if protocol.fault("refuse_weights"):
            raise failed(500, "no weights")
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
        while group:
            group.pop().close()
        group.append(
            TorchGroup(info["master_address"], info["master_port"], info["rank_offset"], info["world_size"], "gloo", 20)
        )
        return {"message": "Weight transfer initialized"}

    def leave(request: Request) -> dict[str, Any]:
        if updating:
            raise failed(500, "Cannot release a trainer connection during a weight update")
        while group:
            group.pop().close()
        return {"message": "Weight transfer shut down"}

    def start(request: Request) -> dict[str, Any]:
        if updating:
            raise failed(500, "start_weight_update called while a weight update is already active")
        updating.append(True)
        return {"message": "Weight update started"}

    def receive(request: Request) -> dict[str, Any]:
        if not updating:
            raise failed(500, "start_weight_update must be called before update_weights.")
        if protocol.fault("refuse_weights"):
            updating.clear()
            raise failed(500, "no weights")
        info = request.body["update_info"]
        decoding.write(received(group[0], info["names"], info["dtype_names"], info["shapes"]))
        return {"message": "Weights updated"}

    def forget(request: Request) -> dict[str, Any]:
        if decoding.has_work and request.query.get("reset_running_requests") != "true":
            return {"success": False}
        decoding.forget()
        return {"success": True}

    def finish(request: Request) -> dict[str, Any]:
        if not updating:
            raise failed(500, "finish_weight_update called without a matching start_weight_update.")
        updating.clear()
        if request.body.get("weight_version"):
            decoding.relabel(request.body["weight_version"])
        spoil(protocol)
        return {"message": "Weight update finished"}

    routes = {
        "GET /health": lambda request: {},
        "GET /version": lambda request: {"version": version},
        "POST /inference/v1/generate": generate,
        "POST /v1/completions": completions,
    }
    if "dev_mode" not in missing:
        routes |= {
            "POST /pause": pause,
            "POST /resume": resume,
            "GET /is_paused": lambda request: {"is_paused": bool(decoding.paused)},
            "POST /abort_requests": abort,
            "POST /collective_rpc": collective_rpc,
            "POST /reset_prefix_cache": forget,
            "POST /update_weight_version": relabel,
            "GET /weight_info": lambda request: {"weight_version": decoding.label},
            "POST /weight_checker": checker,
            "GET /get_world_size": lambda request: {"world_size": 1},
            "POST /init_weight_transfer_engine": join,
            "POST /start_weight_update": start,
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
