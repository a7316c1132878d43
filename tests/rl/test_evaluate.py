"""The evaluate stage as a whole: its tables on one rank and on two, another checkpoint, what it refuses, its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.evaluate
from conf.errors import UserError
from conf.schema import EvalConfig, ModelConfig, RLConfig, RunConfig
from launch.stage import afterwards
from model import Transformer, save_pretrained
from tests.distributed.helper import run_ranks
from tests.rl.models import saved
from tests.train import runs, tiny
from train.run import open_run
from train.speed import cache_bytes, generation_speed

EVAL = EvalConfig(k_sweep=(8, 2), speed_lengths=(40, 20), short_context=4)


def checkpoint(folder: Path, spoil: float = 0.0, **changes: int) -> str:
    def change(net: Transformer, _: object) -> None:
        net.norm.weight *= 1 + spoil

    return saved(folder, change, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("weights")
    return checkpoint(root / "one"), checkpoint(root / "other", spoil=3.0)


def _run(config: RunConfig) -> str:
    context = open_run(config, frozenset())
    assert context is not None
    with context:
        try:
            rl.evaluate.run(context)
        except UserError as error:
            return str(error)
    return ""


def measure(folder: Path, base: str, world: int = 1, cp: int = 1, **changes: Any) -> dict[str, Any]:
    config = runs.config(folder, "evaluate", init_from=base, eval_sequences=4, model=MODEL)
    config = replace(config, rl=RLConfig(eval_prompts=4, max_new_tokens=4), eval=replace(EVAL, **changes))
    rows = [json.dumps({"text": f"document {i} of {'abcdefgh'[i % 8] * (20 + i)}"}) for i in range(60)]
    text = folder.with_suffix(".jsonl")
    text.write_text("\n".join(rows))
    data = replace(config.data, source="files", path=str(text), seq_len=48, heldout=0.5)
    config = replace(config, data=data, parallel=replace(config.parallel, cp=cp))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  (before the processes fork)

    (said, *_) = run_ranks(_run, world, config)
    if said:
        return {"error": said}
    return json.loads((folder / "evaluation.json").read_text())


MODEL = replace(ModelConfig(), **vars(replace(tiny.MODEL, vocab_size=256)))


def test_one_rank_and_two_measure_the_same(folders: tuple[str, str], tmp_path: Path) -> None:
    base, other = folders
    one = measure(tmp_path / "one", base, compare_with=other)
    assert [row["k"] for row in one["loss_by_topk"] if row["all"]] == [2, 4, 8]
    assert {row["layer"] for row in one["recall_by_position"]} == {0, 1}
    assert [row["to"] for row in one["loss_by_position"]] == [4, 16, 32, 48]
    assert abs(one["loss_by_position"][0]["difference"]) < 1e-6 and one["short_context"]["up_to"] == 4
    assert one["verdict"]["short_context_holds"] is True and "the other checkpoint" in one["verdict"]["words"]
    apart = [row["against_difference"] for row in one["loss_by_position"]]
    assert max(apart) < -0.05  # the other one was spoilt
    tokens = sum(row["tokens"] for row in one["loss_by_position"])
    mean = sum(row["sparse"] * row["tokens"] for row in one["loss_by_position"]) / tokens
    assert mean == pytest.approx(one["loss/lm_sparse"], rel=1e-5)  # the same forwards, another way to count
    for world, cp in ((2, 1), (2, 2)):
        again = measure(tmp_path / f"{world}{cp}", base, world, cp, compare_with=other)
        for table in ("loss_by_position", "recall_by_position", "loss_by_topk"):
            for mine, theirs in zip(again[table], one[table], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-3, abs=5e-6), (world, cp)
        assert again["verdict"]["departs_at"] == one["verdict"]["departs_at"]


def test_the_stage_leaves_a_page(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(tmp_path / "run", folders[0])
    afterwards("evaluate", tmp_path / "run")
    assert "Sparse less dense" in (tmp_path / "run/report/evaluation.html").read_text()
    assert "against" not in found["verdict"] and "other" not in found["loss_by_position"][0]
    afterwards("sparse_adapt", tmp_path / "run")
    assert f"+stage=evaluate init_from={tmp_path / 'run'}" in capsys.readouterr().out
    bare = measure(tmp_path / "bare", folders[0], by_position=False, k_sweep=(), speed_lengths=())
    assert bare["verdict"]["words"] == "" and not any(isinstance(value, list) for value in bare.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 300}, "has a vocabulary of 300 and not 256"),
        ({"max_position_embeddings": 32}, "ends at 32 positions: give data.seq_len=32 or less"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(
    folders: tuple[str, str], tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    net = tiny.build(**({"vocab_size": 256} | changes))
    save_pretrained(net, tmp_path / "hf", torch.float32)
    found = measure(tmp_path / "run", folders[0], compare_with=str(tmp_path / "hf"))
    assert found["error"].startswith(f"eval.compare_with={tmp_path / 'hf'} ") and reason in found["error"]
    missing = measure(tmp_path / "run2", folders[0], compare_with=str(tmp_path / "none"))
    assert missing["error"].startswith(f"eval.compare_with={tmp_path / 'none'} does not exist")


def test_losses_that_are_not_finite_still_leave_an_evaluation(folders: tuple[str, str], tmp_path: Path) -> None:
    net = tiny.build(vocab_size=256)
    net.lm_head.weight.data.fill_(float("nan"))
    save_pretrained(net, tmp_path / "hf", torch.float32)
    found = measure(tmp_path / "run", folders[0], compare_with=str(tmp_path / "hf"))
    assert found["loss_by_position"][0]["other"] is None and found["loss_by_position"][0]["dense"] > 0
    assert "Nothing is said of the other checkpoint" in found["verdict"]["words"]


def test_the_row_is_there_before_speed_is_measured(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that measurement counts peaks of memory anew, and the row's is that of the whole run."""

    def failing(*_: object) -> None:
        raise UserError("no speed")

    monkeypatch.setattr(rl.evaluate, "speed", failing)
    assert measure(tmp_path / "run", folders[0])["error"] == "no speed"
    (row,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert "loss/lm_sparse" in json.loads(row) and "perf/peak_memory_bytes" in json.loads(row)


def test_a_length_without_problems_is_said_at_once(folders: tuple[str, str], tmp_path: Path) -> None:
    found = measure(tmp_path / "run", folders[0], tasks=("needle", "queries:8"), lengths=(120, 100))
    assert found["error"].startswith("eval.lengths=100 with the task queries:8: ")


def test_the_cache_is_what_the_formula_says() -> None:
    net = tiny.build()
    rows = generation_speed(net, [20, 40], "fp32")
    assert [(row["length"], row["attention"]) for row in rows] == [
        (n, a) for n in (20, 40) for a in ("dense", "sparse")
    ]
    for row in rows:
        rows_held = 2 * (int(row["length"] or 0) + 16)  # of both layers
        assert row["kv_bytes"] == row["kv_bytes_by_formula"] == rows_held * (16 + 8) * 4
        assert row["index_key_bytes"] == row["index_key_bytes_by_formula"] == rows_held * 16 * 4
        assert float(row["prefill_s"] or 0) > 0 and float(row["decode_tokens_per_s"] or 0) > 0
    assert cache_bytes(tiny.MODEL, 100, 2) == (2 * 100 * 24 * 2, 2 * 100 * 16 * 4)
