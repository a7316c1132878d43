"""Compiles a module's kernel launches for Hopper (sm_90a) on a machine without a GPU, and reports what ptxas says.

    python -m tests.model.ops.compile_sm90 tests.model.ops.test_kernel_compile_sparse_mla [directory for the PTX]

The named module has `launches()`, which calls the wrappers; its tensors are on the "meta" device. The wrapper chooses
the blocks, Triton specialises and compiles as in a real launch, and nothing is run. Tests call `reports(__name__)`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

COUNTED = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "cp_async": r"cp\.async\.c",
    "e4m3": r"cvt\.rn\.satfinite\.e4m3x2\.f32",
    "atomic": r"\b(?:atom|red)\.\S+",
}


def reports(module: str, directory: str = "") -> list[dict]:
    """One dict a compiled kernel, in the order of the launches; made in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, module, directory]
    result = subprocess.run(command, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    return [json.loads(line) for line in result.stdout.decode().splitlines() if line.startswith("{")]


def report(kernel, ptx_file: Path) -> dict:
    from triton.backends import nvidia

    ptx = kernel.asm["ptx"]
    ptx_file.write_text(ptx)
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    command = [str(ptxas), "-arch=sm_90a", "-v", str(ptx_file), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in COUNTED.items()}
    found["atomic"] = sorted(set(re.findall(COUNTED["atomic"], ptx)))
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled and kernel.asm["cubin"], said
    shape = {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages, "shared": kernel.metadata.shared}
    usage = {"registers": int(registers[1]), "spilled": int(spilled[1]), "serialized": "serialized" in said}
    if found["e4m3"]:
        found["merged_with"] = packed(kernel.asm["cubin"], ptxas.with_name("nvdisasm"))
    return {"name": kernel.metadata.name, **shape, **usage, **found}


def packed(cubin: bytes, nvdisasm: Path) -> dict[str, int]:
    """A register takes two pairs of e4m3, the second conversion merged with what is there: by which instructions that
    was written last (in the order of the listing), and how often."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([str(nvdisasm), file.name], capture_output=True, text=True, check=True).stdout
    written: dict[str, str] = {}
    found: dict[str, int] = {}
    for operation, target, rest in re.findall(r"\*/\s+(?:@!?U?P\d )?\s*([A-Z][\w.]*) (R\d+)[\w.]*, (.*?) ;", listing):
        if operation.startswith("F2FP.SATFINITE.E4M3"):
            merged = rest.split(", ")[2].removesuffix(".reuse")
            if merged != "RZ":
                found[written[merged]] = found.get(written[merged], 0) + 1
        written[target] = operation.split(".")[0]
    assert written, listing[:2000]
    return found


def main(module: str, directory: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    target.get_current_device, target.get_current_stream = lambda: 0, lambda device: 0
    driver.set_active(target)
    kernels, run = [], JITFunction.run
    JITFunction.run = lambda self, *a, **k: kernels.append(run(self, *a, **k | {"warmup": True}))
    with torch.device("meta"):
        importlib.import_module(module).launches()
    for number, kernel in enumerate(kernels):
        path = Path(directory or tempfile.gettempdir()) / f"{number:02}_{kernel.metadata.name}.{os.getpid()}.ptx"
        print(json.dumps(report(kernel, path)), flush=True)
        if not directory:
            path.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:], *[""] * (3 - len(sys.argv)))
