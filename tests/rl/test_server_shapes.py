"""What vLLM 0.33.0 and SGLang 0.5.23 answer, in small and by hand after their source, and what they must be told in
which order: where a client was written from a description it was wrong here."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch

from conf.errors import UserError
from model.generate import Sampling
from rl.rollout.broadcast import NcclGroup
from rl.rollout.dialect import Dialect, Drawn, Wanted, checked
from rl.rollout.server_api import Failed, Refused, ServerApi
from rl.rollout.sglang import OtherPlaces, Sglang, positions_of
from rl.rollout.vllm import Vllm
from rl.rollout.weight_sync import buckets
from tests.train import tiny

NET = tiny.build(vocab_size=32)
MODEL = NET.config
PROMPT = [3, 4]
MASKED = Wanted(Sampling(1.0, 0.9, 4), MODEL, 1, ("ab",), kept=True, experts=True)
PLAIN = Wanted(Sampling(), MODEL, 1, tuple("abcdef"))


def read(dialect: Dialect, answer: Mapping[str, Any], wanted: Wanted) -> Drawn:
    return checked(dialect.read(answer, PROMPT, wanted), wanted)


def routes(rows: int) -> np.ndarray:
    shape = (rows, MODEL.num_hidden_layers, MODEL.num_experts_per_tok)
    return np.arange(math.prod(shape)).reshape(shape) % MODEL.n_routed_experts


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def vllm_choice(**changes: Any) -> dict[str, Any]:
    def entry(word: int, logprob: float) -> dict[str, Any]:
        alone = {"token_id": word, "logprob": logprob, "rank": 1}
        return {**alone, "top_logprobs": [alone]}

    return {
        "index": 0, "finish_reason": "stop", "stop_reason": 1, "token_ids": [5, 1],
        "routed_experts": npy(routes(3).astype(np.uint16)), "sampling_mask": [[5, 9], [1]],
        "weight_versions": [{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 1, "end": 2}],
        "logprobs": {"content": [entry(5, -0.5), entry(1, 0.0)]},
    } | changes  # fmt: skip


def vllm_answer(**changes: Any) -> dict[str, Any]:
    return {
        "request_id": "r",
        "model": "m",
        "usage": None,
        "output_mode": "tokens",
        "choices": [vllm_choice(**changes)],
    }


def test_an_answer_of_vllm():
    drawn = read(Vllm(), vllm_answer(), MASKED)
    found = drawn.generation
    assert (found.ids, found.logprobs, found.finish_reason) == ([5, 1], [-0.5, 0.0], "stop")
    assert (found.kept, drawn.versions) == ([[5, 9], [1]], ["a", "b"])
    assert found.experts is not None and np.array_equal(found.experts.numpy(), routes(3)[:, 1:])
    nothing = vllm_answer(
        finish_reason="abort", token_ids=[], routed_experts=None, sampling_mask=None, weight_versions=[],
        logprobs={"content": []},
    )  # fmt: skip
    assert read(Vllm(), nothing, MASKED).generation.ids == []
    stand_in = vllm_choice()["logprobs"]["content"]
    stand_in[1]["logprob"] = -9999.0  # for a log-prob that is no number
    with pytest.raises(ValueError, match="a log-prob that is no number"):
        read(Vllm(), vllm_answer(logprobs={"content": stand_in}), MASKED)


def test_vllm_is_asked_by_a_route_that_knows_no_kept_words_where_nothing_is_dropped():
    assert Vllm().path(MASKED) == "/inference/v1/generate"
    assert Vllm().path(PLAIN) == "/v1/completions"
    body = Vllm().body(PROMPT, 7, 2, PLAIN)
    assert body["prompt"] == PROMPT and body["return_token_ids"] and body["return_weight_versions"]
    assert (body["min_p"], body["top_k"], body["repetition_penalty"]) == (0.0, 0, 1.0), "not generation_config's"
    assert len(body["stop"]) == 4, "it takes no more"
    choice = {
        "index": 0, "text": "xy", "finish_reason": "length", "stop_reason": None, "token_ids": [5, 6],
        "logprobs": {"text_offset": [0, 1], "token_logprobs": [-0.5, -1.0], "tokens": ["x", "y"], "top_logprobs": []},
        "weight_versions": [{"version": "a", "start": 0, "end": 2}], "routed_experts": None,
    }  # fmt: skip
    drawn = read(Vllm(), {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}, PLAIN)
    assert (drawn.generation.ids, drawn.generation.logprobs, drawn.versions) == ([5, 6], [-0.5, -1.0], ["a", "a"])


def sglang_answer(said: list[int], **changes: Any) -> dict[str, Any]:
    record = routes(len(PROMPT) + len(said) - 1).astype(np.int32)
    meta = {
        "id": "r", "finish_reason": {"type": "length", "length": 2}, "prompt_tokens": 2, "num_retractions": 0,
        "completion_tokens": len(said), "cached_tokens": 0, "reasoning_tokens": 0, "weight_version": "a",
        "weight_versions": [{"version": "a", "start": 0, "end": len(said)}],
        "input_token_logprobs": [], "output_token_logprobs": [[-9.0, word, None] for word in said],
        "output_token_sampling_mask": [[9, word] for word in said],
        "output_token_sampling_logprobs": [-0.5 for _ in said],
        "routed_experts": base64.b64encode(record.tobytes()).decode(),
    }  # fmt: skip
    meta |= changes
    kept = {name: value for name, value in meta.items() if value is not None}
    return {"text": "", "output_ids": said, "meta_info": kept}


def test_an_answer_of_sglang():
    found = read(Sglang(), sglang_answer([5, 1]), MASKED).generation
    assert found.kept == [[5, 9], [1, 9]], "in the order of the native engine's"
    assert found.logprobs == [-0.5, -0.5], "of the words that were in the running"
    assert found.experts is not None and np.array_equal(found.experts.numpy(), routes(3)[:, 1:])


@pytest.mark.parametrize("lacks", ["routed_experts", "output_token_sampling_mask", "weight_versions"])
def test_what_sglang_takes_out_of_its_queue_has_no_records_and_is_drawn_again(lacks: str):
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    drawn = read(Sglang(), sglang_answer([5, 6], finish_reason=reason, **{lacks: None}), MASKED)
    assert (drawn.generation.ids, drawn.generation.finish_reason, drawn.versions) == ([], "abort", [])
    with pytest.raises(KeyError):
        read(Sglang(), sglang_answer([5, 6], **{lacks: None}), MASKED)


def test_selected_positions_are_positions():
    record = torch.full((5, 1, 2), 77, dtype=torch.int32)  # rows 0 and 1 select all they see, whatever is recorded
    record[2:] = torch.tensor([[2, 0], [3, -1], [0, 4]])[:, None]
    assert positions_of(record)[:, 0].tolist() == [[0, -1], [0, 1], [0, 2], [3, -1], [0, 4]]
    with pytest.raises(OtherPlaces):
        positions_of(record + 64)
    assert positions_of(record[:1])[:, 0].tolist() == [[0, -1]]


class Recorded:
    """A server that answers each path as told, {} else; an exception is raised."""

    url = "http://a:1"

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []

    async def post(self, path: str, body: Any, timeout_s: float, **query: str) -> dict[str, Any]:
        self.asked.append((path.removeprefix("/").partition("?")[0], query or body))
        answer = self.answers.get(self.asked[-1][0], {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        return await self.post(path, None, timeout_s)

    async def tell(self, path: str, timeout_s: float) -> None:
        await self.post(path, None, timeout_s)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


def done(work: Any) -> Any:
    return asyncio.run(work)


def api_of(**answers: Any) -> tuple[ServerApi, Recorded]:
    found = Recorded(**answers)
    return cast(ServerApi, found), found


def test_an_update_of_sglang_is_begun_and_ended():
    api, seen = api_of(destroy_weights_update_group=Refused(400, "no group"), end_weight_update=Refused(400, "none"))
    with pytest.raises(Refused, match="no group"):  # of which `meet` makes nothing
        done(Sglang().leave(api))
    api, seen = api_of()
    done(Sglang().begin_receiving(api, 1.0))
    done(Sglang().receive(api, {"w": ("float32", [2])}, 1.0))
    done(Sglang().end_receiving(api, 1.0))
    assert seen.paths == ["begin_weight_update", "update_weights_from_distributed", "end_weight_update", "flush_cache"]
    api, seen = api_of()
    done(Sglang().pause(api, "keep", 1.0))
    done(Sglang().load(api, "/w", 1.0))
    assert seen.asked[0] == ("pause_generation", {"mode": "retract"}), "else nothing cached is ever forgotten"
    assert seen.asked[1][1]["load_format"] == "auto" and seen.paths[2:] == ["flush_cache"]


@pytest.mark.parametrize("key", ["dp_size", "pp_size"])
def test_sglang_with_several_replicas_or_stages_takes_no_broadcast(key: str):
    api, _ = api_of(server_info={"tp_size": 8, key: 2})
    with pytest.raises(UserError, match=f"--{key[:2]}-size 2.*rl.servers.sync=disk"):
        done(Sglang().world_size(api))
    assert done(Sglang().world_size(api_of(server_info={"tp_size": 8, key: 1})[0])) == 8


def test_vllm_ends_an_update_that_broke_off_and_forgets_what_it_keeps_in_work():
    api, seen = api_of(finish_weight_update=Failed("HTTP 500: none is open"))
    done(Vllm().leave(api))
    assert seen.paths == ["finish_weight_update", "shutdown_weight_transfer_engine"]
    api, seen = api_of()
    done(Vllm().load(api, "/w", 1.0))
    told = [body["method"] for path, body in seen.asked if path == "collective_rpc"]
    assert told == ["update_config", "reload_weights"], "a server of --load-format dummy reads files as well"
    assert seen.asked[-1] == ("reset_prefix_cache", {"reset_running_requests": "true"})
    with pytest.raises(Failed, match="did not forget"):
        done(Vllm().end_receiving(api_of(reset_prefix_cache={"success": False})[0], 1.0))


def test_a_bare_group_sums_one_number_before_all_else(monkeypatch: pytest.MonkeyPatch):
    """As each of vLLM's processes does once it has joined; else all wait for one another."""
    called: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            called.append("synchronize")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda.nccl, "unique_id", lambda: b"id")
    monkeypatch.setattr(torch.cuda.nccl, "init_rank", lambda size, uid, rank: called.append((size, uid, rank)))
    monkeypatch.setattr(
        torch.cuda.nccl, "all_reduce", lambda inputs, outputs, streams, comms: called.append(inputs[0].shape)
    )
    NcclGroup().meet(3)
    assert called == [(3, b"id", 0), (1,), "synchronize"]


def test_a_layers_attention_comes_in_one_bucket():
    """SGLang joins some of its matrices while it loads one bucket."""
    state = NET.state_dict()

    def whole(name: str, expert: int | None) -> torch.Tensor:
        return state[name] if expert is None else state[name][expert]

    found = list(buckets(NET, whole, torch.float32, 1))
    assert len(found) > 10
    for layer in range(MODEL.num_hidden_layers):
        holding = [set(bucket) for bucket in found if any(f"layers.{layer}.self_attn." in name for name in bucket)]
        assert len(holding) == 1 and f"model.layers.{layer}.self_attn.q_a_proj.weight" in holding[0]
