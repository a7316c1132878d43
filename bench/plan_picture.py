"""docs/planner.svg: memory of a GPU by kind, a bar for each of a few layouts of the paper's run. Predictions alone.

python -m bench.plan_picture
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from bench.cost import DOCS, STYLE, v3_2
from conf.hardware import load_cluster
from conf.schema import ParallelConfig
from train.job import Job
from train.memory_model import KINDS, Memory, predict
from train.stages import STAGES

LENGTH, STEP_SEQUENCES = 131072, {"sparse_adapt": 480, "dense_warmup": 16}
LAYOUTS: tuple[tuple[str, str, int, int, int, int, bool], ...] = (  # stage, precision, zero, ep, cp, pp, checkpointing
    ("sparse_adapt", "bf16", 3, 16, 16, 1, True),
    ("sparse_adapt", "bf16", 3, 64, 32, 1, True),
    ("sparse_adapt", "fp8", 3, 64, 32, 1, True),
    ("sparse_adapt", "bf16", 3, 64, 128, 1, False),
    ("sparse_adapt", "bf16", 1, 32, 64, 8, True),
    ("dense_warmup", "bf16", 3, 64, 128, 1, False),
)
COLOURS = {
    "weights": "#2563eb",
    "gradients": "#60a5fa",
    "optimiser": "#1e3a8a",
    "activations": "#15803d",
    "indexer": "#86efac",
    "weight_copies": "#d97706",
    "buffers": "#a855f7",
    "workspace": "#94a3b8",
    "kv": "#0f172a",
    "assumed": "#e2e8f0",
}
NAMES = {"weight_copies": "narrowed weights", "assumed": "CUDA, fragmentation", "kv": "KV"}
LEFT, TOP, BAR, STEP, PLOT, RIGHT = 290, 104, 30, 46, 520, 70
WIDTH = LEFT + PLOT + RIGHT


def jobs() -> list[Job]:
    model, found = v3_2(), []
    for name, precision, zero, ep, cp, pp, checkpointing in LAYOUTS:
        sequences = max(1, STEP_SEQUENCES[name] * cp * pp // 2048)
        parallel = ParallelConfig(zero=zero, ep=ep, cp=cp, pp=pp)
        found.append(Job(model, STAGES[name], parallel, 2048, LENGTH, precision, sequences, checkpointing, True))
    return found


def said(job: Job) -> tuple[str, str]:
    parallel = job.parallel
    words = [f"zero {parallel.zero}", f"ep {parallel.ep}", f"cp {parallel.cp}"]
    words += [f"pp {job.pp}"] if job.pp > 1 else []
    again = "recomputes" if job.checkpointing else "keeps all" if job.shape.trunk else "keeps nothing"
    return f"{job.stage.name}, {job.precision}, {again}", " · ".join(words)


def bar(y: float, job: Job, memory: Memory, scale: float, limit: float) -> list[str]:
    """One layout: its two lines of text, a rectangle a kind, the sum."""
    out = []
    for i, line in enumerate(said(job)):
        kind = "head" if i == 0 else ""
        out.append(
            f'<text class="{kind}" x="{LEFT - 10}" y="{y + 12 + 15 * i}" text-anchor="end">{escape(line)}</text>'
        )
    x = float(LEFT)
    parts = {**memory.kinds, "assumed": memory.outside + memory.margin}
    for kind, count in parts.items():
        wide = count * scale
        if wide >= 0.3:
            title = f"<title>{escape(NAMES.get(kind, kind))}: {count / 1e9:.1f} GB</title>"
            place = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}"'
            out.append(f'<rect {place} fill="{COLOURS[kind]}">{title}</rect>')
        x += wide
    mark = LEFT + limit * scale
    x = mark if mark - 30 < x < mark else x  # the number stands beside the line, not on it
    out.append(f'<text x="{x + 7:.1f}" y="{y + 20}">{memory.total / 1e9:.0f}</text>')
    return out


def picture() -> str:
    found = [(job, predict(job)) for job in jobs()]
    limit = load_cluster("h800_2048").gpu.memory_gb * 1e9
    most = max(limit, *(memory.total for _, memory in found))
    scale, height = PLOT / most, TOP + STEP * len(found) + 44
    body = ['<text class="title" x="16" y="28">DeepSeek-V3.2 at 128K on 2,048 H800: memory of a GPU, GB</text>']
    shown = [kind for kind in (*KINDS, "assumed") if kind != "kv"]
    for i, kind in enumerate(shown):
        x, y = 16.0 + (i % 5) * 160, 46 + 20 * (i // 5)
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        body.append(f'<text x="{x + 18}" y="{y + 10}">{escape(NAMES.get(kind, kind))}</text>')
    base = TOP + STEP * len(found) - 8
    for tick in range(0, int(most / 1e9) + 1, 20):
        x = LEFT + tick * 1e9 * scale
        body.append(f'<path class="grid" d="M{x:.1f} {TOP - 8}V{base}"/>')
        body.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{tick}</text>')
    for i, (job, memory) in enumerate(found):
        body += bar(TOP + STEP * i, job, memory, scale, limit)
    x = LEFT + limit * scale
    body.append(f'<path class="mark" d="M{x:.1f} {TOP - 14}V{base}"/>')
    body.append(f'<text x="{x:.1f}" y="{base + 34}" text-anchor="middle">an H800 has 80</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>{"".join(body)}</svg>\n'
    )


if __name__ == "__main__":
    (DOCS / "planner.svg").write_text(picture(), encoding="utf-8")
