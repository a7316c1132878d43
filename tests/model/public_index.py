"""What DeepSeek-V3.2 publishes (deepseek_v3_2.json), with its ranges spelled out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PUBLIC: dict[str, Any] = json.loads((Path(__file__).parent / "deepseek_v3_2.json").read_text(encoding="utf-8"))
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def expanded(name: str) -> Iterator[str]:
    """`a.{0-2}.b` -> a.0.b, a.1.b, a.2.b; any number of ranges."""
    found = re.search(r"\{(\d+)-(\d+)\}", name)
    if found is None:
        yield name
        return
    for i in range(int(found[1]), int(found[2]) + 1):
        yield from expanded(f"{name[: found.start()]}{i}{name[found.end() :]}")


def public_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors' dtype, shape) of all 92,425."""
    return {
        name: (dtype, tuple(shape))
        for pattern, (dtype, *shape) in PUBLIC["tensors"].items()
        for name in expanded(pattern)
    }
