"""metrics.jsonl across kills and resumes, the W&B records of an offline run, and progress without a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.errors import UserError
from conf.schema import TrackerConfig
from train.metrics import MetricsWriter, read_metrics
from train.progress import Progress, duration
from train.tracker import Tracker, WandbTracker, make_tracker, table_due

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss/lm": 1 / step, "tokens": step * 512})


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 11))
    write(tmp_path / "killed", range(1, 8))
    write(tmp_path / "killed", range(5, 11), resume_step=4)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert os.listdir(tmp_path / "killed") == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "loss/lm": 0.2', b'{"step": 4, "a": 0.\x00', b"\xff\xfe", b"[4]\n", b"4"]
)
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, range(1, 4))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    write(tmp_path, range(4, 4), resume_step=9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_kept_and_ended(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, range(4, 5), resume_step=3)
    assert [row["step"] for row in read_metrics(path)[0]] == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3), resume_step=None)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 2]


def test_survives_kill_9(tmp_path: Path) -> None:
    script = (
        "import os, signal; from train.metrics import MetricsWriter\n"
        f"w = MetricsWriter({str(tmp_path)!r}, None)\n"
        "w.write(1, {'a': 1.0}); w.write(2, {'a': 2.0}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -9
    assert [row["a"] for row in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1.0, 2.0]


def test_rows_are_strict_json_and_not_finite_becomes_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        written = writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 3, "f": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert stored == written == {"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 3, "f": 0.5}


@pytest.mark.parametrize("value", ["1.0", True, [1.0], {"x": 1.0}])
def test_a_row_holds_plain_numbers_only(tmp_path: Path, value: object) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(AssertionError, match="metric bad is a"):
        writer.write(1, {"bad": value})


@pytest.mark.parametrize("step", [2, 1, 0])
def test_a_repeated_or_earlier_step_is_refused(tmp_path: Path, step: int) -> None:
    write(tmp_path, range(1, 3))
    with MetricsWriter(tmp_path, 2) as writer, pytest.raises(ValueError, match=f"step {step} after step 2"):
        writer.write(step, {"loss/lm": 1.0})


def test_reading_takes_the_last_of_a_repeated_step_and_counts_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\nnonsense\n{"step": 1, "a": NaN}\n{"step": 2, "a": 1e999}\n{"a": 1}\n')
    assert read_metrics(path) == ([{"step": 1, "a": None}, {"step": 2, "a": None}], 2)


def records(folder: Path) -> list[dict]:
    """Every record of every W&B run below, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect"]
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        out = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=True).stdout
        found += [json.loads(line) for line in out.splitlines()]
    return found


TRACKED = f"""
import sys
from conf.schema import TrackerConfig
from train.tracker import make_tracker
resume, first = sys.argv[2] == "resume", int(sys.argv[3])
config = {{"data": {{"path": "hf://user:{SECRET}@host", "seq_len": 512}}, "stage": "grpo"}}
tracker = make_tracker(TrackerConfig(), sys.argv[1], config, resume)
def rows(step):
    return [["<b>1+1=?", float(step)], ["{SECRET}", 0.0]]
earlier = [[step, *row] for step in range(1, first) for row in rows(step)]
tracker.restore_table("rollouts", ["prompt", "reward"], earlier)
for step in (first, first + 1):
    tracker.alert("kl_rising", f"step {{step}}: too far", "warn")
    tracker.log(step, {{"step": step, "loss/lm": 1.0 / step, "indexer/layer_03/kl": 0.25, "lost": None}})
    tracker.table("rollouts", step, ["prompt", "reward"], rows(step))
tracker.finish()
"""


