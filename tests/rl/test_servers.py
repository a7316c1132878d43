"""The clients of vLLM and SGLang against a server that speaks both protocols: the same samples as in-process whatever
goes wrong on the way, and a line for what a user did wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from conf.errors import UserError
from conf.schema import RLConfig, ServersConfig
from data.tokenizer import EOS, load_tokenizer
from rl.messages import CUT, RolloutRequest, Sample
from rl.rollout.fleet import Fleet, ServersLost, State
from rl.rollout.native import NativeEngine
from rl.rollout.servers import ServerEngine, dialect_of, wanted_of
from rl.tools.loop_thread import LoopThread
from tests.rl.models import saved, saying
from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import HttpServer
from tests.rl.servers.sglang_routes import sglang
from tests.rl.servers.vllm_routes import vllm

PROTOCOLS = {"vllm": vllm, "sglang": sglang}
REQUESTS = [
    RolloutRequest(i // 2, i % 2, "math", f"p{i}", "42", ids, seed=1 << 62 | i, max_new_tokens=16)
    for i, ids in enumerate([(3, 5), (3, 5), (7, 8, 9), (7, 8, 9), tuple(range(30, 50)), (1,)])
]
RL = RLConfig(temperature=0.9, top_p=0.9, top_k=30, stop=("ab", "c<"))
QUICK = ServersConfig(health_s=0.05, request_s=20.0, dead_s=5.0)
NO_MASK = ("return_sampling_mask",)  # with it vLLM says all words of a token where none is dropped
both = pytest.mark.parametrize("protocol", list(PROTOCOLS))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Says a few words again and again, and ends after some."""
    return saved(tmp_path_factory.mktemp("base"), saying(dict.fromkeys("abcĠ</", 20) | {EOS: 8}))


@cache
def decoding_of(base: str, number: int) -> Decoding:
    return Decoding(base, places=4, length=128)


@contextmanager
def served(
    protocol: str, base: str, count: int = 1, missing: tuple[str, ...] = (), **more: Any
) -> Iterator[list[HttpServer]]:
    with ExitStack() as stack:
        found = []
        for number in range(count):
            decoding_of(base, number).relabel("default")
            server = HttpServer(PROTOCOLS[protocol](decoding_of(base, number), missing, **more))
            stack.callback(server.close)
            found.append(server)
        yield found


@contextmanager
def asked(
    protocol: str,
    urls: list[str],
    base: str,
    rl: RLConfig = RL,
    settings: ServersConfig = QUICK,
    say: Callable[[str], object] = lambda line: None,
    **more: Any,
) -> Iterator[ServerEngine]:
    """An engine over servers that hold the weights `default` as iteration 0."""
    tokenizer, loop = tokenizer_of(base), LoopThread("servers")
    rl = replace(rl, engine=protocol, servers=replace(settings, urls=tuple(urls)))
    wanted = wanted_of(rl, decoding_of(base, 0).net.config, tokenizer.eos_token_id)
    fleet = Fleet(dialect_of(rl), rl.servers, wanted, "", leader=True, say=say)
    try:
        loop.wait(fleet.open())
        fleet.expect("default", 0)
        loop.wait(fleet.until(State.READY))
        yield ServerEngine(fleet, loop, tokenizer, wanted, **more)
    finally:
        loop.wait(fleet.close())
        loop.close()


@cache
def tokenizer_of(base: str) -> Any:
    return load_tokenizer(base)


DRAWN: dict[tuple[str, str], list[Sample]] = {}


def native(base: str, rl: RLConfig = RL) -> list[Sample]:
    key = (base, repr(rl))
    if key not in DRAWN:
        DRAWN[key] = NativeEngine(decoding_of(base, 0).net, tokenizer_of(base), rl).generate(REQUESTS)
    return DRAWN[key]


