"""Accuracy of long-context tasks: equal to real greedy decoding, to itself on any ranks and, once every position is
selected, to dense attention; which cells are asked, and that k is what the sweep says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.schema import DataConfig, EvalConfig
from data.long_stream import LongProblems
from data.tasks.long import LongProblem
from data.tokenizer import load_tokenizer
from model import Transformer
from model.generate import Ask, Sampling, generate
from model.mla import MLA
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.long_tasks import accuracy_row, cells, task_accuracy
from train.parallel.cp import ContextParallel

DATA = DataConfig(source="synthetic", seq_len=96, tokenizer="bytes")
EVAL = EvalConfig(tasks=("needle", "common:1"), lengths=(96, 110), depths=2, problems=2, k_sweep=(1, 200))


def net() -> Transformer:
    return tiny.build(vocab_size=256, max_position_embeddings=256)


def said(model: Transformer, prompt: list[int], count: int, attention: str) -> list[int]:
    (found,) = generate(model, [Ask(prompt, 0, count)], Sampling(temperature=0), eos_id=-1, attention=attention)
    return found.ids


class Answered(LongProblems):
    """Problems whose answers are what `attention` itself says; of every third one the last token is another one."""

    def __init__(self, attention: str, spoil: bool = True) -> None:
        super().__init__(DATA, load_tokenizer("bytes"), 0, "heldout")
        self.model, self.attention, self.spoil, self.spoiled = net(), attention, spoil, 0

    def asked(self, problem: LongProblem) -> tuple[np.ndarray, np.ndarray]:
        ids, targets = super().asked(problem)
        prompt = ids[~targets].tolist()
        answer = said(self.model, prompt, int(targets.sum()), self.attention)
        if self.spoil and sum(prompt) % 3 == 0:
            answer[-1] = (answer[-1] + 1) % 256
            self.spoiled += 1
        return np.array([*prompt, *answer]), targets


def measure(attention: str, cp: int = 1, cfg: EvalConfig = EVAL) -> tuple[dict, int]:
    problems = Answered(attention)
    return task_accuracy(net(), cfg, problems, ContextParallel(cp)), problems.spoiled


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_right_is_what_greedy_decoding_says(attention: str) -> None:
    ((found, spoiled),) = run_ranks(measure, 1, attention)
    rows = found["tasks"]
    total = len(cells(EVAL, 96)) * EVAL.problems
    assert sum(row["n"] for row in rows) == total and 0 < spoiled < total
    assert sum(row[attention] for row in rows) == total - spoiled
    other = "sparse" if attention == "dense" else "dense"
    assert sum(row[other] for row in rows) < total - spoiled  # four of a hundred positions: not the same answers
    assert all(0 <= row["sparse"] <= row["n"] == 2 for row in rows)


def test_sparse_is_dense_once_every_position_is_selected() -> None:
    ((found, _),) = run_ranks(measure, 1, "dense")
    by_k = {(row["task"], row["length"], row["k"]): row for row in found["k_sweep"]}
    assert len(by_k) == 2 * 2 * 2
    dense: dict[tuple[str, int], int] = {}
    for row in found["tasks"]:
        cell = (row["task"], row["length"])
        dense[cell] = dense.get(cell, 0) + row["dense"]
    assert all(by_k[*cell, 200]["sparse"] == right for cell, right in dense.items())
    assert sum(by_k[*cell, 1]["sparse"] for cell in dense) < sum(dense.values())
    assert [by_k[task, 96, 1]["n"] for task in EVAL.tasks] == [4, 2]  # over all depths


def test_any_ranks_find_the_same() -> None:
    ((alone, _),) = run_ranks(measure, 1, "sparse")
    assert [each for each, _ in run_ranks(measure, 2, "sparse")] == [alone, alone]
    assert [each for each, _ in run_ranks(measure, 2, "sparse", 2)] == [alone, alone]


def test_cells_cover_tasks_lengths_and_depths() -> None:
    found = cells(EVAL, 96)
    assert [(cell.length, cell.depth) for cell in found if cell.task == "needle"] == [
        (length, depth) for length in (96, 110) for depth in (0.0, 1.0)
    ]
    assert [(cell.length, cell.depth) for cell in found if cell.task == "common:1"] == [(96, None), (110, None)]
    assert [cell.depth for cell in cells(replace(EVAL, tasks=("kv",), depths=5, lengths=(96,)), 64)] == [
        0.0, 0.25, 0.5, 0.75, 1.0,
    ]  # fmt: skip
    (alone,) = cells(replace(EVAL, tasks=("kv",), lengths=(), depths=1), 64)
    assert (alone.length, alone.depth) == (64, 0.5)


def test_the_model_keeps_its_k_after_a_fault() -> None:
    model = net()
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    with pytest.raises(RuntimeError), model.selecting(9):
        assert {layer.topk for layer in layers} == {9}
        raise RuntimeError
    assert {layer.topk for layer in layers} == {tiny.MODEL.index_topk}


def test_greedy_is_the_argmax_of_labelled_rows() -> None:
    model, batch = tiny.build(), tiny.batch(1)
    with torch.no_grad():
        out = model(**batch, attention="dense", greedy=True, lm_loss=False)
        whole = model.logits(batch["input_ids"][None], batch["doc_start"][None], "dense")[0].argmax(-1)
    labelled = batch["labels"] >= 0
    assert out.greedy is not None and torch.equal(out.greedy[labelled], whole[labelled])
    assert (out.greedy[~labelled] == -1).all()
    assert model(**batch).greedy is None


def test_accuracy_row_is_over_all_lengths_and_depths() -> None:
    rows = [
        {"task": "kv:2", "length": length, "depth": 0.0, "n": 4, "dense": dense, "sparse": 1}
        for length, dense in ((96, 4), (130, 2))
    ]
    assert accuracy_row(rows) == {"tasks/kv:2/dense": 0.75, "tasks/kv:2/sparse": 0.25}  # type: ignore[arg-type]
