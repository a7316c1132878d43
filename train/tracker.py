"""Weights & Biases, or nothing, behind one small interface; only W&B's public API (init, log, Table, finish).

Without WANDB_API_KEY a run is written offline under `output_dir/wandb/` (no prompt, no network; `wandb sync` uploads it
later). Nothing is printed: the caller shows `tracker.where` if it likes. The run's id lies in `wandb/run_id`, so a
resumed run continues the same one. `wandb` is imported where a run starts, so `tracker=none` does not need it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from conf.convert import redact
from conf.errors import UserError
from conf.schema import TrackerConfig


class Tracker:
    """The null object: `tracker=none`, and every rank but the first."""

    where = "no tracker"

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Records one metrics row (key -> finite number or None). `step` never goes back."""

    def alert(self, title: str, text: str, level: str = "warn") -> None:
        """Tells whoever follows the run (W&B: a mail or a message, as its user has set it). `level`: warn | error."""

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds rows to the table `name`, which has a leading column `step`; its columns stay as first given.

        All rows of a run are kept in memory until it ends: past `tracker.table_rows` none is added, and of texts longer
        than `tracker.table_chars` the middle is left out. `table_due` spreads them over the run.
        """

    def restore_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """What earlier attempts of the run logged, `step` first in each row; read only where it would be lost."""

    def finish(self, exit_code: int = 0) -> None:
        """Writes out what is pending; `exit_code` other than 0 marks the run as failed."""


class WandbTracker(Tracker):
    """A W&B run. Raises UserError where W&B refuses the key or cannot be reached."""

    def __init__(self, cfg: TrackerConfig, output_dir: Path, config: Mapping[str, Any], resume: bool) -> None:
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY"))
        # WANDB_MODE may keep a run offline or disabled though there is a key, never the other way round.
        asked = os.environ.get("WANDB_MODE", "online")
        mode = asked if asked in ("disabled", "offline") else ("online" if online else "offline")
        folder = output_dir.absolute() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",  # stdout stays untouched
            disable_code=True,
            disable_git=True,  # a remote's URL may hold a token
            x_disable_meta=True,  # so may the command line
        )
        try:
            self._run = wandb.init(
                project=cfg.project,
                name=cfg.run_name or output_dir.name,
                dir=str(output_dir.absolute()),
                id=_run_id(folder / "run_id", resume),
                resume="allow" if resume and mode == "online" else None,  # offline there is no server to ask
                mode=mode,  # type: ignore[arg-type]
                config=redact(dict(config)),
                settings=settings,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            fix = "check WANDB_API_KEY, or set WANDB_MODE=offline or tracker=none"
            raise UserError(f"W&B did not start: {reason}; {fix}") from error
        self._wandb = wandb
        self._tables: dict[str, Any] = {}
        self._offline = mode == "offline"
        self._table_rows, self._table_chars = cfg.table_rows, cfg.table_chars
        self.where = str(self._run.url) if mode == "online" else f"W&B {mode}, in {folder}"

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        # A resumed run repeats the steps after its checkpoint; W&B keeps the first, which a bit-equal resume repeats.
        self._run.log({key: value for key, value in row.items() if value is not None and key != "step"}, step=step)

    def alert(self, title: str, text: str, level: str = "warn") -> None:
        self._run.alert(title=title, text=text, level=level.upper())

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not rows or step < self._run.starting_step:  # a resumed run repeats it, W&B has it
            return
        if self._fill(name, columns, ([step, *row] for row in rows)):
            self._run.log({name: self._tables[name]}, step=step)

    def restore_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        # W&B's server knows the increments that a resumed run goes on from. Offline nobody does: a new attempt's table
        # starts empty and would hide the rows before it, those of a killed attempt for good. So it takes them along.
        if self._offline:
            self._fill(name, columns, rows)

    def _fill(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """-> how many rows there was room for."""
        if name not in self._tables:
            # Incremental: each log uploads the new rows only and none replaces an earlier one.
            names: list[str | int] = ["step", *columns]
            self._tables[name] = self._wandb.Table(columns=names, log_mode="INCREMENTAL", allow_mixed_types=True)
        table = self._tables[name]
        before = len(table.data)
        for row in islice(rows, self._table_rows - before):
            assert len(row) == len(columns) + 1, f"table {name}: {len(row) - 1} values for {len(columns)} columns"
            # Cut after keys are taken out: half a key is none to `redact`, and still half of one.
            table.add_data(*(shortened(value, self._table_chars) for value in redact(list(row))))
        return len(table.data) - before

    def finish(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


def table_due(cfg: TrackerConfig, step: int, steps: int, most_rows: int) -> bool:
    """Whether the run's tables take rows of `step`: the first, the last, and every `table_every`-th; null there is as
    often as `table_rows` hold `most_rows` a step, for a run of `steps`."""
    every = cfg.table_every or max(1, -(-steps // max(1, cfg.table_rows // most_rows - 2)))
    return step in (1, steps) or step % every == 0


def shortened(value: Any, chars: int) -> Any:
    """A text with its middle left out where it is longer than `chars`; anything else as it is."""
    if not isinstance(value, str) or len(value) <= chars:
        return value
    head, tail = chars - chars // 3, chars // 3  # what was answered stands at the end
    return f"{value[:head]} … {len(value) - chars} characters … {value[len(value) - tail :]}"


def _run_id(path: Path, resume: bool) -> str:
    """The id of the run: the stored one where the run goes on, else a new one, stored whole or not at all."""
    if resume and path.exists():
        stored = path.read_text(encoding="utf-8").strip()
        if stored.isalnum():
            return stored
    fresh = secrets.token_hex(4)  # the same 8 characters as W&B's own; from the system, so no seed is touched
    partial = path.with_name(f".run_id.{os.getpid()}")
    partial.write_text(fresh + "\n", encoding="utf-8")
    partial.replace(path)
    return fresh


def make_tracker(
    cfg: TrackerConfig, output_dir: str | Path, run_config_dict: Mapping[str, Any], resume: bool, is_main: bool = True
) -> Tracker:
    """The tracker that `cfg.name` names (`wandb` or `none`); the null object on every rank but the main one.

    `run_config_dict` is the whole run as nested plain values; values of environment variables whose names look like
    keys are redacted from it. `resume` continues the run whose id `output_dir` holds.
    """
    kinds: dict[str, type[WandbTracker] | None] = {"wandb": WandbTracker, "none": None}
    if cfg.name not in kinds:
        raise UserError(f"tracker.name={cfg.name!r} is no tracker: valid are {', '.join(kinds)}")
    kind = kinds[cfg.name]
    return kind(cfg, Path(output_dir), run_config_dict, resume) if kind and is_main else Tracker()
