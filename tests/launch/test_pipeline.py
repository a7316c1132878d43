"""Recipes and the pipeline: what is refused before anything runs, order and commands, resuming, SIGTERM with a real
stage. Where no model is needed a script that only leaves what a finished stage leaves stands in for launch/stage.py."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conf.errors import UserError
from conf.load import load
from launch import pipeline, recipe, runner
from model.hf_config import write_config

FAKE = """
import json, os, sys
from pathlib import Path
given = dict(arg.lstrip("+").split("=", 1) for arg in sys.argv[1:])
out = Path(given["output_dir"])
(out / "hf").mkdir(parents=True, exist_ok=True)
with open(out.parent / "calls", "a") as calls:
    calls.write(out.name + "\\n")
if (out.parent / f"break_{out.name}").exists():
    (out / "error.txt").write_text("no\\n")
    sys.exit(2)
mark = out / ("evaluation.json" if given["stage"] == "evaluate" else "hf/config.json")
loss = 2.0 + 0.1 * int(given.get("init_from", "0")[-1].replace("e", "0"))
(out / "config.yaml").write_text("stage: evaluate\\noutput_dir: x\\n")
mark.write_text(json.dumps({"loss/lm_dense": loss, "loss/lm_sparse": loss + 0.01}))
"""
SMALL = [
    "data.source=synthetic",
    "data.tokenizer=bytes",
    "data.seq_len=64",
    "tracker=none",
]
STAGES = [
    {"name": "base", "stage": "pretrain", "overrides": ["model.vocab_size=256", "model.num_hidden_layers=2"]},
    {"name": "dense", "stage": "pretrain", "from": "base", "repeat": {"seeds": [1, 2]}},
    {"name": "dense_eval", "stage": "evaluate", "from": "dense"},
    {"name": "warmup", "stage": "dense_warmup", "from": "base", "repeat": {"seeds": [1, 2]}, "ranks": 2},
]
COMPARED = [*STAGES, {"name": "warmup_eval", "stage": "evaluate", "from": "warmup"}]


def write(folder: Path, stages: object = STAGES, **more: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"all": SMALL, "stages": stages} | more))
    return str(path)


def changed(position: int, **changes: object) -> list[dict]:
    return [stage | changes if i == position else stage for i, stage in enumerate(STAGES)]


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """launch/stage.py is the fake; the recipe's folder."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(runner, "STAGE", tmp_path / "fake.py")
    monkeypatch.setattr(runner, "launcher", lambda ranks: [])
    return tmp_path


def calls(out: Path) -> list[str]:
    path = out / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_runs_are_expanded_by_seed_and_every_command_composes(tmp_path: Path) -> None:
    found = recipe.plan(recipe.read_recipe(Path(write(tmp_path))), Path("out"), ["train.steps=7", "data.seq_len=128"])
    assert [run.name for run in found] == [
        "base", "dense_seed1", "dense_seed2", "dense_eval_seed1", "dense_eval_seed2",
        "warmup_seed1", "warmup_seed2",
    ]  # fmt: skip
    configs = {run.name: load(shlex.split(run.command())[2 if run.ranks == 1 else 5 :]).config for run in found}
    assert configs["dense_seed2"].train.seed == 2 and configs["dense_seed2"].init_from == "out/base"
    assert configs["dense_eval_seed2"].init_from == "out/dense_seed2"
    assert configs["dense_eval_seed1"].train.seed == configs["dense_eval_seed2"].train.seed == 0, "the same held-out"
    assert {config.train.steps for config in configs.values()} == {7}
    assert {config.data.seq_len for config in configs.values()} == {128}, "the command line has the last word"
    assert found[5].command().startswith("torchrun --standalone --nproc-per-node 2 launch/stage.py +stage=dense_warmup")
    assert {run.ranks for run in recipe.plan(recipe.read_recipe(tmp_path / "mine.yaml"), Path("o"), [], 4)} == {4}


