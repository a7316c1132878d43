"""A recipe: stages that start from one another, as YAML -> the runs to make, each with its command line.

    title: what it is for                     # optional
    required: [init_from]                     # optional: settings that the command line must give
    all: [data.source=stdlib, ...]            # optional: settings of every stage
    ranks: 2                                  # optional: processes of a stage that has no number of its own (1)
    stages:
      - {name: base, stage: pretrain, overrides: [train.steps=400]}
      - {name: dense, stage: pretrain, from: base, repeat: {seeds: [0, 1, 2]}, ranks: 1}
      - {name: dense_eval, stage: evaluate, from: dense, gate: [...]}     # optional: what must hold, launch/gates.py
    parity: {control: dense_eval, sparse: dsa_eval}     # optional: two evaluations to compare, launch/parity.py

A stage that starts from a repeated one runs once for each of its seeds; only `repeat` itself sets `train.seed`, so
evaluations of three seeds read the same held-out tokens. Settings: `all`, then the stage's, then the command line's;
the last one of a key holds. Everything that can be wrong is told before anything runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from conf.errors import UserError, nearest
from conf.load import CONFIG_DIR, Loaded, load
from conf.schema import STAGES, ModelConfig, RunConfig
from conf.validate import violations
from launch.gates import Gate, read_gates, wrong_links

RECIPES = CONFIG_DIR / "recipes"
KEYS = ("title", "required", "all", "ranks", "stages", "parity")
STAGE_KEYS = ("name", "stage", "from", "overrides", "repeat", "ranks", "gate")
OWN = ("output_dir", "stage")  # the pipeline sets them; `init_from` too where a stage has `from`


@dataclass(frozen=True)
class Step:
    """A stage of the recipe as it stands there."""

    name: str
    stage: str
    start: str | None = None  # `from`
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    ranks: int | None = None
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Parity:
    """The two evaluations that are compared, by the names of their stages."""

    control: str
    sparse: str


@dataclass(frozen=True)
class Recipe:
    """What the file says."""

    steps: tuple[Step, ...]
    title: str = ""
    required: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    parity: Parity | None = None


@dataclass(frozen=True)
class Run:
    """One run to make: `name` is its folder, `step` the stage of the recipe, `start` the run that it starts from."""

    name: str
    step: str
    stage: str
    folder: Path
    ranks: int
    seed: int | None = None
    start: str | None = None
    settings: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()  # `of` is a run

    @property
    def arguments(self) -> list[str]:
        """Of launch/stage.py."""
        return [f"+stage={self.stage}", *self.settings, f"output_dir={self.folder}"]

    def command(self, entry: str = "launch/stage.py", launch: str = "") -> str:
        """The line that repeats it by hand. `launch`: what starts a stage, in place of torchrun here."""
        if launch:
            return f"{launch} {shlex.join(self.arguments)}"
        launcher = f"torchrun --standalone --nproc-per-node {self.ranks}" if self.ranks > 1 else "python"
        return f"{launcher} {entry} {shlex.join(self.arguments)}"


def find_recipe(given: str) -> Path:
    """A path, or the name of a file under conf/recipes."""
    for path in (Path(given), RECIPES / f"{given}.yaml"):
        if path.is_file():
            return path
    raise UserError(
        f"there is no recipe {given}: {nearest(given, sorted(path.stem for path in RECIPES.glob('*.yaml')))}"
    )


def read_recipe(path: Path) -> Recipe:
    """The file's content. UserError with a line for every mistake of form."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    form = _Form(str(path))
    recipe = form.recipe(values)
    if form.wrong:
        raise UserError("\n".join(dict.fromkeys(form.wrong)))
    return recipe


