"""Gates of a recipe: what must hold of an earlier stage before the next one begins.

    gate:                                        # of a stage; all of its rules must hold
      - settled: {rise: 0.005, window: 100, more: 200, max_steps: 3000}      # the stage before goes on until this holds
      - at_least: {metric: indexer/recall_of_oracle, bound: 0.9}
      - parity: {of: adapted_eval, margin: 0.01}

`of` names the stage that is judged; by default the one that this stage starts from. `settled` compares the mean of a
metric over the last `window` steps with that over the window before: while it rises by `rise` or more, the run gets
`more` steps in its own folder, up to `max_steps`. `at_least` reads evaluation.json, or a training run's last `window`
steps. `parity` is the verdict of an evaluation (train/verdict.py): at every length sparse attention loses no more than
`margin` nats a token against dense. Metrics are those of launch/panels.py of which more is better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from conf.errors import UserError, nearest
from conf.schema import RunConfig
from launch.panels import PANELS
from launch.report_names import metric as known
from train.metrics import FILE_NAME, read_metrics
from train.verdict import loss_verdict, verdict

if TYPE_CHECKING:
    from launch.recipe import Step

CLOSED = 3  # exit status of a pipeline that a gate has stopped


@dataclass(frozen=True)
class Judged:
    """`line` says what was found and, where it does not hold, what to do; `steps`: train the judged run to there and
    judge again."""

    holds: bool
    line: str
    steps: int | None = None


@dataclass(frozen=True)
class Settled:
    rule: ClassVar[str] = "settled"
    rise: float
    window: int
    more: int
    max_steps: int
    metric: str = "indexer/kl_captured"
    of: str = ""

    def misfits(self, config: RunConfig) -> Iterable[str]:
        """What the judged stage's configuration makes impossible."""
        train = config.train
        if config.optim.schedule != "constant":
            yield f"optim.schedule={config.optim.schedule} ends at train.steps, which the gate moves: give constant"
        if self.window < 2 * train.log_every:
            yield f"window={self.window} holds too few rows of train.log_every={train.log_every}: two are the least"
        if self.max_steps < max(train.steps, 2 * self.window):
            least = max(train.steps, 2 * self.window)
            yield f"max_steps={self.max_steps} is too few: two windows and train.steps need {least}"

    def judge(self, folder: Path) -> Judged:
        last, rows = values(folder, self.metric)
        grown = min(last + self.more, self.max_steps) if last < self.max_steps else None
        after = [rows[step] for step in rows if last - self.window < step]
        before = [rows[step] for step in rows if last - 2 * self.window < step <= last - self.window]
        if not before or not after or last < 2 * self.window:
            return Judged(False, f"{last} steps are no two windows of {self.window}", grown)
        rise = mean(after) - mean(before)
        found = (
            f"{self.metric} rose by {rise:.4g} over the last {self.window} steps, to {mean(after):.4g} at step {last}"
        )
        if rise < self.rise:
            return Judged(True, f"{found}: less than rise={self.rise:g}")
        end = f"{found}, not less than rise={self.rise:g}"
        if grown is None:
            end += f", and max_steps={self.max_steps} is reached: raise either in the recipe"
        return Judged(False, end, grown)


@dataclass(frozen=True)
class AtLeast:
    rule: ClassVar[str] = "at_least"
    metric: str
    bound: float
    window: int = 1
    of: str = ""

    def misfits(self, config: RunConfig) -> Iterable[str]:
        return ()

    def judge(self, folder: Path) -> Judged:
        last, rows = values(folder, self.metric)
        found = mean([rows[step] for step in rows if last - self.window < step] or [rows[max(rows)]])
        if found >= self.bound:
            return Judged(True, f"{self.metric}={found:.4g} is at least {self.bound:g}")
        fix = "train it for longer (train.steps), or lower the bound in the recipe"
        return Judged(False, f"{self.metric}={found:.4g} is below bound={self.bound:g}: {fix}")


@dataclass(frozen=True)
class Parity:
    rule: ClassVar[str] = "parity"
    margin: float
    up_to: int = 0  # tokens of context that are judged; 0: all
    undecided: str = "stop"  # stop | pass: where too few sequences tell
    of: str = ""

    def misfits(self, config: RunConfig) -> Iterable[str]:
        if not config.eval.by_position:
            yield "eval.by_position=false leaves nothing to judge: leave it on"

    def judge(self, folder: Path) -> Judged:
        found = evaluation(folder).get("loss_by_position") or []
        rows = [row for row in found if not self.up_to or row["to"] <= self.up_to]
        if not rows:
            raise UserError(
                f"{folder}/evaluation.json has no loss_by_position to judge: evaluate with eval.by_position"
            )
        loss = loss_verdict(rows, self.margin)
        words = verdict({"loss_by_position": rows}, self.margin)["words"]
        if loss["departs_in"] or loss["not_finite_in"]:
            return Judged(False, f"{words} Adapt for longer, or widen the margin in the recipe")
        if loss["undecided_in"] and self.undecided == "stop":
            return Judged(False, f"{words} Evaluate more sequences in a new folder, or set undecided: pass")
        return Judged(True, words)