def test_init_from_on_the_command_line_goes_to_what_starts_from_no_other(tmp_path: Path) -> None:
    found = recipe.read_recipe(Path(write(tmp_path, required=["init_from"])))
    with pytest.raises(UserError, match="this recipe needs init_from"):
        recipe.plan(found, Path("out"))
    with pytest.raises(UserError, match="init_from=/nowhere does not exist"):
        recipe.plan(found, Path("out"), ["init_from=/nowhere"])


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (changed(1, stage="densewarmup"), "stage dense: there is no stage 'densewarmup': did you mean dense_warmup?"),
        (changed(1, **{"from": "bass"}), "stage dense starts from 'bass', which is no stage: did you mean base?"),
        (changed(1, **{"from": "warmup"}), "stage dense starts from warmup, which comes later"),
        (changed(1, **{"from": "dense"}), "stage dense starts from itself"),
        ([*STAGES, {"name": "base", "stage": "pretrain"}], "two stages are named base"),
        (changed(1, name="a/b"), "name='a/b' must be letters"),
        (changed(1, repeats=1), "unknown key repeats: did you mean repeat?"),
        (changed(1, repeat={"seeds": [1, 1]}), "stage dense: repeat is {seeds: [0, 1, 2]}"),
        (changed(2, repeat={"seeds": [5]}), "stage dense_eval repeats seeds [5] and dense [1, 2]: give the same"),
        (changed(1, overrides=["train.stepz=3"]), "stage dense: train.stepz=3: unknown key train.stepz"),
        (changed(1, overrides=["output_dir=x"]), "output_dir is the pipeline's own"),
        (changed(1, overrides="train.steps=3"), "stage dense: overrides must be a list of strings"),
        (changed(3, overrides=["optim.indexer_lr=1"]), "stage warmup: optim.indexer_lr=1 is not used by stage"),
        (changed(1, overrides=["data.seq_len=1000000"]), "stage dense: data.seq_len=1000000"),
        (changed(3, **{"from": None}), "stage warmup starts from nothing"),
        (changed(1, overrides=["init_from=x"]), "stage dense has `from` and init_from both"),
        (changed(1, ranks=0), "stage dense: ranks=0 must be a whole number from 1"),
        ([*STAGES, {"name": "dense_seed1", "stage": "pretrain"}], "would both be dense_seed1"),
        ([], "stages must be a list of at least one stage"),
        ("base", "stages must be a list"),
    ],
)
def test_a_wrong_recipe_ends_with_one_line_and_nothing_runs(
    stages: object, words: str, faked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([write(faked, stages), "--dir", str(faked / "out")]) == 2
    told = capsys.readouterr()
    assert words in told.err and len(told.err.splitlines()) == 1, told.err
    assert not (faked / "out").exists()


def test_all_mistakes_are_told_at_once(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = changed(1, overrides=["train.stepz=3"])
    wrong[3] = wrong[3] | {"overrides": ["optim.lr=fast"]}
    assert pipeline.main([write(faked, wrong), "--dir", str(faked / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("stage dense: ") and second.startswith("stage warmup: optim.lr=")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "there is no recipe nope"),
        (["mine.yaml", "--only", "dens"], "this recipe has no such stage: did you mean dense?"),
        (["mine.yaml", "--only", "dense"], "it starts from base, which has not finished"),
        (["mine.yaml", "output_dir=x"], "output_dir is the pipeline's own"),
        (["mine.yaml", "train.stepz=3"], "unknown key train.stepz"),
    ],
)
def test_a_wrong_command_line(
    arguments: list[str], words: str, faked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(faked)
    monkeypatch.chdir(faked)
    assert pipeline.main(arguments) == 2
    assert words in capsys.readouterr().err and not (faked / "runs").exists()


def test_a_recipe_may_be_no_yaml_or_no_mapping(tmp_path: Path) -> None:
    for text, words in (("stages: [", "is not YAML"), ("- a\n- b", "must be a mapping of title")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            recipe.read_recipe(tmp_path / "x.yaml")


def a_base(folder: Path, preset: str) -> str:
    """What reads as a dense checkpoint of a preset: config.json, and one tensor that tells of its MTP layer."""
    import torch
    from safetensors.torch import save_file

    model = load(["+stage=pretrain", f"model={preset}"]).config.model
    raw = {key: value for key, value in write_config(model).items() if not key.startswith("index_")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "deepseek_v3"}))
    name = f"model.layers.{model.num_hidden_layers}.eh_proj.weight"
    save_file({name: torch.zeros(1)}, folder / "model.safetensors")
    return f"init_from={folder}"


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe.RECIPES.glob("*.yaml")))
def test_the_recipes_that_ship_are_valid(name: str, tmp_path: Path) -> None:
    found = recipe.read_recipe(recipe.find_recipe(name))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    preset = {"deepseek_v3_2": "deepseek_v3_2", "v2_lite_8gpu": "deepseek_v2_lite"}.get(name, "small")
    given = {"data.source": "data.source=stdlib", "rl.path": f"rl.path={tmp_path}/rows.jsonl"}
    given["init_from"] = a_base(tmp_path / "base", preset)
    runs = recipe.plan(found, Path("runs/x"), [given[key] for key in found.required])
    control, adapted = ([run for run in runs if run.step == step] for step in ("dense", "dsa"))
    for one, other in zip(control, adapted, strict=True):
        a, b = (load(run.arguments).config for run in (one, other))
        assert (a.data, a.train, a.optim.lr) == (b.data, b.train, b.optim.lr), "the same tokens at the same rate"


