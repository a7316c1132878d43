"""The sample viewer: its data is whole, only its own script runs, and nothing a model writes can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from launch.samples import main, write_viewer
from launch.samples_data import load_samples
from tests.launch.html_page import Page
from tests.launch.runs import write_run

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script>\" onload='alert(3)"
OLD = {"domain": "arithmetic", "prompt": "1+1=?", "answer": "2", "text": "2", "reward": 1.0, "advantage": 0.5}


def full_row(step: int = 1, text: tuple[str, ...] = ("é", "", "b", ""), **changes: Any) -> dict[str, Any]:
    n = len(text)
    per_token = {"text": list(text), "behaviour_logprobs": [-0.123456] * n, "logprobs": [-0.25] * n}
    per_token |= {"ratios": [1.2345678] * n, "clipped": [i == 2 for i in range(n)], "kept": [None] * (n - 1) + [7]}
    row = {"step": step, **OLD, "text": "".join(text), "rubric": None, "finish_reason": "stop", "tokens": n}
    row |= {"reward_parts": {"exact_match": 1.0}, "reward_terms": {"exact_match": 0.9}, "prompt_index": 3}
    row |= {"sample_index": 1, "group_size": 4, "group_reward": 0.5, "weight_versions": [0], "max_log_ratio": 0.21}
    row |= {"clip_frac": 0.25, "off_policy_kl": 0.01, "off_policy_masked": True, "per_token": per_token}
    return row | changes


def write_rows(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(source: str) -> dict[str, Any]:
    """What the page's script finds, between the tags as a browser sees them."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script', source, re.DOTALL | re.IGNORECASE)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_every_sample_whole(tmp_path: Path) -> None:
    runs = [write_rows(tmp_path / "a", [full_row(1), {"step": 2, **OLD}]), write_rows(tmp_path / "b", [full_row(5)])]
    data = data_of(write_viewer(runs, tmp_path / "out").read_text())
    assert data["names"] == ["a", "b"] and [row["run"] for row in data["rows"]] == [0, 0, 1]
    new, old, _ = data["rows"]
    wanted = {name: value for name, value in full_row(1).items() if name not in ("text", "per_token")}
    assert {name: new[name] for name in wanted} == wanted
    assert new["text"] is None and new["per_token"] == {
        "text": ["é", "", "b", ""],
        "behaviour_logprobs": [-0.1235] * 4,
        "logprobs": [-0.25] * 4,
        "ratios": [1.2346] * 4,
        "clipped": [2],
        "kept": [None, None, None, 7],
    }
    assert old["text"] == "2" and old["per_token"] is None and old["reward"] == 1.0 and old["off_policy_kl"] is None
    assert old.keys() == new.keys()


def test_only_the_script_whose_hash_the_policy_names_can_run(tmp_path: Path) -> None:
    source = write_viewer([write_rows(tmp_path / "run", [full_row()])], tmp_path / "out").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Page(source)
    (policy,) = [tag["content"] for name, tag in page.tags if name == "meta" and "http-equiv" in tag]
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "eval" not in policy
    assert "\r" not in script  # what a browser hashes is the text as it parsed it
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script
    assert not re.search(r"https?://|url\(|@import", source)
    assert not {"link", "img", "iframe", "object"} & {name for name, _ in page.tags}
    ids = set(re.findall(r'\$\("(\w+)"\)', script))
    assert ids <= {tag.get("id") for _, tag in page.tags}  # every element that the script asks for is there


def test_hostile_text_stays_data(tmp_path: Path) -> None:
    row = full_row(text=(ATTACK, "\u202e\ud800", ""), prompt=ATTACK, answer=ATTACK, rubric=ATTACK, domain=ATTACK)
    row |= {"finish_reason": ATTACK, "reward_parts": {ATTACK: 1.0}, "reward_terms": {"__proto__": 1.0}, ATTACK: ATTACK}
    run = write_rows(tmp_path / "<script>alert(0)<b>\udcff", [row])
    source = write_viewer([run, write_rows(tmp_path / "plain", [full_row()])], tmp_path / "out").read_text()
    page = Page(source)
    assert page.count("script") == 2 and source.lower().count("</script") == 2 and "<!--" not in source
    assert "img" not in {name for name, _ in page.tags} and page.open == [] and page.unbalanced == []
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = data_of(source)["rows"][0]
    assert shown["per_token"]["text"] == [ATTACK, "⟨U+202E⟩⟨U+D800⟩", ""] and shown["domain"] == ATTACK
    assert shown["reward_parts"] == {ATTACK: 1.0} and "&lt;script&gt;alert(0)" in source


@pytest.mark.parametrize(
    "per_token",
    [7, {"text": ["other"]}, {"text": [1, 2]}, {"text": "2"}, {"ratios": [1.0]}, None],
    ids=["no-object", "other-text", "numbers", "string", "no-text", "null"],
)
def test_pieces_that_are_not_the_text_are_left_out(tmp_path: Path, per_token: Any) -> None:
    (row,) = load_samples([write_rows(tmp_path / "run", [{"step": 1, **OLD, "per_token": per_token}])]).rows
    assert row["per_token"] is None and row["text"] == "2"


def test_values_of_other_types_become_null(tmp_path: Path) -> None:
    odd = {"step": "x", "reward": 1e999, "advantage": True, "weight_versions": {"a": 1}, "reward_parts": [1]}
    per_token = {"text": ["a", "b"], "ratios": [1.0], "logprobs": [None, "x"], "clipped": [True] * 9, "kept": {}}
    run = write_rows(tmp_path / "run", [odd | {"text": "ab", "prompt": ["p"], "per_token": per_token}, [1], None])
    (run / "samples.jsonl").open("a").write('{"torn')
    (row,) = load_samples([run]).rows
    assert [row[name] for name in ("step", "reward", "advantage", "domain")] == [None] * 4
    assert row["weight_versions"] == [] and row["reward_parts"] == {} and row["prompt"] == '["p"]'
    told = row["per_token"]
    assert told["ratios"] is told["kept"] is None and told["logprobs"] == [None, None] and told["clipped"] == [0, 1]


def test_of_a_large_file_the_newest_are_shown(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [full_row(step) for step in range(200)])
    size = (run / "samples.jsonl").stat().st_size
    found = load_samples([run], size // 4)
    steps = [row["step"] for row in found.rows]
    assert steps == list(range(steps[0], 200)) and 145 < steps[0] < 155
    (note,) = found.notes
    assert "are left out" in note and load_samples([run], size).notes == []


def test_a_run_without_samples_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "pretrain")
    write_rows(tmp_path / "empty", [])
    for argument, reason in [
        ("pretrain", "holds no samples.jsonl: give"),
        ("nowhere", "no run at"),
        ("empty", "holds no samples: give"),
    ]:
        assert main([str(tmp_path / argument)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("samples: ") and printed.err.count("\n") == 1
        assert reason in printed.err
    assert not list(tmp_path.rglob("report"))
    assert main([]) == 2 and "no run given: python launch/samples.py RUN" in capsys.readouterr().err
    run = write_run(tmp_path / "grpo", "grpo")
    assert main([str(run)]) == 0 and capsys.readouterr().out == f"{run}/report/samples.html\n"
    with pytest.raises(UserError):
        load_samples([run, tmp_path / "empty2"])


def test_the_viewer_links_back_to_a_report(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [full_row()])
    assert Page(write_viewer([run], tmp_path / "out").read_text()).count("a") == 0
    (tmp_path / "out/index.html").touch()
    assert Page(write_viewer([run], tmp_path / "out").read_text()).count("a", href="index.html") == 1
