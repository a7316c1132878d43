"""SGLang 0.5.23's routes, as far as a trainer uses them, after its source: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import time
import uuid
from collections.abc import Collection
from typing import Any

import numpy as np

from model.generate import Sampling
from rl.rollout.broadcast import TorchGroup
from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import Answer, Protocol, Request
from tests.rl.servers.vllm_routes import received, spoil

VERSION = "0.5.23"
FLAGS = (
    "sampling_mask_max_tokens",  # without it fewer than a test's top_k
    "enable_return_routed_experts",
    "enable_return_indexer_topk",
    "processed_logprobs",
    "unfused_topk",  # without it places in the cache come for positions
)
RAW = 3.0  # by how much a log-prob of before the temperature, or of before truncation, is made to differ


def sglang(decoding: Decoding, missing: Collection[str] = (), version: str = VERSION) -> Protocol:
    """`missing`: of FLAGS, what it was started without."""
    groups: dict[str, TorchGroup] = {}
    cap = 16 if "sampling_mask_max_tokens" in missing else 4096
    updating: list[bool] = []  # an update is open
    mode: list[str] = []  # of the pause

    def generate(request: Request) -> dict[str, Any]:
        body, params = request.body, request.body["sampling_params"]
        while decoding.paused and decoding.paused != "keep":  # new requests wait for the end of a pause
            time.sleep(0.02)
        sampling = Sampling(params["temperature"], params["top_p"], max(0, params["top_k"]))
        masks = body.get("return_sampling_mask")
        if masks and not 1 <= sampling.top_k <= cap:
            reason = (
                f"return_sampling_mask requires top_k=1 or 1 < top_k <= {cap}. Increase --sampling-mask-max-tokens."
            )
            raise Answer(400, {"error": {"message": reason}})
        work = decoding.submit(
            body.get("rid") or uuid.uuid4().hex,
            body["input_ids"],
            params["sampling_seed"],
            params["max_new_tokens"],
            sampling,
            params.get("stop") or (),
            [*(params.get("stop_token_ids") or ()), decoding.tokenizer.eos_token_id],
        )
        found, spans = request.wait(work)
        if protocol.fault("other_weights"):
            spans = [("nobody-7", start, end) for _, start, end in spans]
        # what `output_token_logprobs` says of a truncated distribution is not what was sampled from
        shift = RAW if sampling.drops_words and sampling.top_k != 1 or "processed_logprobs" in missing else 0.0
        meta: dict[str, Any] = {
            "id": work.id,
            "finish_reason": {"type": found.finish_reason, "message": "", "status_code": None, "err_type": None},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(found.ids),
            "weight_version": decoding.label,
            "weight_versions": [{"version": label, "start": start, "end": end} for label, start, end in spans],
        }
        if body.get("return_logprob"):
            pairs = zip(found.logprobs, found.ids, strict=True)
            meta["output_token_logprobs"] = [[value - shift, word, None] for value, word in pairs]
        if masks:
            meta["output_token_sampling_mask"] = [words[::-1] for words in found.kept or ()]  # likely ones first
            meta["output_token_sampling_logprobs"] = found.logprobs
        if body.get("return_routed_experts") and found.experts is not None:
            if "enable_return_routed_experts" not in missing:
                held, dense = found.experts.numpy(), decoding.net.config.first_k_dense_replace
                whole = np.concatenate([np.zeros((len(held), dense, held.shape[2])), held], 1).astype(np.int32)
                meta["routed_experts"] = base64.b64encode(whole.tobytes()).decode()
        if body.get("return_indexer_topk") and found.selected is not None:
            if "enable_return_indexer_topk" not in missing:  # in no order, and not recorded of what is short
                held = found.selected.flip(-1).contiguous()
                held[: held.shape[-1]] = 0
                held += 64 if "unfused_topk" in missing else 0
                meta["indexer_topk"] = base64.b64encode(held.numpy().tobytes()).decode()
        if found.finish_reason == "abort" and not found.ids:  # taken out of the queue
            meta = {name: meta[name] for name in ("id", "finish_reason", "weight_version")}
        return {"text": "", "output_ids": found.ids, "meta_info": meta}

    def pause(request: Request) -> dict[str, Any]:
        mode[:] = [request.body.get("mode", "abort")]
        decoding.pause({"abort": "abort", "retract": "keep", "in_place": "keep"}[mode[0]]).result(60)
        return {"message": "Generation paused successfully.", "status": "ok"}

    def resume(request: Request) -> dict[str, Any]:
        decoding.resume()
        return {"message": "Generation continued successfully.", "status": "ok"}

    def health(request: Request) -> str:
        """Draws a token, which waits for the end of a pause for 20 s."""
        if decoding.paused:
            raise Answer(503, "")
        return ""

    def abort(request: Request) -> dict[str, Any]:
        decoding.abort(None if request.body.get("abort_all") else [request.body["rid"]])
        return {"success": True, "message": ""}

    def from_disk(request: Request) -> dict[str, Any]:
        if protocol.fault("refuse_weights"):
            raise Answer(400, {"success": False, "message": "no weights"})
        if request.body.get("load_format") != "auto":  # else that of its start, which may be `dummy`
            raise Answer(400, {"success": False, "message": "Failed to get model loader"})
        decoding.load(request.body["model_path"], request.body.get("weight_version") or decoding.label)
        if request.body.get("flush_cache", True):
            flush(request)
        spoil(protocol)
        return {"success": True, "message": "", "num_paused_requests": 0}

    def join(request: Request) -> dict[str, Any]:
        body = request.body
        groups[body["group_name"]] = TorchGroup(
            body["master_address"], body["master_port"], body["rank_offset"], body["world_size"], body["backend"], 20,
            body["group_name"],
        )  # fmt: skip
        return {"success": True, "message": ""}

    def leave(request: Request) -> dict[str, Any]:
        group = groups.pop(request.body["group_name"], None)
        if group is None:
            raise Answer(400, {"success": False, "message": "no such group"})
        group.close()
        return {"success": True, "message": ""}

    def receive(request: Request) -> dict[str, Any]:
        body = request.body
        if not updating:
            message = "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
            raise Answer(400, {"success": False, "message": message})
        if protocol.fault("refuse_weights"):
            raise Answer(400, {"success": False, "message": "no weights"})
        decoding.write(received(groups[body["group_name"]], body["names"], body["dtypes"], body["shapes"]))
        if body.get("flush_cache", True):
            flush(request)
        return {"success": True, "message": ""}

    def begin(request: Request) -> dict[str, Any]:
        if updating:
            raise Answer(400, {"success": False, "message": "a weight-update session is already open"})
        updating.append(True)
        return {"success": True, "message": "Success"}

    def end(request: Request) -> dict[str, Any]:
        if not updating:
            raise Answer(400, {"success": False, "message": "no weight-update session is open"})
        updating.clear()
        spoil(protocol)  # what a broadcast brought
        return {"success": True, "message": "Success"}

    def flush(request: Request) -> str:
        if decoding.has_work and not (decoding.paused and mode == ["retract"]):
            raise Answer(400, "Flush cache failed.\n")
        decoding.forget()
        return "Cache flushed.\nPlease check backend logs for more details.\n"

    def relabel(request: Request) -> dict[str, Any]:
        decoding.relabel(request.body["new_version"])
        return {"success": True, "message": "", "new_version": decoding.label}

    def checker(request: Request) -> dict[str, Any]:
        sums = decoding.checksums()
        whole = hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()
        place = {"role": "target", "tp_rank": 0, "tp_size": 1, "rank": 0, "size": 1}
        rank = {"checksums": sums, "per_gpu_checksum": whole, "parallelism_info": [place]}
        return {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": whole}

    routes = {
        "GET /health": health,
        "GET /server_info": lambda request: {"version": version, "tp_size": 1, "pp_size": 1, "dp_size": 1},
        "GET /model_info": lambda request: {"weight_version": decoding.label},
        "POST /generate": generate,
        "POST /pause_generation": pause,
        "POST /continue_generation": resume,
        "POST /abort_request": abort,
        "POST /flush_cache": flush,
        "POST /update_weights_from_disk": from_disk,
        "POST /init_weights_update_group": join,
        "POST /destroy_weights_update_group": leave,
        "POST /begin_weight_update": begin,
        "POST /update_weights_from_distributed": receive,
        "POST /end_weight_update": end,
        "POST /update_weight_version": relabel,
        "POST /weights_checker": checker,
    }
    protocol = Protocol(decoding, "/generate", routes)
    return protocol
