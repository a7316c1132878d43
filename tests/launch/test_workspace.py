"""Panels show what stages log, the W&B workspace holds those panels, and an offline run has the names of metrics.jsonl.

One tiny run of every stage with the offline tracker serves all three.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import STAGES
from launch.panels import PANELS, TABLES, TITLES, Panel
from launch.workspace import main, specification, workspace
from rl.samples import COLUMNS, TABLE
from tests.launch.stage_runs import run_stages


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_stages(tmp_path_factory.mktemp("runs"), "wandb")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_panel_is_logged_by_its_stage(runs: dict[str, Path], stage: str) -> None:
    logged = {key for row in rows_of(runs[stage]) for key in row}
    for panel in PANELS[stage]:
        for key in panel.keys:
            assert Panel((key,), "").matching(logged), f"{stage} logs no {key}"
    assert len({panel.keys for panel in PANELS[stage]}) == len(PANELS[stage]) == len({p.title for p in PANELS[stage]})


@pytest.mark.parametrize("stage", STAGES)
def test_an_offline_run_holds_the_names_and_values_of_metrics_jsonl(runs: dict[str, Path], stage: str) -> None:
    """Read by W&B's own reader of the file that `wandb sync` uploads."""
    (path,) = runs[stage].glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in out.splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    history = {item["_step"]: item for item in items}
    rows = {row.pop("step"): row for row in rows_of(runs[stage])}
    assert rows and history.keys() == rows.keys()
    for step, row in rows.items():
        ours = {key: value for key, value in row.items() if value is not None}
        beside = {key for key in history[step] if key.startswith("_") or key.partition(".")[0] in TABLES.get(stage, ())}
        assert {key: history[step][key] for key in history[step].keys() - beside} == pytest.approx(ours)
    tables = [json.loads(file.read_text()) for file in path.parent.glob("files/media/table/*.json")]
    assert bool(tables) == (stage in TABLES)
    for table in tables:
        assert table["columns"] == ["step", *COLUMNS] and table["data"]


def test_tables_are_named_as_rl_names_them() -> None:
    assert TABLES == {"grpo": (TABLE,)}


def test_the_workspace_has_a_section_a_stage_with_the_panels_in_order() -> None:
    spec = specification(workspace("team", "winnow"))
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [TITLES[stage] for stage in STAGES]
    for stage, section in zip(STAGES, sections, strict=True):
        drawn = [panel["config"] for panel in section["panels"]]
        tables = len(TABLES.get(stage, ()))
        assert [config["chartTitle"] for config in drawn[: len(drawn) - tables]] == [p.title for p in PANELS[stage]]
        assert json.dumps(drawn[len(drawn) - tables :]).count('"samples"') >= tables
        for panel, config in zip(PANELS[stage], drawn, strict=False):
            if panel.is_pattern:
                assert config["metricRegex"] == panel.pattern and config["useMetricRegex"]
            else:
                assert config["metrics"] == list(panel.keys)
            assert config.get("yLogScale", False) is panel.metric.log or stage == "evaluate"
        assert section["isOpen"]
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "winnow", "Winnow")


def test_one_stage_shows_its_runs_alone() -> None:
    spec = specification(workspace("", "p", "grpo", "Mine"))["spec"]["section"]
    assert [section["name"] for section in spec["panelBankConfig"]["sections"]] == ["GRPO"]
    (filters,) = spec["runSets"][0]["filters"]["filters"]
    assert (filters["key"], filters["op"], filters["value"]) == ({"section": "config", "name": "stage"}, "=", "grpo")


def test_patterns_match_one_part_of_a_key() -> None:
    panel = Panel(("domain/*/accuracy", "a.b"), "")
    keys = ["domain/x/accuracy", "domain/x/y/accuracy", "a.b", "axb", "domain/z/accuracy/no"]
    assert panel.matching(keys) == ["domain/x/accuracy", "a.b"]
    assert [key for key in keys if re.search(panel.pattern, key)] == ["domain/x/accuracy", "a.b"]


def test_the_command_writes_json_and_tells_mistakes_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    file = tmp_path / "view.json"
    assert main(["project=mine", "stage=sft", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["project"] == "mine" and capsys.readouterr().out == f"{file}\n"
    for arguments, reason in [
        ([], "needs your key in WANDB_API_KEY"),
        (["stage=grop", "--json", str(file)], "stage=grop is none: did you mean"),
        (["projet=x"], "unknown setting projet=x"),
        (["--json"], "--json needs a file"),
    ]:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err
    monkeypatch.setenv("WANDB_API_KEY", "short")  # refused by its length before any request is made
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["entity=team"]) == 2
    assert "W&B did not take the workspace" in capsys.readouterr().err


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'winnow\[dashboards\]'"):
        workspace("", "winnow")
