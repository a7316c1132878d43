"""The Speciale profile against the standard one, from one base and on the same prompts: is it longer and no worse?

Both presets scaled down alike to the tiny model: a standard answer may have 24 tokens, a Speciale answer 96 (the
presets' own 64K would be 20 times what any answer here needs), under the presets' length penalties. Held-out answers
are drawn under each profile's own limit.
"""

from __future__ import annotations

from typing import Any

from bench.adapted import OUT, adapted, evaluation, read_rows, stage, without
from bench.registry import benchmark

PROFILES = {
    "standard": "rl=standard rl.max_new_tokens=24",
    "speciale": "rl=speciale rl.max_new_tokens=96 rl.pack_len=1024",
}
POLICY = "train.steps=40 rl.eval_every=0 train.seed=0"


@benchmark
def speciale() -> dict[str, Any]:
    """Speciale against standard on the same prompts: length and accuracy (about 12 minutes on two cores)."""
    given = {name: without(line, "rl.length_penalty") for name, line in adapted()["commands"].items()}
    rows = []
    for name, profile in PROFILES.items():
        folder = OUT / f"profile_{name}"
        stage(f"{given['grpo']} {profile} {POLICY} output_dir={folder}", ranks=2)
        found = evaluation(OUT / f"profile_{name}_eval", f"{given['grpo_eval']} {profile} init_from={folder}")
        rows.append(
            {
                "profile": name,
                "accuracy": round(found["reward/accuracy"], 3),
                "length": round(found["rollout/length_mean"], 1),
                "truncated": round(found["rollout/truncated_frac"], 3),
                "by_domain": found["by_domain"],
                "lengths": [round(row["rollout/length_mean"], 1) for row in read_rows(folder)],
            }
        )
        print(rows[-1], flush=True)
    standard, relaxed = rows
    passed = relaxed["length"] > standard["length"] and relaxed["accuracy"] >= standard["accuracy"]
    return {"config": {"profiles": PROFILES, "grpo": given["grpo"], "policy": POLICY}, "rows": rows, "passed": passed}