def test_the_recipe_for_v3_2_has_the_reports_numbers(tmp_path: Path) -> None:
    """arXiv 2512.02556, sec. 2.1.1."""
    found = recipe.read_recipe(recipe.find_recipe("deepseek_v3_2"))
    runs = recipe.plan(found, Path("x"), [a_base(tmp_path / "base", "deepseek_v3_2"), "data.source=stdlib"])
    for run, steps, sequences, rate, tokens in zip(
        runs, (1000, 15_000), (16, 480), (1e-3, 7.3e-6), (2.1e9, 943.7e9), strict=True
    ):
        config = load(run.arguments).config
        taken = run.ranks // config.parallel.cp * config.train.micro_batches
        assert (config.train.steps, taken, config.optim.lr) == (steps, sequences, rate)
        assert config.data.seq_len == 128 * 1024 and config.model.index_topk == 2048
        assert steps * sequences * config.data.seq_len == pytest.approx(tokens, rel=2e-3)


def test_another_launcher_starts_the_stages(faked: Path) -> None:
    (faked / "launch.sh").write_text(f'echo "$1" >>{faked}/started; exec {sys.executable} {faked}/fake.py "${{@:2}}"\n')
    command = [write(faked, STAGES[:1]), "--dir", str(faked / "out"), "--launch", f"bash '{faked}/launch.sh' on_all"]
    assert pipeline.main(command) == 0
    assert (faked / "started").read_text() == "on_all\n" and calls(faked / "out") == ["base"]
    entry = json.loads((faked / "out" / "pipeline.json").read_text())["stages"]["base"]
    assert entry["command"].startswith(f"bash '{faked}/launch.sh' on_all +stage=pretrain")


