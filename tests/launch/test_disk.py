"""Folders that cannot be written and disks that are full, through the real entry: one line, status 2, nothing lost.

The full disk is a small tmpfs in a mount namespace of our own, which needs no root but which some containers forbid.
There a limit on the size of files stands for it (EFBIG); ENOSPC itself, beside an earlier checkpoint, is met in every
container by tests/train/test_disk.py.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from model import save_pretrained
from tests.distributed.helper import run_ranks
from tests.launch.test_stage import SMALL, command, finish
from tests.train import runs, tiny
from train.checkpoint import read_state, step_folders
from train.shards import Written, damage

NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")
MOUNTS = subprocess.run([*NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode == 0

TMPFS = """
mount -t tmpfs -o size={size} none disk
{run} 2> full.err; echo $? > full.status
cp -r disk/run full
mount -o remount,size=1g disk
{run} 2> roomy.err; echo $? > roomy.status
cp -r disk/run roomy
mount -o remount,ro disk
{longer} 2> closed.err; echo $? > closed.status
"""
LIMIT = """
(ulimit -f {blocks}; {run} 2> full.err; echo $? > full.status)
cp -r disk/run full
{run} 2> roomy.err; echo $? > roomy.status
cp -r disk/run roomy
"""


def only_line(stderr: str) -> str:
    """The one line that does not show the progress."""
    (line,) = (line for line in stderr.splitlines() if not line.startswith("pretrain: step"))
    return line


@pytest.mark.parametrize("script", [LIMIT, *([TMPFS] if MOUNTS else [])], ids=["limit", "tmpfs"][: 1 + MOUNTS])
def test_a_full_disk_and_then_room_again(script: str, tmp_path: Path) -> None:
    """The tmpfs holds one and a half of the three checkpoints of the run; the limit stops the first."""
    done = finish(tmp_path, *command(tmp_path / "whole", *SMALL))
    assert done.returncode == 0, done.stderr
    (tmp_path / "disk").mkdir()
    size = int(1.5 * (tmp_path / "whole/checkpoints/step_12/rank_00000.safetensors").stat().st_size)
    run, longer = (shlex.join(command(Path("disk/run"), *SMALL, *more)) for more in ([], ["train.steps=13"]))
    script = script.format(size=size, blocks=size // 3 // 512, run=run, longer=longer)
    shell = NAMESPACE if "mount" in script else ("sh", "-c")
    subprocess.run([*shell, script], cwd=tmp_path, check=True, timeout=300)

    def said(attempt: str) -> str:
        return (tmp_path / f"{attempt}.err").read_text()

    assert (tmp_path / "full.status").read_text() == "2\n", said("full")
    told = only_line(said("full"))
    left = step_folders(tmp_path / "full/checkpoints")
    if script.startswith(TMPFS[:10]):
        assert told.startswith("the checkpoint could not be written: No space left on device (disk/run/checkpoints/")
        assert told.endswith("step_4 is whole: make room and start again")
        assert sorted(os.listdir(tmp_path / "full/checkpoints")) == ["latest", "step_4"]
        assert not any(damage(left[4], Written(**file)) for file in read_state(left[4]).files)
    else:
        assert told.startswith("the checkpoint could not be written: File too large (disk/run/checkpoints/")
        assert told.endswith("there is no earlier one: make room and start again") and not left
    assert (tmp_path / "full/error.txt").read_text() == told + "\n"
    assert (tmp_path / "roomy.status").read_text() == "0\n", said("roomy")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "roomy")
    if script.startswith(TMPFS[:10]):
        assert (tmp_path / "closed.status").read_text() == "2\n"
        assert "output_dir=disk/run cannot be written, Read-only file system" in only_line(said("closed"))


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_ends_with_one_line(folder: str, tmp_path: Path) -> None:
    """Root too is refused these: permission bits would not stop it."""
    (tmp_path / "file").write_text("no folder")
    done = finish(tmp_path, *command(Path(folder), *SMALL))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"output_dir={folder} cannot be written, ") and line.endswith(": give another one")
    assert (tmp_path / "file").read_text() == "no folder"


def test_all_ranks_are_told_that_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    def attempt() -> str:
        try:
            return runs._run(runs.config(tmp_path / "file/run"), None, frozenset())
        except UserError as error:
            return str(error)

    one, other = run_ranks(attempt, 2)
    assert one == other and "cannot be written, Not a directory" in one


def test_an_export_without_room_leaves_no_folder(tmp_path: Path) -> None:
    def attempt() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            save_pretrained(tiny.build(), tmp_path / "hf", torch.float32)
        except UserError as error:
            return str(error)
        return "written"

    (told,) = run_ranks(attempt, 1)
    assert "model.safetensors could not be written" in told and "File too large" in told and "\n" not in told
    assert os.listdir(tmp_path) == []
