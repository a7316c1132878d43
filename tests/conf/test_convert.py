"""Dicts and YAML <-> dataclasses: the round trip, the strictness, the redaction."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.convert import from_dict, leaf_types, load_yaml, redacted, save_yaml, to_dict
from conf.errors import UserError
from conf.schema import DataConfig, DomainConfig, OptimConfig, RLConfig, RunConfig, TrackerConfig

RUN = RunConfig("pretrain", "runs/x", optim=OptimConfig(lr=3e-6), data=DataConfig(source="files", path="ü/文.txt"))


def test_dict_round_trip() -> None:
    assert from_dict(to_dict(RUN)) == RUN


def test_lists_come_back_as_they_went(tmp_path: Path) -> None:
    run = RunConfig("grpo", "runs/x", rl=RLConfig(tasks=("words:2", "sorting")))
    save_yaml(run, tmp_path / "config.yaml")
    assert from_dict(to_dict(run)) == run == load_yaml(tmp_path / "config.yaml")
    assert "- words:2\n" in (tmp_path / "config.yaml").read_text()


def test_yaml_round_trip_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_yaml(RUN, path)
    assert load_yaml(path) == RUN
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@settings(max_examples=30, deadline=None)
@given(lr=st.floats(min_value=1e-12, max_value=1e12), name=st.text(max_size=20))
def test_yaml_round_trip_of_any_value(tmp_path_factory: pytest.TempPathFactory, lr: float, name: str) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    run = RunConfig("pretrain", "runs/x", optim=OptimConfig(lr=lr), tracker=TrackerConfig(run_name=name))
    save_yaml(run, path)
    assert load_yaml(path) == run


def test_a_mapping_stands_in_yaml_and_comes_back(tmp_path: Path) -> None:
    run = RunConfig(
        "grpo",
        "runs/x",
        rl=RLConfig(domains={"math": DomainConfig(beta=0.0, tasks=("words:2",)), "文": DomainConfig()}),
    )
    save_yaml(run, tmp_path / "config.yaml")
    assert (
        "  domains:\n    math:\n      path: null\n      tasks:\n      - words:2\n"
        in (tmp_path / "config.yaml").read_text()
    )
    assert load_yaml(tmp_path / "config.yaml") == run


def test_defaults_fill_what_a_dict_leaves_out() -> None:
    assert from_dict({"stage": "sft", "output_dir": "x"}) == RunConfig("sft", "x")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"stage": "sft"}, "output_dir is missing"),
        ({"stage": "sft", "output_dir": "x", "model": 3}, "model=3 is not a section"),
        ({"stage": "sft", "output_dir": "x", "model": None}, "model=None is not a section"),
        ({"stage": "sft", "output_dir": "x", "model": {"rope": {"thet": 1}}}, "did you mean model.rope.theta?"),
        ({"stage": "sft", "output_dir": 3}, "output_dir=3"),
        ({"stage": "sft", "output_dir": "x", "train": {"steps": True}}, "wrong type bool"),
        ({"stage": "sft", "output_dir": "x", "train": {"steps": 2.0}}, "wrong type float"),
        ({"stage": "sft", "output_dir": "x", "optim": {"clip": "1"}}, "optim.clip='1'"),
        ({"stage": "sft", "output_dir": "x", "optim": {"clip": True}}, "wrong type bool"),
        ({"stage": "sft", "output_dir": "x", "data": {"path": ["a"]}}, "data.path=['a']"),
        ({"stage": "sft", "output_dir": "x", "data": {"source": None}}, "data.source=null"),
        ({"stage": "sft", "output_dir": "x", "rl": {"tasks": "words"}}, "rl.tasks takes a list of strings"),
        (
            {"stage": "sft", "output_dir": "x", "rl": {"tasks": ["words", 2]}},
            "rl.tasks=['words', 2] has",
        ),
        ({"stage": "sft", "output_dir": "x", "rl": {"domains": [0.1]}}, "rl.domains=[0.1] is no mapping"),
        ({"stage": "sft", "output_dir": "x", "rl": {"domains": {"": {}}}}, "rl.domains has the name ''"),
        ({"stage": "sft", "output_dir": "x", "rl": {"domains": {"a": True}}}, "rl.domains.a=True is not a section"),
    ],
)
def test_wrong_dicts_are_refused_by_name(values: dict[str, object], part: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "No such file"), ("a: [", "is not YAML"), ("steps: 1", "train.steps"), ("", "not a section")],
)
def test_unreadable_yaml_names_the_file(tmp_path: Path, content: str | None, part: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value) and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_from_the_environment_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh1234")
    run = RunConfig("pretrain", "x", data=DataConfig(source="hf", path="https://u:hf_abcdefgh1234@host/set"))
    save_yaml(run, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_abcdefgh1234" not in text and "<redacted HF_TOKEN>" in text
    assert load_yaml(tmp_path / "config.yaml") == redacted(run)


def test_redaction_goes_by_the_variables_name_and_a_sensible_length() -> None:
    run = RunConfig("pretrain", "runs/plainvalue", init_from="runs/1/longsecret1")
    environ = {"HOME": "plainvalue", "DEBUG_TOKEN": "1", "API_KEY": "longsecret", "MY_SECRET": "longsecret1"}
    shown = redacted(run, environ)
    assert (shown.output_dir, shown.init_from) == ("runs/plainvalue", "runs/1/<redacted MY_SECRET>")


def test_leaves_are_dotted_and_complete() -> None:
    leaves = leaf_types()
    assert leaves["stage"] is str and leaves["model.rope.theta"] is float and "model.rope" not in leaves


def test_a_run_of_before_is_read(tmp_path: Path) -> None:
    """`rl.tools` was a switch, always off; the run behind `init_from` and a run that goes on are read by this."""
    config = RunConfig("grpo", "runs/x")
    save_yaml(config, tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    values["rl"]["tools"] = False
    for name in ("use_tools", "env"):
        del values["rl"][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_yaml(tmp_path / "config.yaml") == config