def assert_same(mine: list[Sample], theirs: list[Sample], selected: bool = False) -> None:
    for one, other in zip(mine, theirs, strict=True):
        a, b = one.tokens, other.tokens
        assert (a.ids, a.loss_mask, a.turns, a.kept_sets) == (b.ids, b.loss_mask, b.turns, b.kept_sets)
        assert (one.text, one.finish_reason, one.request) == (other.text, other.finish_reason, other.request)
        assert a.behaviour_logprobs == pytest.approx(b.behaviour_logprobs, abs=1e-5)
        assert a.weight_versions == b.weight_versions
        assert a.routed_experts is not None and b.routed_experts is not None
        assert torch.equal(a.routed_experts.sort(-1).values, b.routed_experts.sort(-1).values)
        assert a.routed_experts.dtype == b.routed_experts.dtype == torch.int16
        if selected:
            assert a.selected is not None and b.selected is not None and torch.equal(a.selected, b.selected)


@both
def test_the_samples_are_those_of_the_engine_in_process(protocol: str, base: str):
    rl = replace(RL, record_selection=protocol == "sglang")
    finished: list[int] = []
    with served(protocol, base) as servers, asked(protocol, [servers[0].url], base, rl) as engine:
        mine = engine.generate(REQUESTS, finished.append)
    theirs = native(base)
    assert_same(mine, theirs, selected=protocol == "sglang")
    assert sum(finished) == len(REQUESTS) and engine.asked_again == 0
    reasons = {sample.finish_reason for sample in theirs}
    assert reasons == {"stop", "length"}, "the test sees both ends"
    assert any(sample.text != sample.text.rstrip("abc< /") or "ab" not in sample.text for sample in theirs)
    assert any(len(words) < 30 for sample in mine for words in sample.tokens.kept_sets or () if words)


@both
def test_the_whole_distribution(protocol: str, base: str):
    rl = RLConfig(temperature=0.7)
    with served(protocol, base, missing=NO_MASK) as servers, asked(protocol, [servers[0].url], base, rl) as engine:
        mine = engine.generate(REQUESTS)
    assert_same(mine, native(base, rl))
    assert all(sample.tokens.kept_sets is None for sample in mine)


@both
def test_what_wants_nothing_beside_its_tokens_brings_no_vocabulary_with_each(protocol: str, base: str):
    """As held-out accuracy is measured, beside a run that wants the kept words."""
    rl = replace(RL, temperature=1.0, top_p=1.0, top_k=0, keep_routing=False)
    with served(protocol, base) as servers, asked(protocol, [servers[0].url], base, rl) as engine:
        mine = engine.generate(REQUESTS)
        counts = servers[0].protocol.counts
    if protocol == "vllm":
        assert counts["/v1/completions"] == len(REQUESTS) + 1 and counts["/inference/v1/generate"] == 1, "the probe's"
    for one, other in zip(mine, native(base, rl), strict=True):
        assert (one.tokens.ids, one.finish_reason) == (other.tokens.ids, other.finish_reason)
        assert one.tokens.behaviour_logprobs == pytest.approx(other.tokens.behaviour_logprobs, abs=1e-5)


def test_a_server_that_would_bring_the_vocabulary_with_each_token_is_refused(base: str):
    with served("vllm", base) as servers:
        with pytest.raises(UserError, match="start it without --return-sampling-mask"):
            with asked("vllm", [servers[0].url], base, RLConfig(temperature=0.7)):
                pass


FAULTS: dict[str, dict[str, Any]] = {
    "busy": {},
    "broken": {},
    "drop": {},
    "half": {},
    "garbled": {},
    "odd": {},
    "nan": {},
    "other_weights": {},
    "slow": {"seconds": 1.0},
}


@both
@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_fault_costs_time_and_no_sample(kind: str, protocol: str, base: str):
    settings = replace(QUICK, request_s=0.5 if kind == "slow" else 20.0)
    with served(protocol, base) as servers, asked(protocol, [servers[0].url], base, settings=settings) as engine:
        servers[0].fault(kind, times=3, **FAULTS[kind])
        mine = engine.generate(REQUESTS)
    assert engine.asked_again >= 3
    assert_same(mine, native(base))


@both
def test_one_that_fails_at_once_does_not_draw_everything_to_itself(protocol: str, base: str):
    """It has the fewest requests all the time."""
    with (
        served(protocol, base, 2) as servers,
        asked(protocol, [s.url for s in servers], base, settings=replace(QUICK, retries=2)) as engine,
    ):
        servers[0].fault("broken", times=1000)
        servers[1].fault("slow", times=1000, seconds=1.0)
        assert_same(engine.generate(REQUESTS), native(base))


