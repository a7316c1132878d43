"""Is an exported folder what a server expects of DeepSeek-V3.2? Its files against the public index, then a load.

    python launch/serving_check.py FOLDER [load=auto|yes|no]

FOLDER is an export, or a finished run (its `hf/` is read). Held against DeepSeek-V3.2 as published (model/hf_index.py):
the keys of config.json and the values that are no sizes, every tensor's name, dtype and shape. Then transformers:
its own module, built without weights, must want the same names and shapes; where memory allows (`load=auto`) both
models are loaded in fp32 and their logits compared, past index_topk tokens. Exit status: 0 all agrees, 1 something
differs (each difference is a line), 2 the user's mistake. docs/serving.md
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a bare checkout

from conf.errors import UserError, nearest  # noqa: E402  (needs the path above)
from conf.schema import ModelConfig  # noqa: E402

DIFFERS, USER_MISTAKE = 1, 2
LOAD = ("auto", "yes", "no")
USAGE = "usage: python launch/serving_check.py FOLDER [load=auto|yes|no]"
SHOWN = 10  # differences of one kind that are listed
FIXED: dict[str, Any] = {  # of the public config.json, what is no size
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "attention_bias": False,
    "attention_dropout": 0.0, "hidden_act": "silu", "moe_layer_freq": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
OTHER_KEYS = (  # of the public config.json; no server needs its ep_size and transformers_version
    "bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings", "num_key_value_heads",
    "rope_scaling", "rope_theta", "torch_dtype",
)  # fmt: skip
QUANTIZATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
KERNELS: dict[str, tuple[int, ...]] = {  # what the sparse-attention kernels of vLLM are built for
    "kv_lora_rank": (512,), "qk_rope_head_dim": (64,), "index_head_dim": (128,), "index_topk": (512, 1024, 2048),
}  # fmt: skip
CLOSE = 1e-3  # of the logits' standard deviation: fp32 sums in another order
CLOSE_SHARE = 0.9  # of the positions past index_topk, where a near tie may select another token


@dataclass
class Findings:
    """What was looked at, a line each, and how many differences there are."""

    lines: list[str] = field(default_factory=list)
    differences: int = 0

    def said(self, about: str, summary: str, wrong: Iterable[str] = ()) -> None:
        listed = list(wrong)
        self.differences += len(listed)
        self.lines.append(f"{about:<13} {summary}" + (f": {len(listed)} differ" if listed else ""))
        self.lines += [f"  {line}" for line in listed[:SHOWN]]
        if len(listed) > SHOWN:
            self.lines.append(f"  and {len(listed) - SHOWN} more")


def config_differences(raw: dict[str, Any], fp8: bool) -> list[str]:
    """Of a config.json's content. Sizes may be any; that they are there and fit is `parse_config`'s."""
    wrong = [f"{key} is missing" for key in (*FIXED, *OTHER_KEYS) if key not in raw]
    wrong += [f"{key}={raw[key]!r}, not {want!r}" for key, want in FIXED.items() if raw.get(key, want) != want]
    wanted = QUANTIZATION if fp8 else None
    if raw.get("quantization_config") != wanted:
        wrong.append(f"quantization_config={raw.get('quantization_config')!r}, not {wanted!r}")
    return wrong


def tensor_differences(there: dict[str, Any], wanted: dict[str, Any], plain: str | None) -> list[str]:
    """`there`: name -> dtype and shape in the files; `wanted`: as published. `plain`: the dtype of a checkpoint that is
    not FP8; it has no scales, and of what the index has in FP8 or bf16 some may be fp32."""
    if plain is not None:
        wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith("_scale_inv")}
    wrong = [f"{name} is missing" for name in wanted if name not in there]
    wrong += [f"{name} is in no index" for name in there if name not in wanted]
    for name, want in wanted.items():
        found = there.get(name)
        allowed = (want.dtype,) if plain is None else (plain, "F32")
        if found is not None and (found.dtype not in allowed or found.shape != want.shape):
            wrong.append(f"{name} is {found.dtype}{list(found.shape)}, not {allowed[0]}{list(want.shape)}")
    return wrong


def transformers_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what transformers' own module of this config.json would save; it has no MTP layer. Built on the
    meta device, so that the largest model takes no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model._weight_conversions = get_model_conversion_mapping(model)  # as a load sets it: experts are one tensor inside
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def mtp_layers(config: ModelConfig) -> tuple[str, ...]:
    """How the names of MTP tensors begin."""
    return tuple(f"model.layers.{config.num_hidden_layers + j}." for j in range(config.num_nextn_predict_layers))


def loaded_differences(folder: Path, fp8: bool) -> tuple[str, list[str]]:
    """Loads both models in fp32 -> (what was compared, what differs). FP8 is made fp32 by our reader first: that of
    transformers takes whole blocks of 128 rows alone, and V3.2's kv_a_proj_with_mqa has 576."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from model.hf import convert, from_pretrained

    logging.set_verbosity_error()  # it lists the MTP layer's tensors, which it has no place for
    logging.disable_progress_bar()
    with TemporaryDirectory() as made:
        readable = folder
        if fp8:
            readable = Path(made) / "fp32"
            convert(folder, readable, torch.float32)
        with_info: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation does not know
            readable, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
        )
    theirs, info = with_info
    theirs.eval()
    ours = from_pretrained(folder)
    config, mtp = ours.config, mtp_layers(ours.config)
    wrong = [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} has another shape" for name in info["mismatched_keys"]]
    wrong += [f"{name} is not expected" for name in info["unexpected_keys"] if not name.startswith(mtp)]
    k = config.index_topk
    length = min(k + 64, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        found = ours.logits(ids, attention="sparse")[0]
    apart = (found - expected).abs().amax(-1) / expected.std()
    worst, close = float(apart[:k].max()), float((apart[k:] < CLOSE).float().mean()) if length > k else 1.0
    if not worst < CLOSE:
        wrong.append(f"logits up to {k} tokens are {worst:.1e} standard deviations from ours, more than {CLOSE:g}")
    if not close >= CLOSE_SHARE:
        wrong.append(f"past {k} tokens, where the indexer selects, {close:.0%} of the positions have our logits")
    return f"{type(theirs).__name__} loaded, logits of {length} tokens compared", wrong


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(folder: Path, load: str = "auto") -> Findings:
    """Raises UserError where the folder is no checkpoint of this family at all."""
    from model.hf_config import load_config_json, parse_config
    from model.hf_files import Checkpoint
    from model.hf_index import published

    raw = load_config_json(folder)
    config = parse_config(raw, str(folder / "config.json"))
    if raw["model_type"] != FIXED["model_type"]:
        raise UserError(
            f"{folder}/config.json: model_type={raw['model_type']} is a dense checkpoint, which has no indexer: give an"
            " export of a run"
        )
    files = Checkpoint(folder)
    there = files.entries | files.scales
    kinds = Counter(entry.dtype for entry in files.entries.values())
    fp8, wanted = "F8_E4M3" in kinds, published(config)
    found = Findings()
    found.said("config.json", f"{len(raw)} keys", config_differences(raw, fp8))
    plain = None if fp8 else "BF16" if kinds["BF16"] else "F32"
    shown = f"{len(there):,} tensors, {'block FP8' if fp8 else plain}"
    found.said("index", shown, tensor_differences(there, wanted, plain))
    theirs, mtp = transformers_tensors(folder), mtp_layers(config)
    ours = {name: entry.shape for name, entry in files.entries.items() if not name.startswith(mtp)}
    odd = [name for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]
    wrong = [f"{name} has shape {ours.get(name)}, transformers wants {theirs.get(name)}" for name in odd]
    found.said("transformers", f"{len(theirs):,} names and shapes of its own module", wrong)
    needed, free = 8 * sum(math.prod(entry.shape) for entry in files.entries.values()), free_memory()
    if load == "no" or load == "auto" and needed > 0.8 * free:
        reason = (
            "load=no" if load == "no" else f"two models in fp32 take {needed / 1e9:,.0f} GB of {free / 1e9:,.0f} free"
        )
        found.said("load", f"left out, {reason}")
    else:
        found.said("load", *loaded_differences(folder, fp8))
    unfit = [f"{key}={raw[key]}" for key, fits in KERNELS.items() if raw[key] not in fits]
    found.said("kernels", f"none on a GPU for {', '.join(unfit)}" if unfit else "the sizes that vLLM has them for")
    return found


def parse(argv: list[str]) -> tuple[Path, str]:
    """(folder with config.json, load)."""
    paths = [arg for arg in argv if "=" not in arg]
    settings = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    load = settings.pop("load", "auto")
    if settings:
        raise UserError(f"unknown setting {next(iter(settings))}: only load={'|'.join(LOAD)} can be given")
    if load not in LOAD:
        raise UserError(f"load={load} is not known: {nearest(load, LOAD)}")
    if len(paths) != 1:
        raise UserError(f"{len(paths)} folders are given, not 1: {USAGE}")
    given = Path(paths[0])
    return (given if (given / "config.json").is_file() else given / "hf"), load


def main(argv: list[str]) -> int:
    try:
        folder, load = parse(argv)
        found = check(folder, load)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    print("\n".join([str(folder), *found.lines]))
    return DIFFERS if found.differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
