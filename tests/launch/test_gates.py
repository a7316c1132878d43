"""Gates: what each rule finds in the files of a run, what is refused in a recipe, and what a pipeline does at a gate.

A script that leaves what a stage leaves stands in for launch/stage.py: its KL captured rises as 1 - exp(-step / 50),
and sparse attention loses what a file beside the runs says. Real stages: test_whole_recipe.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.errors import UserError
from launch import pipeline, recipe, runner
from launch.gates import AtLeast, Parity, Settled

FAKE = """
import json, math, sys
from pathlib import Path
given = dict(arg.lstrip("+").split("=", 1) for arg in sys.argv[1:])
out, steps = Path(given["output_dir"]), int(given.get("train.steps", 100))
(out / "hf").mkdir(parents=True, exist_ok=True)
with open(out.parent / "calls", "a") as calls:
    calls.write(f"{out.name}:{steps}\\n")
(out / "metrics.jsonl").write_text("".join(
    json.dumps({"step": s, "indexer/kl_captured": 1 - math.exp(-s / 50), "indexer/recall_of_oracle": 0.9}) + "\\n"
    for s in range(1, steps + 1)
))
if given["stage"] == "evaluate":
    lost = float((out.parent / "lost").read_text())
    row = {"from": 1, "to": 64, "difference": lost, "low_all": lost - 0.001, "high_all": lost + 0.001}
    (out / "evaluation.json").write_text(json.dumps({"loss_by_position": [row], "indexer/recall_of_oracle": 0.9}))
else:
    (out / "hf/config.json").write_text("{}")
"""
SMALL = ["data.source=synthetic", "data.tokenizer=bytes", "data.seq_len=64", "tracker=none", "train.log_every=1"]
SETTLED = {"rise": 0.05, "window": 20, "more": 20, "max_steps": 200}
CONSTANT = ["optim.schedule=constant", "train.steps=40"]
PARITY = {"of": "adapted_eval", "margin": 0.01}


def stages(**gates: object) -> list[dict[str, Any]]:
    """base, warmup, adapted, adapted_eval, rl; a stage's gate by its name."""
    found: list[dict[str, Any]] = [
        {"name": "base", "stage": "pretrain", "overrides": ["model.vocab_size=256", "model.num_hidden_layers=2"]},
        {"name": "warmup", "stage": "dense_warmup", "from": "base", "overrides": CONSTANT},
        {"name": "adapted", "stage": "sparse_adapt", "from": "warmup"},
        {"name": "adapted_eval", "stage": "evaluate", "from": "adapted"},
        {"name": "rl", "stage": "grpo", "from": "adapted"},
    ]
    return [stage | ({"gate": gates[stage["name"]]} if stage["name"] in gates else {}) for stage in found]


def write(folder: Path, listed: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"all": SMALL, "stages": listed}))
    return str(path)


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lost").write_text("0.002")
    monkeypatch.setattr(runner, "STAGE", tmp_path / "fake.py")
    monkeypatch.setattr(runner, "launcher", lambda ranks: [])
    return tmp_path


def run(folder: Path, listed: object, *more: str) -> int:
    return pipeline.main([write(folder, listed), "--dir", str(folder / "out"), *more])


def calls(folder: Path) -> list[str]:
    path = folder / "out" / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def state(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "out" / "pipeline.json").read_text())["stages"]


# What a rule finds