def test_how_long_a_request_waited_for_its_turn_does_not_count_as_put_off(base: str):
    settings = replace(QUICK, concurrent=1, sync_s=0.3, dead_s=0.3)
    with served("vllm", base) as servers, asked("vllm", [servers[0].url], base, settings=settings) as engine:
        servers[0].fault("slow", seconds=1.0)
        servers[0].fault("busy")
        assert_same(engine.generate(REQUESTS), native(base))


@both
def test_a_request_that_always_fails_ends_the_run(protocol: str, base: str):
    with (
        served(protocol, base) as servers,
        asked(protocol, [servers[0].url], base, settings=replace(QUICK, retries=2)) as engine,
    ):
        servers[0].fault("half", times=1000)
        with pytest.raises(ServersLost, match=r"failed 3 times, at last so: http.*the connection failed"):
            engine.generate(REQUESTS)


@both
def test_what_a_server_will_never_take_is_the_users_mistake(protocol: str, base: str):
    with served(protocol, base) as servers, asked(protocol, [servers[0].url], base) as engine:
        with pytest.raises(UserError, match=r"refused a request: http.* HTTP 400 .*do not fit max_model_len=128"):
            engine.generate([replace(REQUESTS[0], max_new_tokens=500)])


MISSING = {
    "vllm": {
        "processed_logprobs": "--logprobs-mode processed_logprobs",
        "return_sampling_mask": "--return-sampling-mask",
        "enable_return_routed_experts": "--enable-return-routed-experts",
        "dev_mode": "VLLM_SERVER_DEV_MODE=1",
    },
    "sglang": {
        "sampling_mask_max_tokens": "--sampling-mask-max-tokens",
        "enable_return_routed_experts": "--enable-return-routed-experts",
        "enable_return_indexer_topk": "--enable-return-indexer-topk",
        "processed_logprobs": "SGLANG_RETURN_ORIGINAL_LOGPROB",
        "unfused_topk": "SGLANG_DSA_FUSE_TOPK=0",
    },
}


@pytest.mark.parametrize(("protocol", "flag"), [(name, flag) for name in MISSING for flag in MISSING[name]])
def test_a_flag_that_is_missing_is_named(protocol: str, flag: str, base: str):
    rl = replace(RL, record_selection=protocol == "sglang")
    if protocol == "sglang" and flag == "processed_logprobs":  # where words are dropped it has the sampler's own
        rl = replace(rl, top_p=1.0, top_k=0)
    with served(protocol, base, missing=(flag,)) as servers:
        with pytest.raises(UserError, match=MISSING[protocol][flag]) as caught:
            with asked(protocol, [servers[0].url], base, rl):
                pass
    assert servers[0].url in str(caught.value) and "\n" not in str(caught.value)


def test_each_server_is_looked_at_before_the_run_begins(base: str):
    with served("vllm", base) as good, served("vllm", base, missing=("return_sampling_mask",)) as (late,):
        late.fault("slow", seconds=1.0)
        with pytest.raises(UserError, match=f"{late.url} keeps back .*--return-sampling-mask"):
            with asked("vllm", [good[0].url, late.url], base):
                pass
    said: list[str] = []
    with served("vllm", base) as servers:
        with asked("vllm", ["http://127.0.0.1:9", servers[0].url], base, say=said.append) as engine:
            engine.generate(REQUESTS)
    assert len(said) == 1 and "http://127.0.0.1:9 is out: " in said[0] and "nobody listens" in said[0]


@both
def test_a_server_that_a_dead_trainer_left_paused_is_taken_on(protocol: str, base: str):
    with served(protocol, base) as servers:
        servers[0].protocol.decoding.pause("abort").result(10)
        with asked(protocol, [servers[0].url], base) as engine:
            assert_same(engine.generate(REQUESTS), native(base))