@dataclass
class _Form:
    """Reads values of YAML and keeps what is wrong with them, so that all of it is told at once."""

    where: str
    wrong: list[str] = field(default_factory=list)

    def recipe(self, values: Any) -> Recipe:
        values = self.mapping(values, self.where, KEYS)
        listed = values.get("stages")
        if not isinstance(listed, list) or not listed:
            self.wrong.append(f"{self.where}: stages must be a list of at least one stage")
            listed = []
        steps = tuple(self.step(entry, f"{self.where}: stage {i}") for i, entry in enumerate(listed, 1))
        parity = values.get("parity")
        if parity is not None:
            given = self.mapping(parity, f"{self.where}: parity", ("control", "sparse"))
            parity = Parity(str(given.get("control")), str(given.get("sparse")))
        return Recipe(
            steps,
            title=str(values.get("title", "")),
            required=self.strings(values.get("required"), f"{self.where}: required"),
            overrides=self.settings(values.get("all"), f"{self.where}: all"),
            ranks=self.ranks(values.get("ranks"), self.where) or 1,
            parity=parity,
        )

    def step(self, entry: Any, where: str) -> Step:
        values = self.mapping(entry, where, STAGE_KEYS)
        name, stage, start = (values.get(key) for key in ("name", "stage", "from"))
        if not isinstance(name, str) or not name.replace("_", "a").replace("-", "a").isalnum():
            self.wrong.append(f"{where}: name={name!r} must be letters, digits, - and _: it becomes a folder")
        else:
            where = f"{self.where}: stage {name}"
        if stage not in STAGES:
            self.wrong.append(f"{where}: there is no stage {stage!r}: {nearest(str(stage), STAGES)}")
        repeat = self.mapping(values.get("repeat", {}), f"{where}: repeat", ("seeds",))
        seeds = repeat.get("seeds", [])
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not whole or len(set(seeds)) < len(seeds) or ("repeat" in values and not seeds):
            self.wrong.append(f"{where}: repeat is {{seeds: [0, 1, 2]}}, each whole number once, not {repeat}")
            seeds = []
        return Step(
            str(name),
            str(stage),
            None if start is None else str(start),
            self.settings(values.get("overrides"), f"{where}: overrides"),
            tuple(seeds),
            self.ranks(values.get("ranks"), where),
            read_gates(values.get("gate"), f"{where}: gate", None if start is None else str(start), self.wrong),
        )

    def mapping(self, values: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
        if not isinstance(values, dict):
            self.wrong.append(f"{where} must be a mapping of {', '.join(keys)}, not {values!r}")
            return {}
        unknown = [key for key in values if key not in keys]
        self.wrong += [f"{where}: unknown key {key}: {nearest(str(key), keys)}" for key in unknown]
        return values

    def strings(self, values: Any, where: str) -> tuple[str, ...]:
        if values is None:
            return ()
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self.wrong.append(f"{where} must be a list of strings (put quotes round one with a colon and a space)")
            return ()
        return tuple(values)

    def settings(self, values: Any, where: str) -> tuple[str, ...]:
        found = self.strings(values, where)
        self.wrong += [
            f"{where}: {key} is the pipeline's own, leave it out" for key in map(key_of, found) if key in OWN
        ]
        return found

    def ranks(self, value: Any, where: str) -> int | None:
        if value is not None and (type(value) is not int or value < 1):
            self.wrong.append(f"{where}: ranks={value!r} must be a whole number from 1")
            return None
        return value


def key_of(setting: str) -> str:
    return setting.partition("=")[0].lstrip("+~").strip()


def merged(*layers: Sequence[str]) -> tuple[str, ...]:
    """Settings in order of first mention; of a key the last one holds."""
    last = {key_of(setting): setting for layer in layers for setting in layer}
    return tuple(last.values())


def plan(recipe: Recipe, out: Path, overrides: Sequence[str] = (), ranks: int | None = None) -> list[Run]:
    """The runs in order, every one composed and checked. `overrides` are the command line's, `ranks` likewise.

    UserError with a line for every mistake.
    """
    own = [f"{key_of(one)} is the pipeline's own: give --dir" for one in overrides if key_of(one) in OWN]
    given = {key_of(one) for one in overrides}
    missing = [
        f"this recipe needs {key}=...: add it to the command line" for key in recipe.required if key not in given
    ]
    wrong = [*own, *missing] or [*_wrong_links(recipe, given)]
    if wrong:
        raise UserError("\n".join(wrong))
    runs: list[Run] = []
    seeds: dict[str, tuple[int, ...]] = {}
    for step in recipe.steps:
        inherited = seeds.get(step.start or "", ())
        seeds[step.name] = step.seeds or inherited
        for seed in seeds[step.name] or (None,):
            run = _run(recipe, step, out, overrides, ranks, seed, bool(inherited))
            gates = [replace(g, of=f"{g.of}_seed{seed}") if seeds[g.of] else g for g in step.gates]
            runs.append(replace(run, gates=tuple(gates)))
    _check_configs(runs)
    return runs


def _run(
    recipe: Recipe,
    step: Step,
    out: Path,
    overrides: Sequence[str],
    ranks: int | None,
    seed: int | None,
    inherited: bool,
) -> Run:
    def named(name: str, repeats: bool) -> str:
        return f"{name}_seed{seed}" if repeats else name

    settings = merged(recipe.overrides, step.overrides, overrides)
    start = None
    if step.start is not None:
        start = named(step.start, inherited)
        settings = merged([one for one in settings if key_of(one) != "init_from"], [f"init_from={out / start}"])
    if step.seeds:
        settings = merged(settings, [f"train.seed={seed}"])
    name = named(step.name, seed is not None)
    processes = ranks or step.ranks or recipe.ranks
    return Run(name, step.name, step.stage, out / name, processes, seed, start, settings)


def _wrong_links(recipe: Recipe, given: set[str]) -> Iterator[str]:
    """Names given twice, stages that start from what is not there or comes later (a circle always does), seeds that do
    not fit."""
    names = [step.name for step in recipe.steps]
    seeds: dict[str, tuple[int, ...]] = {}
    for i, step in enumerate(recipe.steps):
        if step.name in seeds:
            yield f"two stages are named {step.name}: give each a name of its own"
        if step.start == step.name:
            yield f"stage {step.name} starts from itself: name an earlier one"
        elif step.start in names[i:] and step.start not in seeds:
            yield f"stage {step.name} starts from {step.start}, which comes later: it must come before"
        elif step.start is not None and step.start not in seeds:
            yield f"stage {step.name} starts from {step.start!r}, which is no stage: {nearest(step.start, names)}"
        before = seeds.get(step.start or "", ())
        if before and step.seeds and step.seeds != before:
            yield f"stage {step.name} repeats seeds {list(step.seeds)} and {step.start} {list(before)}: give the same"
        if step.start is not None and any(key_of(one) == "init_from" for one in step.overrides):
            yield f"stage {step.name} has `from` and init_from both: leave one out"
        elif step.start is None and step.stage != "pretrain" and "init_from" not in given:
            if all(key_of(one) != "init_from" for one in (*recipe.overrides, *step.overrides)):
                yield f"stage {step.name} starts from nothing: give it `from`, or init_from=PATH on the command line"
        seeds[step.name] = step.seeds or before
    if recipe.parity is not None:
        stages = {step.name: step.stage for step in recipe.steps}
        for name in (recipe.parity.control, recipe.parity.sparse):
            if stages.get(name) != "evaluate":
                yield f"parity names {name}, which is no stage of kind evaluate in this recipe"
        control, sparse = (seeds.get(name, ()) for name in (recipe.parity.control, recipe.parity.sparse))
        if control != sparse:
            yield f"parity compares seeds {list(control)} with {list(sparse)}: both need the same"
    yield from wrong_links(recipe.steps, seeds)
    expanded: dict[str, str] = {}
    for step in recipe.steps:
        for seed in seeds[step.name] or (None,):
            folder = step.name if seed is None else f"{step.name}_seed{seed}"
            if expanded.setdefault(folder, step.name) != step.name:
                yield f"stages {expanded[folder]} and {step.name} would both be {folder}: rename one"


def _check_configs(runs: Sequence[Run]) -> None:
    """Composes every stage and holds it against the rules, with the model of what it starts from; of a repeated one the
    first run, from which the others differ in the seed alone."""
    from train.stages import STAGES as DECLARED
    from train.stages import resolve_rates

    steps = {run.name: run.step for run in runs}
    models: dict[str, ModelConfig] = {}
    configs: dict[str, RunConfig] = {}
    wrong: list[str] = []
    for run in runs:
        if run.step in models:
            continue
        before = models.get(steps[run.start]) if run.start is not None else None
        try:
            loaded = load(run.arguments)
            model = models[run.step] = resolved_model(loaded, before)
            config = configs[run.step] = replace(loaded.config, model=model)
            resolve_rates(DECLARED[run.stage], config.optim, model.hidden_size)
            wrong += [f"stage {run.step}: {line}" for line in violations(config, run.ranks)]
        except UserError as error:
            wrong += [f"stage {run.step}: {line}" for line in str(error).splitlines()]
            models.setdefault(run.step, before or ModelConfig())
    for run in runs:
        for gate in run.gates:
            judged = configs.get(steps[gate.of])
            misfits = gate.misfits(judged) if judged is not None else ()
            wrong += [f"stage {run.step}: gate: {gate.rule} of {steps[gate.of]}: {line}" for line in misfits]
    wrong = list(dict.fromkeys(wrong))  # seeds of a stage have the same
    if wrong:
        raise UserError("\n".join(wrong))


def resolved_model(loaded: Loaded, start: ModelConfig | None) -> ModelConfig:
    """The architecture that the run will have. `start`: of the run that it starts from; None where it has none here."""
    from train.start import MAY_DIFFER, checkpoint_model, weights_folder

    config = loaded.config
    if start is None:
        if config.init_from is None:
            return config.model
        return checkpoint_model(weights_folder(config.init_from), config.model, loaded.overrides)
    own = {key: getattr(config.model, key) for key in MAY_DIFFER if f"model.{key}" in loaded.overrides}
    return replace(start, **own)
