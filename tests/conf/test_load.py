"""The command line: what it takes, and the one line it answers to a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import CONFIG_DIR, GROUPS, load, presets
from conf.schema import STAGES, DomainConfig, RunConfig

ROOT = Path(__file__).resolve().parents[2]
GRPO = "+stage=grpo"


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(list(argv))
    message = str(caught.value)
    assert "\n" not in message, "a mistake is one line"
    return message


@pytest.mark.parametrize("stage", STAGES)
def test_stage_alone_is_a_whole_command(stage: str) -> None:
    config = load([f"+stage={stage}"]).config
    assert (config.stage, config.output_dir) == (stage, f"runs/{stage}")
    assert (config.precision.name, config.tracker.name, config.rl.length_penalty) == ("fp32", "wandb", 0.1)


def test_stage_files_and_schema_name_the_same_stages() -> None:
    assert set(presets("stage")) == set(STAGES)


def test_every_kind_of_override_reaches_its_field() -> None:
    loaded = load(
        "+stage=grpo precision=bf16 tracker=none rl=speciale model=small model.index_topk=32 data.source=files"
        " data.path=a.txt train.steps=5 kernels=torch output_dir=out init_from=runs/sft resume=never optim.lr=1e-4"
        " model.rope.factor=4 train.activation_checkpointing=true data.tokenizer=train:1536".split()
    )
    config = loaded.config
    assert (config.precision.name, config.tracker.name, config.rl.length_penalty) == ("bf16", "none", 0.02)
    assert config.rl.max_new_tokens == 65536
    assert (config.model.hidden_size, config.model.index_topk, config.model.rope.factor) == (512, 32, 4.0)
    assert (config.data.source, config.data.path, config.data.tokenizer) == ("files", "a.txt", "train:1536")
    assert (config.train.steps, config.train.activation_checkpointing, config.optim.lr) == (5, True, 1e-4)
    assert (config.kernels, config.output_dir, config.init_from) == ("torch", "out", "runs/sft")
    assert {"stage", "precision", "model", "model.index_topk", "output_dir"} <= loaded.overrides
    assert "data.seq_len" not in loaded.overrides


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("words", ("words",)),
        ("words:2,sorting", ("words:2", "sorting")),
        ("[words:2, sorting]", ("words:2", "sorting")),
        ("['words:2',\"sorting\"]", ("words:2", "sorting")),
        ("a'b", ("a'b",)),
        (r"""["\n\n", "a,b", " x ", "it's", "\\n"]""", ("\n\n", "a,b", " x ", "it's", r"\n")),
        ("", ()),
        ("[]", ()),
        ("null", ()),
    ],
)
def test_a_list_is_names_with_commas(text: str, names: tuple[str, ...]) -> None:
    assert load([GRPO, f"rl.tasks={text}"]).config.rl.tasks == names


def test_whole_number_becomes_the_float_that_the_schema_wants() -> None:
    factor = load([GRPO, "model.rope.factor=4"]).config.model.rope.factor
    assert type(factor) is float


def test_null_switches_an_optional_value_off() -> None:
    assert load([GRPO, "tracker.run_name=null", "optim.lr=null"]).config.tracker.run_name is None


def test_a_mapping_takes_names_of_the_users_choice() -> None:
    given = ["rl.domains={math: {beta: 0, tasks: [words:2, sorting]}, agent_2: {}}", "rl.domains.agent_2.beta=1e-3"]
    rl = load([GRPO, *given, "rl.domains.code.path=a b.jsonl", "rl.domains.code.tasks=words,counting:2"]).config.rl
    assert rl.domains == {
        "math": DomainConfig(beta=0.0, tasks=("words:2", "sorting")),
        "agent_2": DomainConfig(beta=0.001),
        "code": DomainConfig(path="a b.jsonl", tasks=("words", "counting:2")),
    }
    assert type(rl.domains["math"].beta) is float
    assert load([GRPO]).config.rl.domains == {}


@pytest.mark.parametrize(
    "path",
    ["~/a b", "runs/(1),2", "it's", "trailing\\", "a=b", "2024", "true", "src/**/*.py", "[x]", "{a:1}", "é/日"],
)
def test_paths_are_taken_as_they_stand(path: str) -> None:
    assert load([GRPO, f"output_dir={path}", f"data.path={path}"]).config.output_dir == path


def test_environment_and_other_keys_can_be_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_TEST_DIR", "/data")
    config = load([GRPO, "data.path=${oc.env:WINNOW_TEST_DIR}/x", "rl.pack_len=${data.seq_len}"]).config
    assert (config.data.path, config.rl.pack_len) == ("/data/x", config.data.seq_len)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("train.step=3", ["train.step", "did you mean train.steps?"]),
        ("steps=3", ["unknown key steps", "did you mean train.steps?"]),
        ("model.index_topl=3", ["did you mean model.index_topk?"]),
        ("modle.index_topk=3", ["did you mean model.index_topk?"]),
        ("precison=bf16", ["did you mean precision?"]),
        ("kernel=torch", ["did you mean kernels?"]),
        ("outputdir=x", ["did you mean output_dir?"]),
        ("path=x", ["did you mean data.path or rl.path?"]),
        ("foo.bar=1", ["unknown key foo.bar", "valid: output_dir"]),
        ("model.rope=2", ["it is a section", "model.rope.theta"]),
        ("model=smal", ["model=smal", "did you mean small?"]),
        ("model=llama", ["valid: deepseek_v2_lite, deepseek_v3_2, serving_smoke, small, tiny"]),
        ("precision=fp16", ["did you mean"]),
        ("rl=special", ["did you mean speciale?"]),
        ("train.steps=abc", ["train.steps='abc'", "whole number"]),
        ("train.steps=true", ["wrong type bool"]),
        ("train.steps=null", ["train.steps=null"]),
        ("train.steps=1e3", ["train.steps=1000.0", "whole number"]),
        ("train.steps=", ["train.steps=''"]),
        ("train.steps=1,2", ["one value for train.steps"]),
        ("train.steps=[1", ["train.steps cannot be read"]),
        ("train.activation_checkpointing=1", ["true or false"]),
        ("optim.lr=fast", ["optim.lr='fast'", "a finite number or null"]),
        ("optim.lr=nan", ["optim.lr=nan", "finite"]),
        ("optim.lr=inf", ["optim.lr=inf", "finite"]),
        ("train.steps", ["key=value"]),
        ("--help", ["key=value"]),
        ("~train.steps", ["key=value"]),
        ("rl.domains=3", ["rl.domains=3 is no mapping", "give rl.domains={NAME: VALUE, ...}"]),
        ("rl.domains=null", ["no mapping"]),
        ("rl.domains={math: 3}", ["rl.domains.math=3 is not a section"]),
        ("rl.domains={math: {beta: x}}", ["rl.domains.math.beta='x'", "a finite number"]),
        ("rl.domains={math: {beta: nan}}", ["rl.domains.math.beta=nan", "finite"]),
        ("rl.domains={math: {beat: 1}}", ["unknown key rl.domains.math.beat", "did you mean rl.domains.math.beta?"]),
        ("rl.domains={1: {}}", ["rl.domains has the name 1", "no text"]),
        ("rl.domains.math.beat=1", ["unknown key rl.domains.math.beat", "did you mean rl.domains.math.beta?"]),
        (
            "rl.domains.math=1",
            ["unknown key rl.domains.math", "it is a section, set one of its keys: path, tasks, env"],
        ),
        ("rl.domains.math.beta=x", ["rl.domains.math.beta='x'", "a finite number"]),
        ("data.path=a\nb", ["a\\nb", "line break"]),
        ("+model=small", ["write model=small"]),
        ("++train.steps=3", ["write train.steps=3"]),
        ("model@x=small", ["model=small"]),
        ("model._target_=os.system", ["unknown key model._target_"]),
        ("data.path=${oc.env:WINNOW_NOT_SET}", ["data.path", "WINNOW_NOT_SET"]),
    ],
)
def test_mistake_is_one_line_with_key_and_fix(argument: str, parts: list[str]) -> None:
    message = refusal(GRPO, argument)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "no stage is given: add exactly one +stage=S"),
        (["train.steps=3"], "no stage is given"),
        (["+stage=grop"], "did you mean grpo?"),
        (["+stage="], "valid: pretrain"),
        (["stage=grpo"], "+stage=grpo"),
        ([GRPO, "+stage=sft"], "2 stages"),
        ([GRPO, "stages=sft"], "did you mean +stage?"),
    ],
)
def test_stage_is_needed_once(argv: list[str], part: str) -> None:
    assert part in refusal(*argv)


def test_hydra_writes_nothing_and_its_settings_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load([GRPO, "hydra.run.dir=elsewhere", "hydra/job_logging=none", "+hydra.sweep.dir=x"]).config
    assert config == load([GRPO]).config
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("group", GROUPS)
def test_each_preset_of_each_group_loads(group: str) -> None:
    assert presets(group), f"conf/{group}/ is empty"
    for name in presets(group):
        assert isinstance(load([GRPO, f"{group}={name}"]).config, RunConfig)


def test_tiny_is_the_default_model() -> None:
    assert load([GRPO]).config.model == load([GRPO, "model=tiny"]).config.model


def test_a_yaml_preset_cannot_invent_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in CONFIG_DIR.rglob("*.yaml"):
        target = tmp_path / source.relative_to(CONFIG_DIR)
        target.parent.mkdir(exist_ok=True)
        target.write_text(source.read_text())
    (tmp_path / "model" / "mine.yaml").write_text("index_top: 3\n")
    monkeypatch.setattr("conf.load.CONFIG_DIR", tmp_path)
    assert "unknown key model.index_top: did you mean model.index_topk?" in refusal(GRPO, "model=mine")


def test_loading_a_config_imports_no_torch() -> None:
    code = f"import sys; from conf.load import load; load(['{GRPO}']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