@pytest.mark.parametrize(
    ("protocol", "version", "treat_as", "words"),
    [
        ("vllm", "0.27.1", None, "is vLLM 0.27.1, whose protocol is not known"),
        ("vllm", "0.34.0rc1", None, "0.28 up to, not including, 0.34"),
        ("vllm", "dev", None, "rl.servers.treat_as=0.28"),
        ("vllm", "9.1.0", "0.33", ""),
        ("vllm", "0.33.1.dev7+gabc", None, ""),
        ("vllm", "0.33.0", "0.1", "rl.servers.treat_as=0.1 is no version of vLLM that is known"),
        ("sglang", "0.5.9", None, "is SGLang 0.5.9, whose"),
        ("sglang", "0.5.24.post1", None, ""),
        ("sglang", "None", "0.5.23", ""),
    ],
)
def test_a_version_that_nobody_knows_is_refused(
    protocol: str, version: str, treat_as: str | None, words: str, base: str
):
    settings = replace(QUICK, treat_as=treat_as)
    with served(protocol, base, version=version) as servers:
        if not words:
            with asked(protocol, [servers[0].url], base, settings=settings) as engine:
                assert_same(engine.generate(REQUESTS), native(base))
            return
        with pytest.raises(UserError, match=words):
            with asked(protocol, [servers[0].url], base, settings=settings):
                pass


def test_a_start_that_is_refused_leaves_no_connection_open(base: str):
    """At the end of the process it would be told of behind the user's one line."""
    loop = LoopThread("servers")
    with served("vllm", base, version="9.9") as servers:
        rl = replace(RL, engine="vllm", servers=replace(QUICK, urls=(servers[0].url,)))
        wanted = wanted_of(rl, decoding_of(base, 0).net.config, tokenizer_of(base).eos_token_id)
        fleet = Fleet(dialect_of(rl), rl.servers, wanted, "", leader=True)
        with pytest.raises(UserError, match="9.9"):
            loop.wait(fleet.open())
        assert all(server.api._session is None for server in fleet.servers)
    loop.close()


COLD = replace(RL, temperature=0.003, stop=())


@both
def test_a_sample_goes_on_from_where_it_was_cut(protocol: str, base: str):
    """So cold that luck decides nothing, for a server begins each piece with other luck."""
    whole = native(base, COLD)
    with served(protocol, base) as servers, asked(protocol, [servers[0].url], base, COLD) as engine:
        samples = engine.generate(REQUESTS, limit=5)
        assert {s.finish_reason for s in samples} >= {CUT}
        assert all(s.tokens.num_sampled == 5 for s in samples if s.finish_reason == CUT)
        while any(s.finish_reason == CUT for s in samples):
            begun = [s for s in samples if s.finish_reason == CUT]
            on = iter(engine.generate([], begun=begun, limit=5))
            samples = [next(on) if s.finish_reason == CUT else s for s in samples]
    for one, other in zip(samples, whole, strict=True):
        assert one.tokens.ids == other.tokens.ids and one.finish_reason == other.finish_reason
        assert one.tokens.routed_experts is not None and other.tokens.routed_experts is not None
        assert torch.equal(one.tokens.routed_experts.sort(-1).values, other.tokens.routed_experts.sort(-1).values)


def pause_when_busy(server: HttpServer, mode: str, *, tokens: int = 8) -> None:
    decoding = server.protocol.decoding
    before = decoding.num_tokens
    while decoding.num_tokens < before + tokens:
        time.sleep(0.001)
    decoding.pause(mode).result(10)


