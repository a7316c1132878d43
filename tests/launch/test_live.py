"""The live page's data and server: files that grow and are cut back, what is thinned, and what nobody may be given."""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from conf.errors import UserError
from launch import live
from launch.live import PAGE_POLICY, live_server
from launch.live_data import MOST_KEYS, MOST_POINTS, Follower, Watched, last_row, thinned
from launch.page_command import parse
from launch.panels import PANELS
from launch.report import main
from launch.report_html import POLICY
from tests.launch.html_page import Page
from tests.launch.runs import write_run
from train.metrics import MetricsWriter

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e"


def lines(*steps: int, **values: float) -> bytes:
    return b"".join(json.dumps({"step": step, "loss/lm": float(step), **values}).encode() + b"\n" for step in steps)


def followed(path: Path, content: bytes) -> Follower:
    path.write_bytes(content)
    follower = Follower(path)
    follower.refresh()
    return follower


def steps_of(follower: Follower) -> list[float]:
    follower.refresh()
    found = follower.series("step").get("loss/lm", {"x": [], "y": []})
    assert found["x"] == found["y"]  # as `lines` writes them: no value got a row that is not its own
    return list(found["x"])


def test_a_growing_file_is_read_on_and_a_torn_line_only_when_it_is_whole(tmp_path: Path) -> None:
    follower = followed(tmp_path / "m", lines(1, 2) + lines(3)[:9])
    assert steps_of(follower) == [1, 2]
    with open(tmp_path / "m", "ab") as file:
        file.write(lines(3)[9:-1])
        file.flush()
        assert steps_of(follower) == [1, 2]
        file.write(b"\nnonsense\n" + lines(4))
    assert steps_of(follower) == [1, 2, 3, 4]


def test_a_resumed_run_and_a_rewritten_file_are_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = followed(path, lines(1, 2, 3, 4, 5))
    with MetricsWriter(tmp_path, 3) as writer:  # cuts back by moving another file into place
        assert steps_of(follower) == [1, 2, 3]
        writer.write(4, {"loss/lm": 4.0})
    assert steps_of(follower) == [1, 2, 3, 4]
    path.write_bytes(lines(7, 8))  # shorter, the same file
    assert steps_of(follower) == [7, 8]
    path.write_bytes(lines(11, 12, 13))  # longer, the same file
    assert steps_of(follower) == [11, 12, 13]
    path.unlink()
    assert steps_of(follower) == [11, 12, 13]  # what is gone stays on the page
    path.write_bytes(b"")
    assert steps_of(follower) == []


def test_a_step_that_comes_again_replaces_what_came_after_it(tmp_path: Path) -> None:
    follower = followed(tmp_path / "m", lines(1, 2, 3, 4) + lines(2, 5))
    assert steps_of(follower) == [1, 2, 5]


