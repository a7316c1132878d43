"""The command: what it prints and writes, what it fills in, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.plan import main

V3_2 = ("+stage=sparse_adapt", "model=deepseek_v3_2", "cluster=h800_2048")
LAYOUT = ("parallel.zero=3", "parallel.ep=64", "parallel.cp=32")


def plan(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    out = tmp_path / "plan.json"
    status = main([*argv, "--out", str(out)])
    return status, json.loads(out.read_text())


def test_the_papers_run_in_a_given_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(tmp_path, *V3_2, *LAYOUT)
    text = capsys.readouterr().out
    assert status == 0 and found["fits"]
    assert found["filled"] == ["data.seq_len=131072", "precision=bf16", "train.activation_checkpointing=true"]
    assert found["parameters"]["total"] == 683_501_956_608 and "683.5 B" in text
    memory = found["memory"]
    assert memory["total"] == pytest.approx(sum(memory["kinds"].values()) + memory["margin"] + memory["outside"])
    assert "DOES NOT FIT" not in text and "parallel.zero=3 parallel.ep=64 parallel.cp=32" in text
    collectives = {row["collective"] for row in found["traffic"]}
    assert collectives == {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"}
    dsa, dense = found["budgets"][1]["dsa"], found["budgets"][1]["dense"]
    assert dsa["tokens"] == 943.7e9 and f"{dsa['hours']:,.0f}" in text and f"{dense['hours']:,.0f}" in text


def test_a_search_over_what_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("+stage=sparse_adapt", "model=small", "cluster=h100", "data.seq_len=32768", "--search", "--top", "3")
    status, found = plan(tmp_path, *argv)
    assert status == 0 and len(found["ranked"]) == 3
    assert found["settings"] == found["ranked"][0]["settings"]
    assert "layouts fit 8 x 80 GB" in capsys.readouterr().out


def test_a_search_plans_the_best_of_what_was_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(tmp_path, *V3_2, "parallel.pp=16", "--search")
    assert status == 0 and found["fits"] and found["settings"] == found["ranked"][0]["settings"]
    assert "parallel.pp=16" in found["settings"] and "parallel.ep=1 " not in found["settings"]
    text, floor = capsys.readouterr().out, found["step"]["floor"]
    assert f"on floor {floor} of 16, the slowest" in text and f"traffic on floor {floor} of 16" in text
    assert f"(backward on floor {found['memory']['floor']} of 16)" in text and "pipeline bubble" in text
    assert "RL: no layout in depth runs it" in text and len(found["budgets"]) == 2


def test_as_it_is_fills_in_nothing(tmp_path: Path) -> None:
    status, found = plan(tmp_path, "+stage=pretrain", "cluster=laptop", "--as-is")
    assert status == 0 and found["filled"] == [] and found["seq_len"] == 512 and found["precision"] == "fp32"
    assert found["settings"] == "parallel.zero=1 parallel.ep=1 parallel.cp=1 train.micro_batches=1"
    assert found["memory"]["outside"] == 0  # no GPU


def test_as_it_is_in_depth(tmp_path: Path) -> None:
    layout = ("parallel.pp=4", "parallel.ep=2", "train.micro_batches=6")
    status, found = plan(tmp_path, "+stage=sparse_adapt", "cluster=h100", *layout, "--as-is")
    assert status == 0 and found["filled"] == [] and found["seq_len"] == 512
    wanted = "parallel.zero=1 parallel.ep=2 parallel.cp=1 parallel.pp=4 train.micro_batches=6"
    assert found["settings"] == wanted and found["step"]["tokens"] == 2 * 6 * 512  # two replicas


def test_a_layout_in_depth_takes_as_many_micro_batches_as_floors(tmp_path: Path) -> None:
    _, found = plan(tmp_path, "+stage=pretrain", "model=small", "cluster=h800_2048", "parallel.pp=4", "gpus=2048")
    assert "train.micro_batches=4" in found["settings"]


def test_what_does_not_fit_is_planned_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(tmp_path, *V3_2, "parallel.zero=1")
    assert status == 1 and not found["fits"] and "DOES NOT FIT" in capsys.readouterr().out


def test_hiding_the_network_is_quicker(tmp_path: Path) -> None:
    seconds = [plan(tmp_path, *V3_2, *LAYOUT, "--hidden", share)[1]["step"]["seconds"] for share in ("0", "1")]
    assert seconds[1] < 0.8 * seconds[0]


def test_rollouts_of_a_small_policy_are_its_own(tmp_path: Path) -> None:
    _, found = plan(tmp_path, "+stage=grpo", "model=small", "cluster=h100", "rl.pack_len=4096", "parallel.zero=1")
    assert found["memory"]["phases"]["rollout"] > 0
    _, found = plan(tmp_path, "+stage=grpo", "model=deepseek_v3_2", "cluster=h800_2048", *LAYOUT)
    assert "rollout" not in found["memory"]["phases"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (V3_2[:2], "no cluster is given: add cluster=NAME"),
        ((*V3_2[:2], "cluster=h900"), "there is no cluster h900"),
        ((*V3_2, "gpus=4096"), "gpus=4096 is more than the 2048"),
        ((*V3_2, "gpus=many"), "gpus=many must be a whole number >= 1"),
        ((*V3_2, "paralel.zero=3"), "unknown key paralel.zero: did you mean parallel.zero?"),
        ((*V3_2, "parallel.zero=3", "parallel.ep=48"), "parallel.ep=48 does not divide"),
        ((*V3_2, "parallel.zero=0", "parallel.ep=64"), "parallel.ep=64 needs ZeRO"),
        ((*V3_2, "parallel.zero=1", "parallel.pp=3"), "parallel.pp=3 does not divide the world of 2048"),
        ((*V3_2, "parallel.zero=3", "parallel.pp=4"), "parallel.pp=4 has an optimiser of its own"),
        ((*V3_2, "parallel.pp=64"), "cuts the model into 64 parts and model.num_hidden_layers=61"),
        ((*V3_2, "parallel.pp=0"), "parallel.pp=0"),
        ((*V3_2, "parallel.pp=16", "train.micro_batches=8"), "give train.micro_batches=16"),
        ((*V3_2, "parallel.pp=2", "--as-is"), "give train.micro_batches=2"),
        (("+stage=grpo", *V3_2[1:], "parallel.pp=2"), "parallel.pp=2 is not supported in stage grpo"),
        ((*V3_2, "parallel.pp=4", "parallel.pp_schedule=zbv"), "parallel.pp_schedule=zbv is not planned"),
        (("+stage=evaluate", "cluster=h100"), "+stage=evaluate trains nothing"),
        (("cluster=h100",), "no stage is given"),
        ((*V3_2, "--serch"), "--serch is no option"),
        ((*V3_2, "--hidden", "2"), "must be within [0, 1]"),
        ((*V3_2, *LAYOUT, "--search", "--top", "0"), "--top=0 must be a whole number >= 1"),
        ((*V3_2, "--search", "--top", "-1"), "--top=-1 must be a whole number >= 1"),
        (("+stage=dense_warmup", "cluster=h800_2048", "data.seq_len=1000"), "16 sequences of 1000 tokens a step"),
        ((*V3_2[:2], "cluster=h800", "train.activation_checkpointing=true"), "no layout fits: the leanest"),
    ],
)
def test_a_mistake_is_one_line(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*V3_2, *LAYOUT, "--out", "/proc/none/plan.json"]) == 2
    assert "give another --out" in capsys.readouterr().err