LONG = [replace(request, max_new_tokens=60) for request in REQUESTS]
ENDLESS = RLConfig(temperature=1e-5, max_new_tokens=60)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Never ends by itself."""
    return saved(tmp_path_factory.mktemp("endless"))


@both
@pytest.mark.parametrize("cuts", [False, True], ids=["goes on", "comes back cut"])
def test_what_a_server_breaks_off_is_a_sample_that_was_cut(protocol: str, cuts: bool, endless: str):
    with (
        served(protocol, endless, missing=NO_MASK) as servers,
        asked(protocol, [servers[0].url], endless, ENDLESS, cuts=cuts) as engine,
    ):
        whole = engine.generate(LONG)

        def disturb() -> None:
            pause_when_busy(servers[0], "abort")
            servers[0].protocol.decoding.resume()

        thread = threading.Thread(target=disturb)
        thread.start()
        mine = engine.generate(LONG)
        thread.join()
        if cuts:
            assert any(0 < s.tokens.num_sampled < 60 and s.finish_reason == CUT for s in mine)
            engine.cuts = False
            on = iter(engine.generate([], begun=[s for s in mine if s.finish_reason == CUT]))
            mine = [next(on) if s.finish_reason == CUT else s for s in mine]
    for one, other in zip(mine, whole, strict=True):
        assert (one.tokens.ids, one.finish_reason) == (other.tokens.ids, "length")
        assert one.tokens.routed_experts is not None and len(one.tokens.routed_experts) == len(one.tokens)
        assert torch.equal(
            (one.tokens.routed_experts < 0).flatten(1).any(1).nonzero().squeeze(1), torch.tensor([len(one.tokens) - 1])
        )


@both
def test_weights_that_change_in_flight_are_stamped_token_by_token(protocol: str, endless: str):
    with (
        served(protocol, endless, missing=NO_MASK) as servers,
        asked(protocol, [servers[0].url], endless, ENDLESS, exact=False) as engine,
    ):
        decoding = servers[0].protocol.decoding

        def change() -> None:
            pause_when_busy(servers[0], "keep")
            decoding.relabel("newer")
            engine.fleet.expect("newer", 1)
            decoding.resume()

        thread = threading.Thread(target=change)
        thread.start()
        mine = engine.generate(LONG)
        thread.join()
    versions = [sample.tokens.weight_versions[len(sample.request.prompt_ids) :] for sample in mine]
    assert any(set(each) == {0, 1} for each in versions) and all(each == sorted(each) for each in versions)


@both
def test_the_one_with_least_to_do_is_asked(protocol: str, base: str):
    with served(protocol, base, 3) as servers, asked(protocol, [s.url for s in servers], base) as engine:
        before = [s.protocol.counts[s.protocol.generate_path] for s in servers]
        servers[0].fault("slow", times=1, seconds=1.5)  # it keeps one request, while others take many
        mine = engine.generate(REQUESTS * 3)
    counts = [s.protocol.counts[s.protocol.generate_path] - b for s, b in zip(servers, before, strict=True)]
    assert sum(counts) == 18 and min(counts) >= 3 and max(counts) <= 9
    assert_same(mine[:6], native(base))


@both
def test_a_dead_servers_requests_go_elsewhere_and_it_comes_back(protocol: str, base: str):
    with served(protocol, base) as servers:
        other = HttpServer(PROTOCOLS[protocol](decoding_of(base, 1)))
        port = int(other.url.rpartition(":")[2])
        with asked(protocol, [other.url, servers[0].url], base) as engine:
            other.close()
            assert_same(engine.generate(REQUESTS), native(base))
            dead = engine.fleet.servers[0]
            assert dead.state is State.DOWN and "nobody listens" in dead.fault
            other = HttpServer(PROTOCOLS[protocol](decoding_of(base, 1)), port)
            deadline = time.monotonic() + 10
            while dead.state is not State.READY and time.monotonic() < deadline:
                time.sleep(0.02)
            before = other.protocol.counts[other.protocol.generate_path]
            assert_same(engine.generate(REQUESTS), native(base))
            assert other.protocol.counts[other.protocol.generate_path] > before
            other.close()


@both
def test_when_all_are_dead_for_too_long_the_run_ends(protocol: str, base: str):
    with (
        served(protocol, base) as servers,
        asked(protocol, [servers[0].url], base, settings=replace(QUICK, dead_s=0.6)) as engine,
    ):
        servers[0].close()
        with pytest.raises(
            ServersLost, match=r"no rollout server for rl.servers.dead_s=0.6 s: http://.*nobody listens"
        ):
            engine.generate(REQUESTS)


def test_a_check_that_raises_ends_what_is_asked(endless: str):
    class Enough(Exception):
        pass

    def enough(finished: int) -> None:
        raise Enough

    with (
        served("vllm", endless, missing=NO_MASK) as servers,
        asked("vllm", [servers[0].url], endless, ENDLESS) as engine,
    ):
        decoding = servers[0].protocol.decoding
        before = decoding.num_tokens
        decoding.pause("keep").result(10)
        with pytest.raises(Enough):
            engine.generate(LONG, enough)
        deadline = time.monotonic() + 10  # the server notices that nobody waits any more
        while any(batch.works for batch in decoding._batches.values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        decoding.resume()
        assert decoding.num_tokens == before