def curve(folder: Path, values: list[float | None], every: int = 1) -> Path:
    rows = [{"step": every * (i + 1), "indexer/kl_captured": value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_settled_compares_two_windows(tmp_path: Path) -> None:
    gate = Settled(rise=0.01, window=4, more=6, max_steps=12)
    flat, rising = [0.5, 0.5, 0.5, 0.5], [0.5, 0.52, 0.52, 0.54]  # 0.02 above on the mean
    found = gate.judge(curve(tmp_path, flat + flat))
    assert found.holds and "rose by 0 over the last 4 steps, to 0.5 at step 8: less than rise=0.01" in found.line
    found = gate.judge(curve(tmp_path, flat + rising))
    assert (found.holds, found.steps) == (False, 12) and "rose by 0.02 " in found.line, "max_steps caps 8 + 6"
    found = gate.judge(curve(tmp_path, flat + flat + rising))
    assert (found.holds, found.steps) == (False, None) and "max_steps=12 is reached: raise either" in found.line
    assert gate.judge(curve(tmp_path, rising[::-1] + flat)).holds, "falling is not rising"


def test_settled_wants_whole_windows_and_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    gate = Settled(rise=0.01, window=4, more=2, max_steps=12)
    found = gate.judge(curve(tmp_path, [0.5] * 7))
    assert (found.holds, found.steps) == (False, 9) and "7 steps are no two windows of 4" in found.line
    assert gate.judge(curve(tmp_path, [0.5, None, 0.5, 0.5, 0.5, None, None, 0.5])).holds
    assert not gate.judge(curve(tmp_path, [0.5, 0.5, 0.6, 0.6], every=2)).holds, "windows are of steps, not of rows"
    found = gate.judge(curve(tmp_path, [0.5] * 6 + [None] * 6))
    assert (found.holds, found.steps) == (False, None), "no numbers in the last window, and it ends"
    with pytest.raises(UserError, match="has logged no indexer/mass_recall"):
        Settled(0.01, 4, 2, 12, metric="indexer/mass_recall").judge(tmp_path)


def test_at_least_reads_a_mean_of_the_last_steps_or_an_evaluation(tmp_path: Path) -> None:
    curve(tmp_path, [0.0, 0.8, 1.0])
    key = "indexer/kl_captured"
    assert AtLeast(key, 1.0).judge(tmp_path).holds
    found = AtLeast(key, 0.95, window=2).judge(tmp_path)
    assert not found.holds and found.line.startswith(f"{key}=0.9 is below bound=0.95: train it for longer")
    assert AtLeast(key, 0.9, window=2).judge(tmp_path).holds and not AtLeast(key, 0.9, window=3).judge(tmp_path).holds
    (tmp_path / "evaluation.json").write_text(json.dumps({key: 0.3}))
    assert not AtLeast(key, 0.31).judge(tmp_path).holds and AtLeast(key, 0.3).judge(tmp_path).holds


def test_parity_is_the_verdict_of_every_length(tmp_path: Path) -> None:
    def rows(*found: tuple[float, float]) -> None:
        listed = [
            {"from": 1 + 64 * i, "to": 64 * (i + 1), "difference": (low + high) / 2, "low_all": low, "high_all": high}
            for i, (low, high) in enumerate(found)
        ]
        (tmp_path / "evaluation.json").write_text(json.dumps({"loss_by_position": listed}))

    rows((-0.001, 0.005), (0.0, 0.009))
    assert Parity(0.01).judge(tmp_path).holds and not Parity(0.008).judge(tmp_path).holds
    rows((-0.001, 0.005), (0.02, 0.03))
    found = Parity(0.01).judge(tmp_path)
    assert not found.holds and "departs from dense attention at 65 tokens" in found.line and "Adapt" in found.line
    assert Parity(0.01, up_to=64).judge(tmp_path).holds
    rows((-0.001, 0.02))
    found = Parity(0.01).judge(tmp_path)
    assert not found.holds and "too few sequences" in found.line and "Evaluate more sequences" in found.line
    assert Parity(0.01, undecided="pass").judge(tmp_path).holds
    rows()
    with pytest.raises(UserError, match="no loss_by_position"):
        Parity(0.01).judge(tmp_path)


# What is refused before anything runs


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({"adapted": [{"setled": SETTLED}]}, "stage adapted: gate: there is no rule setled: did you mean settled?"),
        ({"adapted": {"settled": SETTLED}}, "stage adapted: gate must be a list of rules such as"),
        ({"adapted": [{"settled": SETTLED | {"windw": 1}}]}, "settled: unknown key windw: did you mean window?"),
        ({"adapted": [{"settled": {"rise": 0.1, "window": 20, "more": 2}}]}, "settled: max_steps is missing: give it"),
        ({"adapted": [{"settled": SETTLED | {"rise": "low"}}]}, "settled: rise='low' must be a number"),
        ({"adapted": [{"settled": SETTLED | {"more": 0}}]}, "settled: more=0 must be a whole number from 1"),
        ({"adapted": [{"settled": 3}]}, "settled must be a mapping of rise, window, more, max_steps, metric, of"),
        ({"adapted": [{"settled": SETTLED | {"window": 1}}]}, "window=1 holds too few rows of train.log_every=1"),
        (
            {"adapted": [{"settled": SETTLED | {"max_steps": 39}}]},
            "max_steps=39 is too few: two windows and train.steps",
        ),
        ({"warmup": [{"settled": SETTLED}]}, "base, which is of kind pretrain, which logs nothing"),
        (
            {"adapted": [{"at_least": {"metric": "indexer/recal_of_oracle", "bound": 1}}]},
            "logs no indexer/recal_of_oracle that a gate judges: did you mean indexer/recall_of_oracle?",
        ),
        ({"adapted": [{"at_least": {"metric": "loss/indexer_kl", "bound": 1}}]}, "logs no loss/indexer_kl that a gate"),
        ({"rl": [{"parity": {"margin": 0.01}}]}, "judges adapted, which is of kind sparse_adapt, parity judges an"),
        (
            {"rl": [{"parity": PARITY | {"of": "adapted_evil"}}]},
            "'adapted_evil', which is no stage: did you mean adapted",
        ),
        ({"adapted": [{"parity": PARITY}]}, "judges adapted_eval, which must come before it"),
        ({"rl": [{"parity": PARITY | {"undecided": "go"}}]}, "parity: undecided=go must be stop or pass"),
        ({"base": [{"parity": {"margin": 0.01}}]}, "name the stage to judge with `of`, this one starts from none"),
        (
            {"rl": [{"settled": SETTLED | {"of": "warmup"}}]},
            "settled lets warmup go on after adapted has started from it: move the gate to adapted",
        ),
    ],
)
def test_a_wrong_gate_is_one_line(
    gates: dict[str, object], words: str, faked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(faked, stages(**gates)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not calls(faked)


def test_a_gate_that_moves_the_end_wants_a_constant_rate(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(faked, stages(adapted=[{"settled": SETTLED}]), "optim.schedule=cosine") == 2
    assert (
        "stage adapted: gate: settled of warmup: optim.schedule=cosine ends at train.steps" in capsys.readouterr().err
    )


def test_parity_wants_losses_by_position(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(faked, stages(rl=[{"parity": PARITY}]), "eval.by_position=false") == 2
    assert "gate: parity of adapted_eval: eval.by_position=false leaves nothing to judge" in capsys.readouterr().err


def test_seeds_must_fit_and_each_run_is_judged_by_its_own(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = stages(adapted=[{"settled": SETTLED}], rl=[])
    listed[1]["repeat"] = {"seeds": [1, 2]}
    runs = recipe.plan(recipe.read_recipe(Path(write(faked, listed))), Path("out"))
    assert [gate.of for each in runs for gate in each.gates if each.step == "adapted"] == [
        "warmup_seed1",
        "warmup_seed2",
    ]
    listed[4] |= {"from": "base", "gate": [{"settled": SETTLED | {"of": "warmup"}}]}
    assert run(faked, listed) == 2
    assert "judges warmup, which has seeds [1, 2]: give this stage the same" in capsys.readouterr().err


# What the pipeline does


def settles_at(start: int = 40, more: int = 20, window: int = 20, rise: float = 0.05) -> int:
    """Steps of the fake's curve, by brute force."""
    steps = start
    while True:
        value = [1 - math.exp(-s / 50) for s in range(1, steps + 1)]
        if sum(value[-window:]) / window - sum(value[-2 * window : -window]) / window < rise:
            return steps
        steps += more


def test_the_stage_before_goes_on_in_slices_until_it_settles(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed, end = stages(adapted=[{"settled": SETTLED}]), settles_at()
    assert run(faked, listed) == 0
    slices = [f"warmup:{steps}" for steps in range(40, end + 1, 20)]
    assert len(slices) > 3 and calls(faked) == ["base:100", *slices, "adapted:100", "adapted_eval:100", "rl:100"]
    told = capsys.readouterr().out
    assert (
        "[3/5 adapted] gate settled of warmup: indexer/kl_captured rose by" in told and f"at step {end}: less" in told
    )
    entry = state(faked)["warmup"]
    assert entry["steps"] == end and f"train.steps={end}" in entry["command"] and entry["status"] == "done"
    assert run(faked, listed) == 0 and calls(faked) == [], "started again, nothing is made anew"


def test_a_warm_up_that_goes_on_rising_stops_the_recipe_which_goes_on_from_there(
    faked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(faked, stages(adapted=[{"settled": SETTLED | {"max_steps": 70}}])) == 3
    assert calls(faked) == ["base:100", "warmup:40", "warmup:60", "warmup:70"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipeline: adapted does not begin, gate settled of warmup: indexer/kl_captured rose by")
    assert line.endswith("not less than rise=0.05, and max_steps=70 is reached: raise either in the recipe")
    entry = state(faked)["adapted"]
    assert (entry["status"], entry["exit_code"]) == ("held", 3) and "max_steps=70" in entry["gate"]
    assert run(faked, stages(adapted=[{"settled": SETTLED | {"max_steps": 70, "rise": 0.5}}])) == 0
    assert calls(faked) == ["adapted:100", "adapted_eval:100", "rl:100"], "warm-up keeps its 70 steps"


def test_what_stops_a_slice_stops_the_pipeline_and_it_goes_on_there(
    faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = runner.Runner.run

    def stopped(self: runner.Runner, arguments: list[str], ranks: int = 1) -> runner.Ended:
        if "train.steps=60" in arguments:
            return runner.Ended(143, 1.0)
        return played(self, arguments, ranks)

    listed = stages(adapted=[{"settled": SETTLED}])
    with monkeypatch.context() as patched:
        patched.setattr(runner.Runner, "run", stopped)
        assert run(faked, listed) == 143
    assert state(faked)["warmup"]["status"] == "preempted" and state(faked)["warmup"]["steps"] == 60
    assert calls(faked) == ["base:100", "warmup:40"]
    assert run(faked, listed) == 0
    assert calls(faked)[:2] == ["warmup:60", "warmup:80"]


def test_rl_waits_for_parity(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = stages(rl=[{"parity": PARITY}])
    (faked / "out" / "lost").write_text("0.5")
    assert run(faked, listed) == 3
    assert calls(faked)[-1] == "adapted_eval:100" and state(faked)["rl"]["status"] == "held"
    assert "gate parity of adapted_eval: Sparse attention departs from dense" in capsys.readouterr().err
    assert run(faked, listed) == 3 and calls(faked) == [], "still closed, and nothing is made anew"
    assert run(faked, stages(rl=[{"parity": PARITY | {"margin": 0.6}}])) == 0 and calls(faked) == ["rl:100"]


def test_recall_must_be_enough(faked: Path) -> None:
    rule = {"metric": "indexer/recall_of_oracle", "bound": 0.91}
    assert run(faked, stages(adapted=[{"at_least": rule}])) == 3
    assert run(faked, stages(adapted=[{"at_least": rule | {"bound": 0.9}}])) == 0


def test_only_lets_nothing_else_go_on(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = stages(adapted=[{"settled": SETTLED}])
    assert run(faked, listed, "--only", "base", "--only", "warmup") == 0
    assert run(faked, listed, "--only", "adapted") == 3
    assert calls(faked) == ["base:100", "warmup:40"]
    assert "; without --only warmup would go on" in capsys.readouterr().err


def test_only_wants_what_its_gate_judges(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = stages(rl=[{"parity": PARITY}])
    assert run(faked, listed, "--only", "base", "--only", "warmup", "--only", "adapted") == 0
    assert run(faked, listed, "--only", "rl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--only rl: its gate judges adapted_eval, which has not finished: run that first"
    assert run(faked, listed, "--only", "rl", "--only", "adapted_eval") == 0, "both in one command"


def test_more_steps_in_the_recipe_win_over_those_of_a_gate(faked: Path) -> None:
    listed = stages(adapted=[{"settled": SETTLED}])
    assert run(faked, listed, "--only", "base", "--only", "warmup") == 0
    assert run(faked, listed, "--only", "base", "--only", "warmup", "train.steps=300") == 2, "past max_steps"
    listed[2]["gate"] = [{"settled": SETTLED | {"max_steps": 400}}]
    assert run(faked, listed, "--only", "warmup", "train.steps=300") == 0
    assert calls(faked) == ["base:100", "warmup:40", "warmup:300"]


def test_dry_run_shows_the_gates(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(faked, stages(adapted=[{"settled": SETTLED}]), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = (
        "[adapted] gate settled of warmup: rise=0.05, window=20, more=20, max_steps=200, metric=indexer/kl_captured"
    )
    assert wanted in lines and not calls(faked)
