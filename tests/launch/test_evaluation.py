"""The evaluation page: what it shows of which table, that hostile or damaged tables cannot harm it, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.evaluation import main, write_evaluation
from launch.evaluation_charts import Curve, Grid, Line, curve_card, grid_card, token_axis, tokens
from tests.launch.html_page import Page, card_with

ATTACK = "</text><script>alert(1)</script>\" onload='alert(2)"
BUCKETS = [(1, 16), (17, 32), (33, 64), (65, 100)]


def evaluation() -> dict[str, Any]:
    """Every table, small; sparse departs at 33."""
    bounds = {"low": 0.0, "high": 0.0, "low_all": 0.0, "high_all": 0.0}
    loss = []
    for low, high in BUCKETS:
        apart = 0.1 if low > 32 else 0.0
        ends = {name: value + apart for name, value in bounds.items()}
        row = {"from": low, "to": high, "tokens": 9, "sequences": 3, "dense": 2.0, "sparse": 2.0 + apart}
        loss.append(row | {"difference": apart, "other": 1.9, "against_difference": apart + 0.1} | ends)
    worth = {"mass_recall": 0.9, "recall_of_oracle": 0.95, "overlap": 0.7}
    recall = [{"layer": i, "from": low, "to": high, "rows": 9, **worth} for i in range(3) for low, high in BUCKETS]
    sweep = [
        {"k": k, "from": 1, "to": 100, "all": each, "difference": 1 / k, **bounds, **worth}
        for k in (8, 16, 32)
        for each in (1, 0)
    ]
    tasks = [
        {"task": "needle", "length": length, "depth": depth, "n": 20, "dense": 20, "sparse": 15}
        for length in (1024, 2048)
        for depth in (0.0, 0.5, 1.0)
    ]
    speed = [
        {"length": n, "attention": name, "prefill_s": 1.0, "decode_tokens_per_s": 9.0, "kv_bytes": n * 100}
        | {"index_key_bytes": n * 50, "kv_bytes_by_formula": n * 100, "index_key_bytes_by_formula": n * 50}
        for n in (256, 1024)
        for name in ("dense", "sparse")
    ]
    verdict = {"margin": 0.01, "departs_at": 33, "enough_topk": 16, "words": "Sparse departs at 33. Some k is enough."}
    return {
        "loss/lm_dense": 2.0,
        "loss_by_position": loss,
        "recall_by_position": recall,
        "loss_by_topk": sweep,
        "tasks": tasks,
        "k_sweep": [{"task": "needle", "length": 1024, "k": k, "n": 20, "sparse": k // 2} for k in (8, 16, 32)],
        "speed": speed,
        "harness": [{"task": "own", "metric": "acc,none", "dense": 0.5, "sparse": 0.25}],
        "verdict": verdict,
    }


def rendered(folder: Path, found: Any) -> tuple[str, Page]:
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(found if isinstance(found, str) else json.dumps(found))
    source = write_evaluation(folder, folder / "report").read_text()
    return source, Page(source)


def card_of(source: str, title: str) -> str:
    return card_with(source, f"<b>{title}</b>")


def test_every_table_has_its_pictures(tmp_path: Path) -> None:
    source, page = rendered(tmp_path / "run", evaluation())
    assert page.open == [] and page.unbalanced == []
    assert '<div class="verdict alarm"><p>Sparse departs at 33.</p><p>Some k is enough.</p></div>' in source
    loss = Page(card_of(source, "Loss"))
    assert loss.count("path", **{"class": "line"}) == 3  # dense, sparse, the other checkpoint
    apart = Page(card_of(source, "Sparse less dense"))
    assert apart.count("path", **{"class": "zero"}) == apart.count("path", **{"class": "limit"}) == 1
    assert apart.count("path", **{"class": "band"}) == 1 and apart.count("circle", **{"class": "dot"}) == 4
    assert Page(card_of(source, "Recall of the oracle")).count("rect") == 3 * 4 + 9  # layers x buckets, and the scale
    assert "enough: 16" in card_of(source, "Loss by k") and "enough: 16" in card_of(source, "Recall by k")
    assert Page(card_of(source, "needle, sparse")).count("rect") == 2 * 3 + 9
    assert "-0.25" in card_of(source, "needle, sparse less dense") and ">0.75<" in card_of(source, "needle, sparse")
    cache = Page(card_of(source, "Cache of one sample"))
    assert cache.count("path", **{"stroke-dasharray": "6 4"}) == 2  # formulas
    assert "<td>acc,none</td><td>0.5000</td><td>0.2500</td>" in source
    for anchor in ("loss", "tasks", "recall", "topk", "speed", "harness"):
        assert f'href="#{anchor}"' in source and f'id="{anchor}"' in source


def test_axes_have_names_and_units(tmp_path: Path) -> None:
    source, _ = rendered(tmp_path / "run", evaluation())
    for title, x, y in (
        ("Loss", "tokens of context", "nats a token"),
        ("Loss by k", "k, tokens selected", "nats a token"),
        ("Prefill", "tokens of context", "seconds"),
        ("Decoding", "tokens of context", "tokens a second"),
        ("Cache of one sample", "tokens of context", "KiB"),
        ("needle, dense", "tokens of context", "share right"),
    ):
        card = card_of(source, title)
        assert x in card and y in card, title


def test_what_was_not_measured_is_no_section(tmp_path: Path) -> None:
    source, page = rendered(tmp_path / "run", {"loss/lm_dense": 2.0})
    assert "No verdict" in source and page.count("section") == 0
    alone = evaluation()
    source, _ = rendered(tmp_path / "run", {"speed": alone["speed"], "verdict": {"words": "", "margin": 0.01}})
    assert source.count("<section>") == 1


def test_the_page_loads_and_runs_nothing_whatever_the_tables_hold(tmp_path: Path) -> None:
    found = evaluation()
    for name in ("tasks", "k_sweep", "harness", "speed"):
        for row in found[name]:
            row |= {key: ATTACK for key, value in row.items() if isinstance(value, str)}
    found["verdict"]["words"] = ATTACK
    found["loss_by_position"][0]["tokens"] = ATTACK
    source, page = rendered(tmp_path / "<script>alert(0)", found)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.open == [] and page.unbalanced == [] and "&lt;script&gt;alert(1)" in source
    assert not re.search(r"https?://|url\(|@import", source)


@pytest.mark.parametrize(
    "value", [None, "x", [], {}, [1, None, [], {}], [{"task": 1, "k": "2"}], [{"from": 1e999}], "zeros"]
)
def test_damaged_tables_are_left_out(tmp_path: Path, value: Any) -> None:
    for name, table in evaluation().items():
        if value == "zeros" and isinstance(table, list):
            value = [{key: each if isinstance(each, str) else 0 for key, each in row.items()} for row in table]
        _, page = rendered(tmp_path / "run", evaluation() | {name: value})
        assert page.unbalanced == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    rendered(run, evaluation())
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report/evaluation.html\n"
    for arguments, reason in (
        ([str(tmp_path)], "holds no evaluation.json: give the output_dir of +stage=evaluate"),
        ([str(run), str(run)], "2 runs given"),
        ([], "no run given"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err
    for content, reason in (("{", "is damaged"), ("[1]", "is no evaluation")):
        (run / "evaluation.json").write_text(content)
        assert main([str(run)]) == 2 and reason in capsys.readouterr().err


def test_lengths_are_said_as_they_are_said() -> None:
    assert [tokens(n) for n in (100, 512, 1024, 1536, 131072, 2**20, 1000)] == [
        "100",
        "512",
        "1K",
        "1.5K",
        "128K",
        "1M",
        "1000",
    ]
    axis = token_axis([2.0**p for p in range(4, 18)], 0, 312)
    labels = [label for _, label in axis.ticks]
    assert labels[-1] == "128K" and 4 <= len(labels) <= 7
    at = [axis.at(value) for value, _ in axis.ticks]
    assert all(b - a > 34 for a, b in zip(at, at[1:], strict=False))
    assert [label for _, label in token_axis([64.0], 0, 312).ticks] == ["64"]
    between = token_axis([70.0, 75.0, 80.0, 85.0, 90.0, 95.0, 100.0, 110.0], 0, 312)  # no power of two among them
    assert between.ticks[-1] == (110.0, "110") and len(between.ticks) > 3


def test_a_task_without_depths_says_so(tmp_path: Path) -> None:
    row = {"task": "common", "length": 512, "depth": None, "n": 20, "dense": 18, "sparse": 17}
    source, _ = rendered(tmp_path / "run", {"tasks": [row]})
    assert ">all<" in card_of(source, "common, dense") and "0%" not in card_of(source, "common, dense")


def test_shades_go_both_ways_from_nothing() -> None:
    grid = Grid("t", "k", ["0"], ["a", "b", "c", "d"], [[-1.0, 0.0, 0.5, None]], "row", "column", (-1.0, 1.0), 0, True)
    assert grid.opacity(-1.0) > grid.opacity(0.5) == grid.opacity(-0.5) > grid.opacity(0.0)
    drawn = grid_card(grid)
    assert drawn.count('class="less"') == 1 + 4 and drawn.count("<rect") == 3 + 9 and "row 0, column a: -1.00" in drawn


def test_one_point_is_still_a_picture() -> None:
    drawn = curve_card(Curve("t", "k", [Line("one", 0, [(64.0, 1.0)], [(64.0, 0.9, 1.1)])], "x", "y"))
    assert 'class="dot"' in drawn and "NaN" not in drawn and "(0.9000 to 1.100)" in drawn
