"""The Speciale profile against the standard one, from one base and on the same prompts: is it longer and no worse?

Both presets scaled down alike to the tiny model: a standard answer may have 24 tokens, a Speciale answer 96 (the
presets' own 64K would be 20 times what any answer here needs), under the presets' length penalties. Held-out answers
are drawn under each profile's own limit.
"""

from __future__ import annotations

import shutil
from typing import Any

from bench.adapted import OUT, adapted, by_domain, evaluation, read_rows, stage
from bench.registry import benchmark
from launch.demo import FULL, data, domains

PROFILES = {
    "standard": "rl=standard rl.max_new_tokens=24",
    "speciale": "rl=speciale rl.max_new_tokens=96 rl.pack_len=1024",
}
POLICY = (
    "rl.outcome=task rl.prompts_per_step=24 rl.group_size=16 train.steps=40 optim.lr=2e-4 optim.schedule=cosine"
    " train.seed=0"
)


@benchmark
def speciale() -> dict[str, Any]:
    """Speciale against standard on the same prompts: length and accuracy (about 20 minutes on two cores)."""
    base = adapted()
    rows = []
    for name, profile in PROFILES.items():
        folder, asked = OUT / f"profile_{name}", domains(FULL).rpartition(" rl.outcome")[0]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}_eval", ignore_errors=True)
        stage(f"+stage=grpo init_from={base} {asked} {profile} {POLICY} output_dir={folder}", ranks=2)
        measure = f"+stage=evaluate init_from={folder} {data(FULL)} {asked} {profile} rl.outcome=task"
        found = evaluation(OUT / f"profile_{name}_eval", measure)
        rows.append(
            {
                "profile": name,
                "accuracy": round(found["reward/accuracy"], 3),
                "length": round(found["rollout/length_mean"], 1),
                "truncated": round(found["rollout/truncated_frac"], 3),
                "by_domain": by_domain(found),
                "lengths": [round(row["rollout/length_mean"], 1) for row in read_rows(folder)],
            }
        )
        print(rows[-1], flush=True)
    standard, relaxed = rows
    passed = relaxed["length"] > standard["length"] and relaxed["accuracy"] >= standard["accuracy"]
    return {"config": {"profiles": PROFILES, "policy": POLICY}, "rows": rows, "passed": passed}