def test_axes_count_tokens_and_hours(tmp_path: Path) -> None:
    rows = [{"step": i, "tokens": 7200 * i, "perf/tokens_per_s": 2.0, "loss/lm": 1.0} for i in (1, 2, 3)]
    follower = followed(tmp_path / "m", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert follower.series("tokens")["loss/lm"]["x"] == [7200, 14400, 21600]
    assert follower.series("hours")["loss/lm"]["x"] == [1, 2, 3]


def test_a_key_that_is_logged_now_and_then_keeps_its_rows(tmp_path: Path) -> None:
    rows = [{"step": i, "reward/mean": 1.0} | ({"heldout/accuracy": i / 10} if i % 4 == 0 else {}) for i in range(9)]
    follower = followed(tmp_path / "m", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert follower.series("step")["heldout/accuracy"] == {"x": [0, 4, 8], "y": [0.0, 0.4, 0.8]}


def test_hostile_files_cost_no_more_than_they_are_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"step": 1, "loss/lm": 1.0} | {f"domain/{i}/accuracy": 0.5 for i in range(2 * MOST_KEYS)}
    follower = followed(tmp_path / "m", json.dumps(many | {f"other{i}": 1 for i in range(9999)}).encode() + b"\n")
    assert len(follower.columns) == MOST_KEYS and not any("other" in key for key in follower.columns)
    monkeypatch.setattr("launch.live_data.CHUNK", 64)
    assert steps_of(followed(tmp_path / "long", b"x" * 1000 + b"\n" + lines(1, 2))) == [1, 2]
    odd = b'{"step": 1e999}\n{"step": -1}\n[1]\n{"step": 3, "loss/lm": NaN}\n\xff\n' + lines(4)
    assert followed(tmp_path / "odd", odd).series("step")["loss/lm"] == {"x": [3, 4], "y": [None, 4.0]}


def test_thinning_keeps_ends_spikes_and_gaps() -> None:
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[54_321], y[60_000:61_000] = 50.0, math.nan
    found = thinned(x, y)
    assert MOST_POINTS / 2 < len(found["x"]) <= MOST_POINTS and (found["x"][0], found["x"][-1]) == (0, 99_999)
    assert max(v for v in found["high"] if v is not None) == 50.0 and None in found["y"] and None in found["low"]
    near = thinned(x, y, 54_300, 54_340)
    assert near["x"] == list(range(54_299, 54_342)) and "high" not in near and near["y"][22] == 50.0
    assert thinned(x, y, 2e6, 3e6)["x"] == [99_999] and thinned(x[:0], y[:0]) == {"x": [], "y": []}


def test_a_long_run_is_shown_as_far_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.live_data.CHUNK", 1000)
    (tmp_path / "m").write_bytes(lines(*range(1, 1001)))
    follower = Follower(tmp_path / "m")
    assert follower.refresh(0.0) and 0 < len(follower) < 1000
    assert not follower.refresh(60.0) and len(follower) == 1000


def test_runs_are_found_below_folders_and_links_are_not_followed(tmp_path: Path) -> None:
    for name in ("runs/b", "runs/a", "runs/.hidden", "runs/deep/c", "other/x"):
        write_run(tmp_path / name, steps=8)
    (tmp_path / "runs/link").symlink_to(tmp_path / "other/x")
    (tmp_path / "runs/linked").mkdir()
    (tmp_path / "runs/linked/metrics.jsonl").symlink_to(tmp_path / "other/x/metrics.jsonl")
    write_run(tmp_path / "runs/leads_out", steps=8)
    (tmp_path / "runs/leads_out/error.txt").symlink_to(tmp_path / "other/x/metrics.jsonl")
    watched = Watched([tmp_path / "runs/b", tmp_path / "runs"])
    assert list(watched.folders()) == ["b", "runs/a", "runs/deep/c"]
    assert {run["name"]: run["given"] for run in watched.told()} == {"b": True, "runs/a": False, "runs/deep/c": False}
    write_run(tmp_path / "runs/later", steps=8)
    assert "runs/later" in watched.folders() and "later" in Watched([tmp_path / "runs"]).folders()


def test_a_run_is_told_with_its_state_and_its_alerts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "grpo", steps=20)
    (run / "alerts.jsonl").write_text(json.dumps({"step": 8, "text": f"policy/kl_ref {ATTACK}"}) + '\n{"text": 3}\n{to')
    watched = Watched([run])
    (told,) = watched.told()
    assert (told["state"], told["step"], told["steps"], told["stage"]) == ("finished", 20, 20, "grpo")
    assert told["samples"] and told["alerts"] == [f"step 8: policy/kl_ref {ATTACK[:-1]}⟨U+202E⟩"]
    (run / "config.yaml").write_text("stage: grpo\ntrain: {steps: 40}\n")
    assert watched.told()[0]["state"] == "running"
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    assert watched.told()[0]["state"] == "unfinished"
    (run / "error.txt").write_text("out of memory")
    assert (watched.told()[0]["state"], watched.told()[0]["error"]) == ("failed", "out of memory")
    assert last_row(tmp_path / "none") == {"step": 0}


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Any]:
    """-> ask(path, host): (status, content policy, body)."""
    write_run(tmp_path / "runs/base", steps=40)
    write_run(tmp_path / "runs/rl<b>", "grpo", steps=40)
    (tmp_path / "secret").write_text("secret")
    with live_server([tmp_path / "runs"], 0) as serving:
        address, port = serving.server_address[:2]
        assert address == "127.0.0.1"
        threading.Thread(target=serving.serve_forever, daemon=True).start()

        def ask(path: str, host: str | None = None, method: str = "GET") -> tuple[int, str | None, str]:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            connection.putrequest(method, path, skip_host=True)
            connection.putheader("Host", f"127.0.0.1:{port}" if host is None else host)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Security-Policy"], answer.read().decode()

        yield ask
        serving.shutdown()


