"""Reading and writing checkpoint folders: what is filled, what is refused by name, whole folders or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from model import from_pretrained as exported_from_pretrained
from model.hf import convert, from_pretrained, load_weights, read_config, save_pretrained
from model.hf_files import INDEX
from model.hf_names import stored_dtype
from model.transformer import Transformer
from tests.model.hf_cases import make_config, make_net, make_oracle, random_ids, read_tensors, write_checkpoint

CONFIG = make_config(num_hidden_layers=2, num_nextn_predict_layers=1)
Q = "model.layers.1.self_attn.q_b_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3.2 checkpoint of ours in several shards, MTP layer included. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "hf"
    save_pretrained(make_net(CONFIG), folder, max_shard_bytes=100_000)
    assert len(list(folder.glob("model-*.safetensors"))) >= 4
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrites the folder as one file after `change`."""
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    change(tensors)
    write_checkpoint(folder, tensors, config)


def refusal(folder: Path, **overrides: object) -> str:
    with pytest.raises(UserError) as caught:
        from_pretrained(folder, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_state(one: Transformer, other: Transformer) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Reading what was written


def test_round_trip_is_exact(saved: Path) -> None:
    net = exported_from_pretrained(saved)
    assert net.config == CONFIG
    assert_same_state(net, make_net(CONFIG))
    assert all(p.requires_grad for p in net.parameters())


def test_files_hold_what_deepseeks_do(saved: Path, tmp_path: Path) -> None:
    tensors = read_tensors(saved)
    net = make_net(CONFIG)
    state = net.state_dict()
    layer = "layers.1.mlp.experts"
    for name, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        for e in range(CONFIG.n_routed_experts):
            assert torch.equal(tensors[f"model.{layer}.{e}.{name}.weight"], state[f"{layer}.{ours}"][e])
    mtp = f"model.layers.{CONFIG.num_hidden_layers}"
    assert torch.equal(tensors[f"{mtp}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{mtp}.shared_head.head.weight"], tensors["lm_head.weight"])
    assert torch.equal(tensors[f"{mtp}.shared_head.norm.weight"], state["mtp.0.norm.weight"])
    assert torch.equal(tensors[f"{mtp}.self_attn.o_proj.weight"], state["mtp.0.layer.self_attn.o_proj.weight"])
    index = json.loads((saved / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for file in saved.glob("model-*.safetensors"):
        assert file.stat().st_size < 100_000 + 20_000  # the header comes on top
    save_pretrained(net, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]


def test_bf16_keeps_what_decides_choices_in_fp32(saved: Path, tmp_path: Path) -> None:
    net = from_pretrained(saved, dtype=torch.bfloat16)
    kept = set()
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == stored_dtype(name, torch.bfloat16)
        if tensor.dtype == torch.float32:
            kept.add(name.split(".", 2)[-1])
            assert torch.equal(tensor, make_net(CONFIG).state_dict()[name])
    assert {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "self_attn.indexer.weights_proj.weight"} <= kept
    assert not any("q_b_proj" in name or "experts" in name for name in kept)
    ids = random_ids(batch=1)
    full = from_pretrained(saved).logits(ids, attention="dense").detach()
    error = (net.logits(ids, attention="dense") - full).norm(dim=-1) / full.norm(dim=-1)
    # 8 bits of mantissa through 2 layers; the median, because rounded inputs flip an expert for a few tokens
    assert 0 < error.median() < 0.02
    save_pretrained(net, tmp_path / "out")
    assert_same_state(from_pretrained(tmp_path / "out", dtype=torch.bfloat16), net)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    save_pretrained(net, tmp_path / "wide", dtype=torch.float32)
    assert read_tensors(tmp_path / "wide")[Q].dtype == torch.float32


def test_load_weights_fills_an_existing_net_in_place(saved: Path) -> None:
    net = make_net(CONFIG, seed=9).double()
    weight = net.lm_head.weight
    load_weights(net, saved)
    assert net.lm_head.weight is weight and weight.dtype == torch.float64
    assert torch.equal(weight.float(), make_net(CONFIG).lm_head.weight)


def test_progress_sees_every_tensor(saved: Path) -> None:
    seen: list[str] = []

    def progress(items: list) -> Iterator:
        for item in items:
            seen.append(item.hf_name)
            yield item

    from_pretrained(saved, progress=progress)
    copies = {f"model.layers.2.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    assert len(seen) == len(set(seen)) and set(seen) == read_tensors(saved).keys() - copies


# The indexer


def test_a_missing_indexer_is_initialised_from_the_seed(tmp_path: Path) -> None:
    config = make_config(num_hidden_layers=2)
    make_oracle(config, "dense").save_pretrained(tmp_path)
    net, same, other = (from_pretrained(tmp_path, seed=seed, index_head_dim=16) for seed in (5, 5, 6))
    assert_same_state(net, same)
    name = "layers.1.self_attn.indexer.wq_b.weight"
    assert not torch.equal(net.state_dict()[name], other.state_dict()[name])
    for name, tensor in net.indexer_parameters():
        if "k_norm" in name:
            assert (tensor == float(name.endswith("weight"))).all()
        else:
            assert abs(tensor.std() - 0.02) < 0.003 and abs(tensor.mean()) < 0.003


def test_part_of_an_indexer_is_an_error(folder: Path) -> None:
    name = "model.layers.1.self_attn.indexer.wk.weight"
    edit(folder, lambda tensors: tensors.pop(name))
    assert f"lacks tensor {name}" in refusal(folder)


# The MTP layer


def test_mtp_is_kept_or_dropped(saved: Path) -> None:
    kept, dropped = from_pretrained(saved), from_pretrained(saved, mtp="drop")
    assert len(kept.mtp) == 1 and len(dropped.mtp) == 0
    ids = random_ids()
    assert torch.equal(kept.logits(ids), dropped.logits(ids))


def test_a_dropped_mtp_layer_is_not_written(saved: Path, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(saved, mtp="drop"), tmp_path / "out")
    assert not any(name.startswith("model.layers.2.") for name in read_tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert from_pretrained(tmp_path / "out").config.num_mtp_layers == 0


def test_an_announced_mtp_layer_that_is_not_there(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    # what transformers saves: the config still announces the layer
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit(folder, drop)
    net = from_pretrained(folder)
    assert len(net.mtp) == 0 and net.config == replace(CONFIG, num_nextn_predict_layers=0)
    assert "holds none: continuing without it" in caplog.text
    assert "set model.mtp=drop" in refusal(folder, mtp="keep")
    assert len(from_pretrained(folder, mtp="drop").mtp) == 0


def test_mtp_copies_may_be_absent_but_not_of_another_shape(folder: Path) -> None:
    copy = "model.layers.2.shared_head.head.weight"
    edit(folder, lambda tensors: tensors.pop(copy))
    assert_same_state(from_pretrained(folder), make_net(CONFIG))
    edit(folder, lambda tensors: tensors.update({copy: torch.zeros(3, 3)}))
    assert f"tensor {copy} has shape [3, 3]" in refusal(folder)


# What is refused: one line, naming file and tensor


def test_a_truncated_shard(folder: Path) -> None:
    shard = shard_of(folder, Q)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    message = refusal(folder)
    last = message.partition("tensor ")[2].split()[0]
    assert str(shard) in message and "is truncated" in message and shard_of(folder, last) == shard
    with shard.open("r+b") as file:
        file.truncate(20)
    message = refusal(folder)
    assert f"{shard} is truncated within its header" in message and "tensor model." in message
    shard.unlink()
    message = refusal(folder)
    assert f"{shard} cannot be read (tensor model." in message and "No such file" in message


def test_a_damaged_header(folder: Path) -> None:
    shard = shard_of(folder, Q)
    raw = bytearray(shard.read_bytes())
    raw[8:12] = b"????"
    shard.write_bytes(raw)
    assert f"{shard} is no safetensors file" in refusal(folder)


@pytest.mark.parametrize("name", [Q, EXPERT, "model.norm.weight"])
def test_a_wrong_shape(folder: Path, name: str) -> None:
    right = list(read_tensors(folder)[name].shape)
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(right[0] + 1, *right[1:])}))
    wrong = [right[0] + 1, *right[1:]]
    expected = f"model.safetensors: tensor {name} has shape {wrong}, config.json makes it {right}"
    assert expected in refusal(folder)


@pytest.mark.parametrize("name", [Q, EXPERT, "lm_head.weight", "model.layers.2.enorm.weight"])
def test_a_missing_tensor(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    assert f"model.safetensors lacks tensor {name}" in refusal(folder)


def test_a_tensor_missing_from_index_or_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    elsewhere = shard_of(folder, "lm_head.weight").name
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {Q: elsewhere}}))
    assert f"{elsewhere} lacks tensor {Q}, which {INDEX} puts there" in refusal(folder)
    del index["weight_map"][Q]
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} lacks tensor {Q}" in refusal(folder)