def test_wandb_offline_writes_records_and_resumes_without_network_noise_or_keys(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environ |= {
        "MY_API_TOKEN": SECRET,
        "HOME": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    for mode, first in (("new", 1), ("resume", 3)):
        command = [sys.executable, "-c", TRACKED, str(run), mode, str(first)]
        ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    stored = (run / "wandb/run_id").read_text().strip()
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(stored) for folder in folders)
    for folder, steps in zip(folders, ([1, 1, 2, 2], [1, 1, 2, 2, 3, 3, 4, 4]), strict=True):
        tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/*.json")]
        assert sorted(row[0] for table in tables for row in table["data"]) == steps
        assert {tuple(table["columns"]) for table in tables} == {("step", "prompt", "reward")}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]
    read = records(run)
    history = [record["history"]["item"] for record in read if record["type"] == "history"]
    assert [(item["_step"], item["loss/lm"], item["indexer/layer_03/kl"]) for item in history] == [
        (step, pytest.approx(1 / step), 0.25) for step in (1, 2, 3, 4)
    ]
    assert not any("lost" in item for item in history)
    alerts = [record["alert"] for record in read if record["type"] == "alert"]
    assert [alert["text"] for alert in alerts] == [f"step {step}: too far" for step in (1, 2, 3, 4)]
    # Each step's table is an increment of its own that names those before it in its attempt.
    assert [item["rollouts.increment_num"] for item in history] == [0, 1, 0, 1]
    assert [len(item["rollouts.previous_increments_paths"]) for item in history] == [0, 1, 0, 1]
    assert len({item["rollouts.artifact_path"] for item in history}) == 4
    runs = [record["run"] for record in read if record["type"] == "run"]
    assert runs[0]["config"]["update"]["data"] == {"path": "hf://user:<redacted MY_API_TOKEN>@host", "seq_len": 512}


def test_online_the_server_keeps_the_tables_of_earlier_attempts() -> None:
    """What it has is neither sent along nor, where a resumed run repeats a step, sent again."""
    import wandb

    logged: list[tuple[int, int]] = []
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._wandb, tracker._tables, tracker._offline = wandb, {}, False
    tracker._table_rows, tracker._table_chars = 100, 100
    tracker._run = SimpleNamespace(  # type: ignore[assignment]
        starting_step=5, log=lambda row, step: logged.append((step, len(row["rollouts"].data)))
    )
    tracker.restore_table("rollouts", ["reward"], [[1, 0.0], [4, 0.0]])
    for step in (3, 4, 5, 6):
        tracker.table("rollouts", step, ["reward"], [[1.0]])
    assert logged == [(5, 1), (6, 2)]


def test_no_tracker_and_ranks_after_the_first_touch_nothing(tmp_path: Path) -> None:
    for cfg, is_main in ((TrackerConfig(name="none"), True), (TrackerConfig(name="wandb"), False)):
        tracker = make_tracker(cfg, tmp_path, {}, resume=False, is_main=is_main)
        assert type(tracker) is Tracker
        tracker.log(1, {"loss/lm": 1.0})
        tracker.table("rollouts", 1, ["prompt"], [["x"]])
        tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_and_a_refused_key_are_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="tracker.name='tensorboard' is no tracker: valid are wandb, none"):
        make_tracker(TrackerConfig(name="tensorboard"), tmp_path, {}, resume=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")  # refused by its length before any request is made
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="tracker=none") as raised:
        make_tracker(TrackerConfig(), tmp_path, {}, resume=False)
    assert "\n" not in str(raised.value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_is_a_readable_line_now_and_then() -> None:
    now, out = [0.0], io.StringIO()
    with Progress(100, "dense_warmup", initial=40, stream=out, clock=lambda: now[0]) as progress:
        for step in range(60):
            now[0] += 0.5
            progress.update(1, kl=0.5 / (step + 1), tokens=512)
    lines = out.getvalue().splitlines()
    assert lines[0] == "dense_warmup: step 50/100  2.00 step/s  25s left  kl 0.050  tokens 512"
    assert lines[-1] == "dense_warmup: step 100/100  2.00 step/s  30s in all  kl 0.008  tokens 512"
    assert len(lines) == 6 and "\r" not in out.getvalue()


def test_progress_in_a_long_job_slows_down_its_lines() -> None:
    now, out = [0.0], io.StringIO()
    with Progress(24 * 60, "pretrain", stream=out, clock=lambda: now[0]) as progress:
        for _ in range(24 * 60):
            now[0] += 30.0
            progress.update(1)
    assert 700 < len(out.getvalue().splitlines()) < 760  # 12 hours: about a line a minute, not one each 30 s
    assert "30.00 s/step" in out.getvalue()


def test_progress_is_a_bar_on_a_terminal_and_nothing_where_disabled() -> None:
    bar, nothing = Terminal(), Terminal()
    for stream, enabled in ((bar, True), (nothing, False)):
        with Progress(3, "sample", enabled, stream=stream) as progress:
            progress.update(3, reward=0.5)
    assert "sample: 100%" in bar.getvalue() and "reward=0.500" in bar.getvalue()
    assert nothing.getvalue() == ""


@pytest.mark.parametrize("seconds, shown", [(0.4, "0s"), (59.6, "1m00s"), (7500, "2h05m"), (273600, "3d04h")])
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_table_is_bounded_in_rows_and_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    logged: list[int] = []
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._wandb, tracker._tables, tracker._offline = wandb, {}, False
    tracker._table_rows, tracker._table_chars = 5, 30
    tracker._run = SimpleNamespace(starting_step=0, log=lambda row, step: logged.append(step))  # type: ignore[assignment]
    for step in (1, 2, 3, 4):
        tracker.table("samples", step, ["text"], [["a" * 99 + "the end"], ["x" * 25 + SECRET]])
    rows = tracker._tables["samples"].data
    assert [row[0] for row in rows] == [1, 1, 2, 2, 3] and logged == [1, 2, 3]
    assert rows[0][1] == "a" * 20 + " … 76 characters … aaathe end"
    assert not any(SECRET[:6] in str(row) for row in rows)  # no half of a key either


@pytest.mark.parametrize(("steps", "rows"), [(10, 2000), (1000, 2000), (100_000, 2000), (100_000, 100), (7, 1)])
def test_tables_are_spread_over_the_run_and_end_with_it(steps: int, rows: int) -> None:
    due = [step for step in range(1, steps + 1) if table_due(TrackerConfig(table_rows=rows), step, steps, 16)]
    assert due[0] == 1 and due[-1] == steps and (16 * len(due) <= rows or len(due) == 2 or rows < 64)
    gaps = [b - a for a, b in zip(due, due[1:], strict=False)]
    assert max(gaps) <= max(1, 2 * 16 * steps / rows + 1) or rows < 64
    every = TrackerConfig(table_every=3)
    assert [step for step in range(1, 11) if table_due(every, step, 10, 16)] == [1, 3, 6, 9, 10]
