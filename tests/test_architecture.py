"""The floor plan, enforced: which room may import which, and who may touch the heavy libraries.

Every file is read with `ast`, so an import inside a function or under TYPE_CHECKING counts as well. Each rule is also
given a snippet that breaks it: a lint that cannot fail guards nothing.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# launch -> rl -> train -> {model, data} -> conf; bench looks at everything but the entries.
MAY_IMPORT = {
    "conf": set(),
    "model": {"conf"},
    "data": {"conf"},
    "train": {"conf", "model", "data"},
    "rl": {"conf", "model", "data", "train"},
    "launch": {"conf", "model", "data", "train", "rl"},
    "bench": {"conf", "model", "data", "train", "rl"},
}
ONLY_IN = {
    "deepspeed": {"train/engine.py", "train/parallel/ep.py"},
    "hydra": {"conf/load.py", "launch/stage.py"},
    "omegaconf": {"conf/load.py", "launch/stage.py"},
}
NEVER_IN = {"conf": {"torch"}}  # whatever runs before a model is built
NOT_FROM = {"rl": {"train.loop"}}  # rl has a loop of its own
# optional or slow: inside the function that needs them
WHERE_USED = {"triton", "wandb", "wandb_workspaces", "matplotlib", "mcp", "datasketch"}
KERNEL_FILE = "kernel.py"  # model/ops/*/kernel.py is imported where it is used, so triton may head it
LIGHT = {  # rooms whose import needs torch alone
    "model": {"accelerate", "datasets", "deepspeed", "hydra", "safetensors", "tokenizers", "transformers", "wandb"},
}
LIBRARIES = set(ONLY_IN) | WHERE_USED | LIGHT["model"] | {"torch", "numpy", "tqdm", "yaml", "zstandard"}


@dataclass(frozen=True)
class Import:
    """One imported dotted name. `at_top`: it runs when the file itself is imported."""

    name: str
    line: int
    at_top: bool

    def reaches(self, module: str) -> bool:
        return self.name == module or self.name.startswith(module + ".")


def absolute(node: ast.ImportFrom, path: str) -> str:
    """`from ..x import y` in rl/rollout/a.py -> "rl.x"."""
    if not node.level:
        return node.module or ""
    package = path.split("/")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, `importlib.import_module("x")` and `__import__("x")` included."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, path)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_top)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, at_top)
        inner = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source), at_top=True)


def broken_rules(source: str, path: str) -> list[str]:
    """What the file at `path` (relative, with slashes) may not do, as `path:line: reason`."""
    room, stem = path.split("/")[0], Path(path).stem
    reasons = []
    if stem in LIBRARIES or stem in sys.stdlib_module_names:
        reasons.append((1, f"is named after the module {stem}, which it would hide when run as a script"))
    for imported in imports(source, path):
        top = imported.name.split(".")[0]
        if top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]:
            reasons.append((imported.line, f"{room} may not import {top}"))
        if top == "tests":
            reasons.append((imported.line, "no room imports tests"))
        if top in ONLY_IN and path not in ONLY_IN[top]:
            reasons.append((imported.line, f"{top} is imported only in {', '.join(sorted(ONLY_IN[top]))}"))
        if top in NEVER_IN.get(room, set()):
            reasons.append((imported.line, f"{room} imports no {top}"))
        if any(imported.reaches(module) for module in NOT_FROM.get(room, set())):
            reasons.append((imported.line, f"{room} may not use {imported.name}"))
        late = WHERE_USED | LIGHT.get(room, set())
        if imported.at_top and top in late and not path.endswith(KERNEL_FILE):
            reasons.append((imported.line, f"{top} is imported where it is used, not at the top"))
    return sorted({f"{path}:{line}: {reason}" for line, reason in reasons})


def files() -> list[Path]:
    return [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def test_every_file_keeps_to_the_floor_plan() -> None:
    found = files()
    assert {path.relative_to(ROOT).parts[0] for path in found} >= {"conf", "model"}, "the lint reads no files"
    broken = []
    for path in found:
        broken += broken_rules(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not broken, "\n" + "\n".join(broken)


def test_every_room_has_a_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(MAY_IMPORT), "a new top-level package needs its place in the floor plan"


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("conf/load.py", "import torch", "conf imports no torch"),
        ("conf/x.py", "from torch.nn import Module", "conf imports no torch"),
        ("conf/x.py", "def f():\n    import torch", "conf imports no torch"),
        ("conf/x.py", "import model.hf", "conf may not import model"),
        ("model/x.py", "from data.packing import pack", "model may not import data"),
        ("data/x.py", "import model", "data may not import model"),
        ("data/tasks/x.py", "from train import loop", "data may not import train"),
        ("train/x.py", "from rl.loop import run", "train may not import rl"),
        ("train/x.py", "if TYPE_CHECKING:\n    import rl.messages", "train may not import rl"),
        ("train/x.py", "import importlib\nimportlib.import_module('rl.loop')", "train may not import rl"),
        ("rl/x.py", "import launch.report", "rl may not import launch"),
        ("rl/x.py", "from train.loop import fit", "rl may not use train.loop.fit"),
        ("rl/x.py", "from train import loop", "rl may not use train.loop"),
        ("rl/rollout/x.py", "from ...train import loop", "rl may not use train.loop"),
        ("launch/x.py", "import bench", "launch may not import bench"),
        ("bench/x.py", "from launch.stage import main", "bench may not import launch"),
        ("train/x.py", "import tests.conftest", "no room imports tests"),
        ("train/loop.py", "import deepspeed", "deepspeed is imported only in"),
        ("train/loop.py", "def f():\n    __import__('deepspeed')", "deepspeed is imported only in"),
        ("launch/demo.py", "from hydra import compose", "hydra is imported only in"),
        ("conf/validate.py", "from omegaconf import OmegaConf", "omegaconf is imported only in"),
        ("model/hf.py", "import safetensors.torch", "safetensors is imported where it is used"),
        ("model/hf.py", "class A:\n    from transformers import AutoConfig", "transformers is imported where"),
        ("train/metrics.py", "import wandb", "wandb is imported where it is used"),
        ("model/ops/x/streaming.py", "try:\n    import triton\nexcept ImportError:\n    pass", "triton is imported"),
        ("train/types.py", "", "is named after the module types"),
        ("launch/wandb.py", "", "is named after the module wandb"),
    ],
)
def test_the_lint_reports_what_it_should(path: str, source: str, reason: str) -> None:
    assert any(reason in line for line in broken_rules(source, path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/engine.py", "import deepspeed"),
        ("train/parallel/ep.py", "from deepspeed.moe import layer"),
        ("conf/load.py", "from hydra import compose\nfrom omegaconf import OmegaConf"),
        ("launch/stage.py", "from rl.loop import run\nfrom train.loop import fit"),
        ("rl/loop.py", "from train.engine import Engine\nfrom . import advantage"),
        ("model/hf.py", "def read():\n    from safetensors import safe_open"),
        ("model/ops/x/kernel.py", "import triton"),
        ("train/metrics.py", "def start():\n    import wandb"),
        ("data/tokenizer.py", "from tokenizers import Tokenizer"),
        ("model/data_types.py", "from model.ops import common"),
    ],
)
def test_the_lint_lets_the_rest_pass(path: str, source: str) -> None:
    assert broken_rules(source, path) == []


def loaded_by(statement: str, watched: set[str]) -> set[str]:
    """Which of `watched` a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules) & {watched!r}))"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.PIPE, text=True)
    return set(run.stdout.split())


def test_model_needs_torch_alone() -> None:
    watched = LIGHT["model"] | {"omegaconf", "data", "train", "rl", "torch"}
    assert loaded_by("import model", watched) == {"torch"}


def test_conf_needs_no_torch() -> None:
    statement = "import conf.schema, conf.convert, conf.validate, conf.load"
    assert loaded_by(statement, {"torch", "model", "data", "hydra"}) == {"hydra"}  # hydra: the probe sees what is there


def test_no_script_hides_a_room_from_those_beside_it() -> None:
    """`python launch/x.py` looks for modules in launch/ first: a launch/data.py would be `data` to all of them."""
    rooms = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()}
    assert {"data", "launch"} <= rooms
    assert not rooms & {script.stem for script in (ROOT / "launch").glob("*.py")}