def test_an_unexpected_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.zeros(2)}))
    assert "model.safetensors: tensor model.layers.1.mlp.extra.weight is not expected" in refusal(folder)


def test_rotary_tables_are_passed_over(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same_state(from_pretrained(folder), make_net(CONFIG))


def test_a_dtype_that_is_no_float(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    assert f"tensor {Q} has dtype I8" in refusal(folder)


def test_an_index_that_is_none(folder: Path) -> None:
    original = json.loads((folder / INDEX).read_text())
    for content in ("{", "[]", '{"metadata": {}}'):
        (folder / INDEX).write_text(content)
        assert f"{folder / INDEX} is no index of safetensors" in refusal(folder)
    original["weight_map"][Q] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(original))
    assert "is no file of this folder" in refusal(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    assert f"{folder} holds neither model.safetensors nor" in refusal(folder)


def test_nothing_is_changed_by_a_refused_load(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    net = make_net(CONFIG, seed=9)
    with pytest.raises(UserError):
        load_weights(net, folder)
    assert_same_state(net, make_net(CONFIG, seed=9))


# Writing: whole or not at all


def test_a_write_that_fails_leaves_what_was_there(saved: Path, folder: Path, tmp_path: Path) -> None:
    def failing(items: list) -> Iterator:
        yield items[0]
        raise OSError("disk full")

    net = make_net(CONFIG, seed=1)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(net, tmp_path / "new", max_shard_bytes=100_000, progress=failing)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(net, folder, max_shard_bytes=100_000, progress=failing)
    assert_same_state(from_pretrained(folder), make_net(CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_write_replaces_an_earlier_checkpoint_and_what_a_kill_left(folder: Path, tmp_path: Path) -> None:
    for name in (f".{folder.name}.partial", f".{folder.name}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("half")
    net = make_net(CONFIG, seed=1)
    save_pretrained(net, folder)
    assert_same_state(from_pretrained(folder), net)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_kill_between_the_renames_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(items: list) -> Iterator:
        raise OSError("disk full")

    def killed(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("killed")
        return rename(path, target)

    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "rename", killed)
        save_pretrained(make_net(CONFIG, seed=1), folder)
    assert not folder.exists()
    # the next write brings back what there was before it does anything else
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make_net(CONFIG, seed=1), folder, progress=failing)
    assert_same_state(from_pretrained(folder), make_net(CONFIG))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.tex, which no export wrote"):
        save_pretrained(make_net(CONFIG), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        save_pretrained(make_net(CONFIG), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    added = [{"id": 3, "content": "<s>"}, {"id": 9, "content": "</s>"}]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "modeling_evil.py").write_text("print('remote code')")
    save_pretrained(make_net(CONFIG), tmp_path / "out", tokenizer_folder=tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (3, 9)
    with pytest.raises(UserError, match="holds no tokenizer"):
        save_pretrained(make_net(CONFIG), tmp_path / "other", tokenizer_folder=tmp_path)
    assert not (tmp_path / "other").exists()


# Converting without a model


def test_convert_equals_load_and_save(tmp_path: Path, saved: Path) -> None:
    convert(saved, tmp_path / "same", max_shard_bytes=50_000)
    assert_same_state(from_pretrained(tmp_path / "same"), make_net(CONFIG))
    convert(saved, tmp_path / "half", torch.bfloat16)
    save_pretrained(make_net(CONFIG), tmp_path / "saved_half", dtype=torch.bfloat16)
    one, other = read_tensors(tmp_path / "half"), read_tensors(tmp_path / "saved_half")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one[Q].dtype == torch.bfloat16


def test_convert_gives_a_dense_checkpoint_an_indexer(tmp_path: Path) -> None:
    make_oracle(make_config(num_hidden_layers=2), "dense").save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", seed=5, index_head_dim=16)
    assert_same_state(from_pretrained(tmp_path / "out"), from_pretrained(tmp_path / "dense", seed=5, index_head_dim=16))
    assert read_config(tmp_path / "out").index_n_heads == 64


def test_convert_keeps_token_ids_and_tokenizer(tmp_path: Path, folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"bos_token_id": 4, "eos_token_id": [5, 6]}))
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (4, [5, 6])
    assert (tmp_path / "out" / "tokenizer.json").is_file()
