"""The command-line contract: exit status, one line, error.txt; and a real process killed with SIGKILL."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conf.errors import UserError
from launch import stage

ENTRY = str(Path(stage.__file__).resolve())
SMALL = (
    "+stage=pretrain data.source=synthetic data.tokenizer=bytes data.seq_len=64 model.vocab_size=256"
    " model.hidden_size=64 model.num_hidden_layers=2 train.steps=12 train.log_every=1 train.save_every=4 tracker=none"
).split()


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, ENTRY, f"output_dir={folder}", *arguments]


def finish(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_typo_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    done = finish(tmp_path, *command(tmp_path / "run", "+stage=pretrain", "train.stepz=3"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "train.stepz" in line and "train.steps" in line
    assert (tmp_path / "run" / "error.txt").read_text() == line + "\n"


def test_a_stage_without_a_start_says_what_to_give(tmp_path: Path) -> None:
    done = finish(tmp_path, sys.executable, ENTRY, "+stage=sparse_adapt")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "init_from is not given and runs/ holds no finished run of dense_warmup" in line
    assert (tmp_path / "runs" / "sparse_adapt" / "error.txt").read_text() == line + "\n"


def test_sigkill_and_resume_end_in_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = finish(tmp_path, *command(whole, *SMALL))
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command(killed, *SMALL), cwd=tmp_path, stderr=subprocess.DEVNULL)
    metrics, saved, deadline = killed / "metrics.jsonl", killed / "checkpoints/step_4", time.monotonic() + 120
    while not saved.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "hf").exists()
    done = finish(tmp_path, *command(killed, *SMALL))
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout

    def rows(folder: Path) -> list[dict]:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]

    assert rows(whole) == rows(killed)
    one, other = (load_file(folder / "hf" / "model.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def broken(error: BaseException):
    def run(argv: list[str]) -> None:
        raise error

    return run


def test_a_fault_leaves_its_traceback_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "run", broken(RuntimeError("disk\non fire")))
    assert stage.main([f"output_dir={tmp_path}", "+stage=sft"]) == 1
    assert capsys.readouterr().err == "RuntimeError: disk on fire (see error.txt in the run's folder)\n"
    assert "Traceback" in (tmp_path / "error.txt").read_text()


def test_a_full_disk_anywhere_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "run", broken(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")))
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):  # the second takes no error.txt
        assert stage.main([f"output_dir={folder}", "+stage=sft"]) == 2
        line = "metrics.jsonl: No space left on device: make room or give the permission there, and start again\n"
        assert capsys.readouterr().err == line
    assert (tmp_path / "error.txt").read_text() == line


def test_a_fault_that_cannot_be_written_down_is_told_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "run", broken(RuntimeError("no")))
    (tmp_path / "file").touch()
    assert stage.main([f"output_dir={tmp_path / 'file'}", "+stage=sft"]) == 1
    assert "Traceback" in capsys.readouterr().err


STUCK = """
import sys, time
import train.loop, train.saver
from launch.stage import main
from train import shards

def fault(context, *_):
    if context.saver._thread:
        raise RuntimeError("elsewhere")
    return {}

train.saver.CLOSE_S = 0.5
shards.write = lambda *_: time.sleep(600)
train.loop.metrics_row = fault
sys.exit(main(sys.argv[1:]))
"""


def test_a_stuck_save_does_not_keep_a_process_from_ending(tmp_path: Path) -> None:
    arguments = [*SMALL, "train.save_every=1", f"output_dir={tmp_path / 'run'}"]
    start = time.monotonic()
    done = finish(Path(ENTRY).parents[1], sys.executable, "-c", STUCK, *arguments)
    assert done.returncode == 1 and time.monotonic() - start < 100
    assert done.stderr.splitlines()[-1] == "RuntimeError: elsewhere (see error.txt in the run's folder)"


@pytest.mark.parametrize(("error", "status"), [(UserError("no"), 2), (RuntimeError("no"), 1)])
def test_other_ranks_are_silent(
    error: Exception,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage, "run", broken(error))
    monkeypatch.setattr(stage, "GRACE_S", 0.0)
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert stage.main([f"output_dir={tmp_path}", "+stage=sft"]) == status
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "error.txt").exists()
    assert (tmp_path / "error_rank_1.txt").exists()