def test_the_server_tells_runs_and_series(asked: Any) -> None:
    runs = json.loads(asked("/api/runs")[2])["runs"]
    assert [run["name"] for run in runs] == ["base", "rl<b>"]
    told = json.loads(asked("/api/series?run=base&x=tokens")[2])
    assert told["rows"] == 20 and not told["more"] and told["series"]["loss/lm"]["x"][0] == 2048
    zoomed = json.loads(asked("/api/series?run=base&x=step&from=10&to=12.5")[2])
    assert zoomed["series"]["loss/lm"]["x"] == [8, 10, 12, 14]
    wanted = {key for panel in PANELS["pretrain"] for key in panel.keys} - {"optim/skipped_steps"}
    assert wanted <= told["series"].keys()


def test_pages_carry_policies_that_load_nothing_from_elsewhere(asked: Any) -> None:
    status, policy, source = asked("/")
    page = Page(source)
    assert status == 200 and policy == PAGE_POLICY and page.open == [] and page.unbalanced == []
    assert "default-src 'none'" in PAGE_POLICY and "connect-src 'self'" in PAGE_POLICY and "unsafe-eval" not in policy
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags} and "http://www.w3.org/2000/svg" in source
    assert source.count("http") == 2  # the name of SVG, and `http-equiv`
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    name = quote("rl<b>")
    status, policy, source = asked(f"/report?run=base&run={name}")
    assert (status, policy) == (200, POLICY) and Page(source).count("a", href=f"samples?run={name}") == 1
    status, policy, source = asked(f"/samples?run={name}")
    assert status == 200 and policy == live.samples_page.POLICY and "rl&lt;b&gt;" in source
    assert asked("/api/runs")[1] == POLICY


def test_only_runs_are_served_and_only_to_this_machine(asked: Any) -> None:
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example"):
        assert asked("/api/runs", host)[0] == 403
    assert asked("/", "localhost")[0] == 200
    inside = ["..", "base/..", "runs", "/etc", "secret", "base/../../secret", "%00", "base%00", "%ff"]
    for name in inside:
        for page in ("api/series", "report", "samples"):
            status, _, body = asked(f"/{page}?run={name}")
            assert status == 404 and "secret" not in body
    wrong = ["?", "?run=base&run=base", "?run=base&x=__class__", "?run=base&from=nan", "?from=1"]
    assert [asked(f"/api/series{query}")[0] for query in wrong] == [404] * len(wrong)
    assert [asked(path)[0] for path in ("/secret", "/../secret", "/api", "/live.js", "//etc/passwd")] == [404] * 5
    status, _, body = asked("/report?" + "&".join(["run=base"] * 99))
    assert status == 404 and body.startswith("99 runs on one page are too many")
    assert asked("/samples?run=base")[0] == 404  # it has none
    assert asked("/api/runs", method="POST")[0] == 501


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--serve", "0"]) == 2
    assert f"no folder at {tmp_path / 'none'}: give" in capsys.readouterr().err
    with pytest.raises(UserError, match="out=x with --serve"):
        parse(["a", "out=x", "--serve"], "report", live=True)
    assert parse(["--serve", "0"], "report", live=True).runs == []
    with live_server([tmp_path], 0) as serving, pytest.raises(UserError, match="cannot serve on port"):
        live_server([tmp_path], int(serving.server_address[1]))
