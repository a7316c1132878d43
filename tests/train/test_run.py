"""Whole runs: layouts that must agree, the guards inside the loop, what a run's folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conf.convert import load_yaml
from conf.schema import OptimConfig
from tests.train import runs
from train.checkpoint import read_state
from train.losses import Counts, add_losses, mean_losses


def test_two_ranks_equal_one_rank_with_twice_the_micro_batches(tmp_path: Path) -> None:
    assert runs.go(runs.config(tmp_path / "one", micro_batches=4)) == ["finished"]
    assert runs.go(runs.config(tmp_path / "two", micro_batches=2), world=2) == ["finished"] * 2
    one, two = runs.rows(tmp_path / "one"), runs.rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for mine, theirs in zip(one, two, strict=True):
        # fp32 sums in another order, carried through six steps of AdamW
        assert mine == pytest.approx(theirs, rel=2e-4)


def test_a_run_leaves_its_folder_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.go(runs.config(folder, steps=5, log_every=3)) == ["finished"]
    assert [row["step"] for row in runs.rows(folder)] == [1, 3, 5]  # first, every third, last
    assert [row["optim/lr"] for row in runs.rows(folder)] == pytest.approx([1.5e-3, 2.325e-3, 3e-4])  # warmed up in 2
    assert runs.rows(folder)[-1]["tokens"] == 5 * 2 * 13
    tokenizer = ("hf/tokenizer.json", "hf/chat_template.jinja")
    for name in ("hf/config.json", "hf/model.safetensors", *tokenizer, "checkpoints/latest"):
        assert (folder / name).is_file(), name
    assert load_yaml(folder / "config.yaml").optim.lr == 3e-3  # resolved
    state = read_state(folder / "checkpoints" / "step_5")
    assert (state.step, state.data_position, state.world_size) == (5, 10, 1)


def test_spikes_are_left_out_and_counted(tmp_path: Path) -> None:
    # almost no learning and no tolerance: every loss above the high ones of the last steps is a spike
    changes = {"steps": 80, "micro_batches": 1, "spike_factor": 1.0 + 1e-9, "optim": OptimConfig(lr=1e-9)}
    assert runs.go(runs.config(tmp_path / "run", max_skipped_steps=40, **changes)) == ["finished"]
    skipped = [row["optim/skipped_steps"] for row in runs.rows(tmp_path / "run")]
    assert skipped[15] == 0 and 0 < skipped[-1] <= 20 and skipped == sorted(skipped)
    with pytest.raises(AssertionError, match=r"TooManySkips: step \d+: loss .* above 1 x .* the high losses"):
        runs.go(runs.config(tmp_path / "stopped", max_skipped_steps=0, **changes))


def test_a_row_has_the_losses_of_all_steps_since_the_last(tmp_path: Path) -> None:
    for name, log_every in (("every", 1), ("third", 3)):
        assert runs.go(runs.config(tmp_path / name, log_every=log_every)) == ["finished"]
    every, third = (runs.rows(tmp_path / name) for name in ("every", "third"))
    assert [row["step"] for row in third] == [1, 3, 6]
    for row, steps in zip(third[1:], (every[1:3], every[3:]), strict=True):
        losses = [one["loss/lm"] for one in steps]
        assert row["loss/lm"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)  # about as many targets in each
        assert min(abs(row["loss/lm"] / loss - 1) for loss in losses) > 1e-4
    held: dict[str, float] = {}
    for lm, targets in ((8.0, 4), (3.0, 1)):
        add_losses(held, {"lm": torch.tensor(lm), "loss": torch.tensor(0.0)}, Counts(targets, 1, 9, 1))
    assert mean_losses(held) == {"loss/lm": 11 / 5}


def test_the_routers_bias_moves_where_declared(tmp_path: Path) -> None:
    base, warm = tmp_path / "base", tmp_path / "warm"
    assert runs.go(runs.config(base, steps=1)) == ["finished"]
    assert runs.go(runs.config(warm, "dense_warmup", init_from=str(base), steps=1)) == ["finished"]
    before, after = runs.weights(base), runs.weights(warm)
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(names) == 2  # a MoE layer, and MTP's
    for name in names:
        assert before[name].abs().max() == pytest.approx(1e-3)  # one step of bias_update_speed
        assert before[name].equal(after[name])
