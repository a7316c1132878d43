"""A W&B workspace for Winnow's runs, built by code: one section a stage, its panels in the order of launch/panels.py.

    python launch/workspace.py [entity=TEAM] [project=winnow] [stage=S] [name="Winnow"] [--json FILE]

Saves a new view of the project and prints its address; that needs WANDB_API_KEY, and `entity` where the key's owner
works in more than one team. `--json FILE` writes the view's specification instead, without key or network. `stage`
shows that stage's section and its runs alone. Needs the extra `dashboards`: pip install 'winnow[dashboards]'.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from conf.errors import UserError, nearest  # noqa: E402
from conf.schema import TrackerConfig  # noqa: E402
from launch.page_command import write_whole  # noqa: E402
from launch.panels import PANELS, TABLES, TITLES, Panel  # noqa: E402

SETTINGS = {"entity": "", "project": TrackerConfig().project, "stage": "", "name": ""}
COLUMNS = ["run:displayName", "config:stage.value", "run:state", "config:optim.value.lr", "config:data.value.seq_len"]
NEEDED = "the W&B workspace needs wandb-workspaces: pip install 'winnow[dashboards]'"


def workspace(entity: str, project: str, stage: str = "", name: str = "") -> Any:
    """-> `wandb_workspaces.workspaces.Workspace`, not saved anywhere; makes no request.

    Raises UserError where `stage` is none, or where the library is not installed.
    """
    if stage and stage not in PANELS:
        raise UserError(f"stage={stage} is none: {nearest(stage, list(PANELS))}")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise UserError(NEEDED) from error
    runs = ws.RunsetSettings(
        filters=expr.And(expr.Config("stage") == stage) if stage else "",
        pinned_columns=list(COLUMNS),
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name or ("Winnow" if not stage else f"Winnow: {TITLES[stage]}"),
        sections=[_section(one, is_open=True) for one in ([stage] if stage else PANELS)],
        settings=ws.WorkspaceSettings(x_axis="Step"),
        runset_settings=runs,
    )


def _section(stage: str, is_open: bool) -> Any:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    draw = _bars if stage == "evaluate" else _lines
    panels = [draw(panel) for panel in PANELS[stage]]
    panels += [wr.WeavePanelSummaryTable(table_name=name) for name in TABLES.get(stage, ())]
    rows = -(-len(panels) // 3)
    layout = ws.SectionLayoutSettings(columns=3, rows=min(rows, 4))
    return ws.Section(name=TITLES[stage], panels=panels, is_open=is_open, layout_settings=layout)


def _lines(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    what = {"metric_regex": panel.pattern} if panel.is_pattern else {"y": list(panel.keys)}
    return wr.LinePlot(
        title=panel.title,
        x="Step",
        title_y=panel.metric.unit or None,
        log_y=panel.metric.log or None,
        range_y=(0, None) if panel.metric.unit == "bytes" else (None, None),
        **what,
    )


def _bars(panel: Panel) -> Any:
    """An evaluation is one row: a bar for each run."""
    import wandb_workspaces.reports.v2 as wr

    if panel.is_pattern:  # bars know no patterns; a line of one point is a dot for each layer or domain
        return _lines(panel)
    return wr.BarPlot(title=panel.title, metrics=list(panel.keys), title_x=panel.metric.unit or None)


def specification(view: Any) -> dict[str, Any]:
    """What W&B would be sent, as plain values."""
    found = view._to_model().model_dump(by_alias=True, exclude_none=True)  # the library has no public way without W&B
    assert isinstance(found, dict)
    return found


def save(view: Any) -> str:
    """Saves a new view and returns its address. UserError without a key, or where W&B refuses."""
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            "saving a workspace needs your key in WANDB_API_KEY; without one, --json FILE writes what it would hold"
        )
    import wandb

    try:
        if not view.entity:
            view.entity = wandb.Api().default_entity or ""
        view.save_as_new_view()
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"W&B did not take the workspace ({reason}): check WANDB_API_KEY, entity=TEAM and project={view.project}"
        ) from error
    return str(view.url)


def parse(arguments: list[str]) -> tuple[dict[str, str], Path | None]:
    """-> (settings, file of --json)."""
    settings, file, rest = dict(SETTINGS), None, list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if word == "--json":
            if not rest:
                raise UserError("--json needs a file: --json workspace.json")
            file = Path(rest.pop(0))
        elif not equals or key not in settings:
            raise UserError(f"unknown setting {word}: {nearest(key, [*(f'{name}=' for name in settings), '--json'])}")
        else:
            settings[key] = value
    return settings, file


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        settings, file = parse(arguments)
        view = workspace(**settings)
        if file is None:
            print(save(view))
        else:
            print(write_whole(file, json.dumps(specification(view), indent=2) + "\n"))
    except UserError as error:
        print(f"workspace: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
