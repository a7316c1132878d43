"""Memory of a rank: states by hand, and how each setting moves them. `python -m bench plan` measures the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.load import load
from conf.schema import ModelConfig, ParallelConfig
from tests.train import tiny
from train.job import Job, floor_parameters
from train.memory_model import predict, predict_floor
from train.parameters import parameters
from train.stages import STAGES

MODEL = replace(tiny.MODEL, vocab_size=4096)


def job(
    stage: str = "sparse_adapt", world: int = 1, length: int = 64, model: ModelConfig = MODEL, **parallel: int
) -> Job:
    return Job(model, STAGES[stage], ParallelConfig(**{"zero": 1, **parallel}), world, length)  # type: ignore[arg-type]


def sizes(stage: str = "sparse_adapt") -> tuple[int, int]:
    """(values, trained values) of the model."""
    every = parameters(MODEL)
    return sum(p.size for p in every), sum(p.size for p in every if p.trains(STAGES[stage]))


@pytest.mark.parametrize("stage", ["pretrain", "dense_warmup", "sparse_adapt"])
def test_states_by_zero_stage(stage: str) -> None:
    """fp32: 4 bytes a weight; two moments, and under ZeRO 1 and 2 a master copy of the rank's share."""
    every, trained = sizes(stage)
    for zero, weights, optimiser in ((0, every, 2 * trained), (1, every, 3 * trained / 4), (2, every, 3 * trained / 4)):
        kinds = predict(job(stage, 4, zero=zero)).kinds
        assert kinds["weights"] == 4 * weights and kinds["optimiser"] == pytest.approx(4 * optimiser)
    kinds = predict(job(stage, 4, zero=3)).kinds
    assert kinds["weights"] == pytest.approx(every) and kinds["optimiser"] == pytest.approx(2 * trained)


def test_experts_that_ranks_share_are_held_once() -> None:
    every, _ = sizes()
    experts = sum(p.size for p in parameters(MODEL) if p.is_expert)
    whole, shared = (predict(job(world=4, zero=1, ep=ep)).kinds for ep in (1, 4))
    assert whole["weights"] - shared["weights"] == 4 * experts * 3 / 4
    assert shared["optimiser"] == pytest.approx(12 * ((every - experts) / 4 + experts / 4))


def test_what_lies_there_at_the_optimisers_step() -> None:
    """A small model's peak: gradients twice and AdamW's two temporaries, over its largest group; a GPU's needs one."""
    every, trained = sizes("pretrain")
    matrices = sum(p.size for p in parameters(MODEL) if len(p.shape) > 1 and p.trains(STAGES["pretrain"]))
    found = predict(job("pretrain"))
    assert found.phases["step"] == 4 * (every + 3 * trained + trained + matrices + 2 * matrices)
    fused = predict(replace(job("pretrain"), fused=True))
    assert found.phases["step"] - fused.phases["step"] == 4 * matrices


def test_checkpointing_keeps_inputs_alone() -> None:
    long = job(length=4096, zero=0)
    plain, again = predict(long), predict(replace(long, checkpointing=True))
    assert again.phases["forward"] < 0.7 * plain.phases["forward"]
    narrow = predict(replace(long, checkpointing=True, precision="bf16"))  # autocast keeps no copies of weights either
    assert narrow.phases["forward"] < again.phases["forward"]
    frozen = job("dense_warmup", length=4096, zero=0)
    assert predict(frozen) == predict(replace(frozen, checkpointing=True))


def test_slices_of_a_sequence_share_its_rows() -> None:
    kinds = [predict(job(world=4, length=8192, zero=0, cp=cp)).kinds["activations"] for cp in (1, 4)]
    assert 0.25 < kinds[1] / kinds[0] < 0.4  # latents and keys of the whole sequence stay


def test_offload_moves_the_optimiser_to_the_host() -> None:
    _, trained = sizes()
    here = job(world=4, zero=3)
    there = replace(here, parallel=replace(here.parallel, offload="cpu"))
    assert predict(there).kinds["optimiser"] == 0 == predict(there).kinds["gradients"]
    assert predict(there).host - predict(here).host == pytest.approx(16 * trained / 4)


def test_later_micro_batches_find_gradients() -> None:
    _, trained = sizes()
    for zero, share in ((0, 1), (1, 1), (2, 1 / 4)):
        first = job(world=4, zero=zero)
        several = replace(first, sequences=3)
        more = predict(several).phases["forward"] - predict(first).phases["forward"]
        assert more == pytest.approx(4 * trained * share)


DEEP = replace(MODEL, num_hidden_layers=5, first_k_dense_replace=1)


def deep(stage: str = "sparse_adapt", sequences: int = 6, pp: int = 3, **parallel: int) -> Job:
    return replace(job(stage, 6, 64, DEEP, pp=pp, **parallel), sequences=sequences)


def test_states_of_a_floor() -> None:
    """Weights and gradients whole, and of the share of two ranks gradients again and two moments; the last floor's copy
    of the embedding has a gradient alone."""
    found = deep()
    weights = [floor_parameters(DEEP, 3, floor) for floor in range(3)]
    assert sum(map(len, weights)) == len(parameters(DEEP))
    for floor, mine in enumerate(weights):
        size = sum(p.size for p in mine)
        copy = DEEP.vocab_size * DEEP.hidden_size if floor == 2 else 0
        kinds = predict_floor(found, floor).kinds
        assert kinds["weights"] == 4 * (size + copy)
        assert kinds["gradients"] == pytest.approx(4 * (size * 1.5 + copy))
        assert kinds["optimiser"] == pytest.approx(4 * size)
    frozen = deep("dense_warmup")
    indexers = sum(p.size for p in weights[2] if p.is_indexer)
    assert predict_floor(frozen, 2).kinds["gradients"] == pytest.approx(4 * indexers * 1.5)


def test_a_floor_holds_the_micro_batches_in_flight() -> None:
    states = 4 * 64 * DEEP.hidden_size
    for floor, ways in ((0, 1), (1, 2), (2, 1)):  # buffers of states that come, and of gradients that come back
        found = predict_floor(deep(), floor).phases["forward"]
        more = predict_floor(deep(sequences=7), floor).phases["forward"] - found
        assert more == ways * states, floor
    for floor, in_flight in ((0, 3), (1, 2), (2, 1)):
        found = [predict_floor(deep(sequences=n), floor).phases["forward"] for n in (1, 2, 3)]
        grows = [more - less > 2 * states for less, more in zip(found, found[1:], strict=False)]
        assert grows == [in_flight > 1, in_flight > 2], floor


def test_the_fullest_floor_is_planned() -> None:
    model = load(["+stage=pretrain", "model=deepseek_v3_2"]).config.model
    layout = ParallelConfig(zero=1, ep=64, cp=16, pp=16)
    whole = Job(model, STAGES["sparse_adapt"], layout, 16384, 131072, "bf16", 64, True, True)
    every = [predict_floor(whole, floor) for floor in range(16)]
    assert predict(whole) == max(every, key=lambda memory: memory.total)


def test_a_copy_of_the_weights_and_a_cache_for_rollouts() -> None:
    every, _ = sizes()
    native = replace(job("grpo", world=4, zero=3), samples=8)
    phases = predict(native).phases
    assert "rollout" not in predict(replace(native, samples=0)).phases
    cache = 8 * 64 * 4 * MODEL.num_hidden_layers * (MODEL.kv_lora_rank + MODEL.qk_rope_head_dim + MODEL.index_head_dim)
    state = predict(native).kinds
    assert phases["rollout"] >= 4 * every + cache + state["optimiser"]