def test_what_is_finished_is_not_run_again_and_what_failed_is(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = faked / "out"
    command = [write(faked), "--dir", str(out)]
    out.mkdir()
    (out / "break_dense_seed2").touch()
    assert pipeline.main(command) == 2
    assert calls(out) == ["base", "dense_seed1", "dense_seed2"]
    told = capsys.readouterr()
    assert "dense_seed2 failed after" in told.err and "(exit status 2)" in told.err
    state = json.loads((out / "pipeline.json").read_text())["stages"]
    assert [entry["status"] for entry in state.values()] == ["done", "done", "failed"] + ["waiting"] * 4
    assert state["dense_seed2"]["exit_code"] == 2 and state["base"]["exit_code"] == 0
    assert state["base"]["command"] in told.out and state["base"]["seconds"] > 0
    (out / "break_dense_seed2").unlink()
    assert pipeline.main(command) == 0
    assert calls(out) == list(state)[2:]
    assert "[1/7 base] finished before" in capsys.readouterr().out
    assert pipeline.main(command) == 0 and calls(out) == []


def test_only_runs_what_it_names(faked: Path) -> None:
    out = faked / "out"
    command = [write(faked), "--dir", str(out)]
    assert pipeline.main([*command, "--only", "base"]) == 0
    assert pipeline.main([*command, "--only", "dense_seed2"]) == 0
    assert calls(out) == ["base", "dense_seed2"]
    state = json.loads((out / "pipeline.json").read_text())["stages"]
    assert [name for name, entry in state.items() if entry["status"] == "done"] == ["base", "dense_seed2"]


def test_a_run_whose_start_was_made_anew_is_refused(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = faked / "out"
    command = [write(faked), "--dir", str(out)]
    assert pipeline.main(command) == 0
    calls(out)
    os.utime(out / "base" / "hf" / "config.json", (1, 1))
    assert pipeline.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and f"dense_seed1 was made from an earlier base: remove {out / 'dense_seed1'}" in lines[0]
    assert calls(out) == []


def test_what_began_from_an_earlier_start_does_not_go_on_from_its_checkpoint(faked: Path, capsys) -> None:
    out = faked / "out"
    command = [write(faked), "--dir", str(out)]
    out.mkdir()
    (out / "break_dense_seed1").touch()
    assert pipeline.main(command) == 2 and calls(out) == ["base", "dense_seed1"]
    (out / "break_dense_seed1").unlink()
    os.utime(out / "base" / "hf" / "config.json", (1, 1))
    refused = f"dense_seed1 was made from an earlier base: remove {out / 'dense_seed1'}"
    for more in ([], ["train.steps=9"]):  # also where the command is another and the stage would judge
        capsys.readouterr()
        assert pipeline.main([*command, *more]) == 2 and calls(out) == []
        assert refused in capsys.readouterr().err
    shutil.rmtree(out / "dense_seed1")
    assert pipeline.main(command) == 0 and calls(out)[0] == "dense_seed1"


def test_a_changed_command_is_left_to_the_stage_to_judge(faked: Path) -> None:
    out = faked / "out"
    command = [write(faked), "--dir", str(out)]
    assert pipeline.main([*command, "--only", "base"]) == 0
    assert pipeline.main([*command, "--only", "base", "train.steps=9"]) == 0
    assert calls(out) == ["base", "base"]


def test_list_runs_nothing_and_prints_what_would_run(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([write(faked), "--dir", str(faked / "out"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("[base] python ") and not (faked / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([write(faked), "--dir", str(faked / "mine.yaml")]) == 2
    told = f"--dir {faked / 'mine.yaml'} cannot be written (File exists): give another folder\n"
    assert capsys.readouterr().err == told


def test_a_state_file_that_is_no_json_is_told(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faked / "out").mkdir()
    (faked / "out" / "pipeline.json").write_text("{")
    assert pipeline.main([write(faked), "--dir", str(faked / "out")]) == 2
    assert "pipeline.json cannot be read" in capsys.readouterr().err


def test_the_parity_of_a_recipe_is_printed_and_written(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = faked / "out"
    path = write(faked, COMPARED, parity={"control": "dense_eval", "sparse": "warmup_eval"})
    assert pipeline.main([path, "--dir", str(out)]) == 0
    told = capsys.readouterr().out
    assert "loss/lm" in told and "DSA worse" in told
    found = json.loads((out / "parity.json").read_text())
    assert found["seeds"] == [1, 2] and found["rows"][0]["control"]["values"] == pytest.approx([2.1, 2.2])
    assert (out / "parity.md").read_text().startswith("| ") and "<table" in (out / "parity.html").read_text()


def test_parity_names_two_evaluations_with_the_same_seeds(tmp_path: Path) -> None:
    for names, words in ((("dense", "warmup_eval"), "dense, which is no stage of kind evaluate"),):
        found = recipe.read_recipe(
            Path(write(tmp_path, COMPARED, parity=dict(zip(("control", "sparse"), names, strict=True))))
        )
        with pytest.raises(UserError, match=words):
            recipe.plan(found, Path("out"))


def test_how_a_run_ended_is_read_from_its_folder_under_torchrun(tmp_path: Path) -> None:
    one, two = (recipe.Run("a", "a", "pretrain", tmp_path, ranks) for ranks in (1, 2))
    assert pipeline.outcome(one, 0, None, 0.0) == ("failed", 1), "it said 0 and left nothing"
    (tmp_path / "error.txt").write_text("Traceback\n  in x\n")
    assert pipeline.outcome(two, 1, None, 0.0) == ("failed", 1)
    (tmp_path / "error.txt").write_text("optim.lr=0: give more\n")
    assert pipeline.outcome(two, 1, None, 0.0) == ("failed", 2)
    (tmp_path / "preempted").touch()
    assert pipeline.outcome(two, 1, None, 0.0) == ("preempted", 143)
    assert pipeline.outcome(two, 1, None, time.time() + 9) == ("failed", 2), "an earlier attempt left it"
    assert pipeline.outcome(two, 1, 130, time.time() + 9) == ("preempted", 130)


def test_sigterm_reaches_the_stage_which_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    tiny = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.vocab_size=256", "train.save_every=2"]
    stages = [{"name": "base", "stage": "pretrain", "overrides": [*tiny, "train.steps=60", "train.log_every=1"]}]
    out = tmp_path / "out"
    command = [sys.executable, pipeline.__file__, write(tmp_path, stages), "--dir", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while not (out / "base" / "checkpoints" / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "base preempted" in errors and (out / "base" / "preempted").is_file()
    entry = json.loads((out / "pipeline.json").read_text())["stages"]["base"]
    assert (entry["status"], entry["exit_code"]) == ("preempted", 143)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr
    rows = [json.loads(line)["step"] for line in (out / "base" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 61))
    assert json.loads((out / "pipeline.json").read_text())["stages"]["base"]["status"] == "done"