Gate = Settled | AtLeast | Parity
RULES: dict[str, type[Gate]] = {kind.rule: kind for kind in (Settled, AtLeast, Parity)}


def shown(gate: Gate) -> str:
    """On one line, for a person."""
    given = {spec.name: getattr(gate, spec.name) for spec in fields(gate)}
    return f"{gate.rule} of {given.pop('of')}: {', '.join(f'{key}={value}' for key, value in given.items())}"


def evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return found


def values(folder: Path, metric: str) -> tuple[int, dict[int, float]]:
    """(last logged step, step -> value); an evaluation's one value stands at step 0. UserError where there is none."""
    if (folder / "evaluation.json").is_file():
        rows: list[Mapping[str, Any]] = [{"step": 0, **evaluation(folder)}]
    else:
        rows = list(read_metrics(folder / FILE_NAME)[0])
    found = {row["step"]: float(row[metric]) for row in rows if row.get(metric) is not None}
    if not found:
        raise UserError(f"{folder} has logged no {metric}, which a gate of the recipe judges: name another metric")
    return rows[-1]["step"], found


def read_gates(given: Any, where: str, start: str | None, wrong: list[str]) -> tuple[Gate, ...]:
    """The value of `gate` in a recipe; appends what is wrong with it, a line each. `start`: the default of `of`."""
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(one, dict) and len(one) == 1 for one in given):
        wrong.append(
            f"{where} must be a list of rules such as `- at_least: {{metric: ..., bound: ...}}`, not {given!r}"
        )
        return ()
    found = [_read(rule, settings, where, start, wrong) for one in given for rule, settings in one.items()]
    return tuple(gate for gate in found if gate is not None)


def _read(rule: Any, given: Any, where: str, start: str | None, wrong: list[str]) -> Gate | None:
    kind = RULES.get(rule)
    if kind is None:
        wrong.append(f"{where}: there is no rule {rule}: {nearest(str(rule), RULES)}")
        return None
    hints = {spec.name: get_type_hints(kind)[spec.name] for spec in fields(kind)}
    if not isinstance(given, dict):
        wrong.append(f"{where}: {rule} must be a mapping of {', '.join(hints)}, not {given!r}")
        return None
    told = [f"{where}: {rule}: unknown key {key}: {nearest(str(key), hints)}" for key in given if key not in hints]
    told += [
        f"{where}: {rule}: {spec.name} is missing: give it"
        for spec in fields(kind)
        if spec.default is MISSING and spec.name not in given
    ]
    for key, hint in hints.items():
        if key not in given:
            continue
        value = given[key]
        fits = type(value) is hint or hint is float and type(value) is int
        if not fits or hint is int and value < (key != "up_to"):
            want = {int: "a whole number from 1", float: "a number", str: "a string"}[hint]
            told.append(f"{where}: {rule}: {key}={value!r} must be {want}")
    if given.get("undecided", "stop") not in ("stop", "pass"):
        told.append(f"{where}: {rule}: undecided={given['undecided']} must be stop or pass")
    if "of" not in given and start is None:
        told.append(f"{where}: {rule}: name the stage to judge with `of`, this one starts from none")
    wrong += told
    return None if told else replace(kind(**given), of=given.get("of") or start or "")


def wrong_kind(gate: Gate, stage: str) -> str | None:
    """Why the rule cannot judge a run of `stage`; None if it can."""
    if gate.rule == "parity":
        return None if stage == "evaluate" else f"is of kind {stage}, parity judges an evaluation"
    if gate.rule == "settled" and stage == "evaluate":
        return "is an evaluation, which has no steps to add"
    assert not isinstance(gate, Parity)
    keys = [key for panel in PANELS[stage] for key in panel.keys if known(key).better == "high"]
    fits = [key for key in keys if "*" not in key and not key.startswith(("perf/", "rollout/"))]
    if not fits:
        return f"is of kind {stage}, which logs nothing that a gate judges"
    return None if gate.metric in fits else f"logs no {gate.metric} that a gate judges: {nearest(gate.metric, fits)}"


def wrong_links(steps: Sequence[Step], seeds: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Of a recipe whose stages and `from` are right: gates on what is not there, comes later or is of another kind.
    `seeds`: of each stage, its own or inherited."""
    names = [step.name for step in steps]
    kinds = {step.name: step.stage for step in steps}
    for i, step in enumerate(steps):
        for gate in step.gates:
            said = f"stage {step.name}: gate: {gate.rule}"
            if gate.of not in names:
                yield f"{said} judges {gate.of!r}, which is no stage: {nearest(gate.of, names)}"
                continue
            if gate.of not in names[:i]:
                yield f"{said} judges {gate.of}, which must come before it"
                continue
            reason = wrong_kind(gate, kinds[gate.of])
            if reason is not None:
                yield f"{said} judges {gate.of}, which {reason}"
            if seeds[gate.of] and seeds[gate.of] != seeds[step.name]:
                yield f"{said} judges {gate.of}, which has seeds {list(seeds[gate.of])}: give this stage the same"
            early = [other.name for other in steps[:i] if other.start == gate.of]
            if gate.rule == "settled" and early:
                yield f"{said} lets {gate.of} go on after {early[0]} has started from it: move the gate to {early[0]}"
