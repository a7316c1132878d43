"""A job file for a scheduler, from a run's configuration: everything that can be wrong is told before it is queued.

    python launch/cluster/render.py slurm nodes=4 gpus=8 time=24:00:00 +stage=S output_dir=DIR ... > job.sbatch
    python launch/cluster/render.py slurm nodes=256 recipe=deepseek_v3_2 dir=DIR init_from=... > job.sbatch
    python launch/cluster/render.py jobset nodes=4 image=I claim=C +stage=... output_dir=/shared/runs/x > job.yaml
    python launch/cluster/render.py pytorchjob ...

Settings of the job (launch/cluster/job.py: nodes, gpus, time, image, ...) have no dot; the others are the run's. The
file goes to stdout, notes to stderr. Exit status: 0 rendered, 2 the user's mistake. docs/cluster.md
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # works from a bare checkout

import yaml  # noqa: E402  (needs the path above)

from conf.errors import UserError  # noqa: E402
from launch.cluster.job import KINDS, Rendered, parse_job  # noqa: E402
from launch.cluster.pods import jobset, pytorchjob  # noqa: E402

SBATCH = Path(__file__).resolve().parent / "slurm.sbatch"
USAGE = f"usage: python launch/cluster/render.py {'|'.join(KINDS)} [nodes=N gpus=N ...] +stage=S key=value ..."


def slurm(rendered: Rendered) -> str:
    """slurm.sbatch with the job's options at its head and the run's arguments set."""
    job, text = rendered.job, SBATCH.read_text(encoding="utf-8")
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus,
        "time": job.time,
        "signal": f"B:USR1@{job.grace_s}",
    }
    for key, value in options.items():
        line = f"#SBATCH --{key}={value}".replace("\\", r"\\")
        text, found = re.subn(rf"(?m)^#SBATCH --{key}=\S+", line, text)
        assert found == 1, f"{SBATCH} has no line for --{key}"
    extra = {key: getattr(job, key) for key in ("partition", "account", "qos", "constraint")}
    lines = [f"#SBATCH --{key}={value}" for key, value in extra.items() if value]
    text = text.replace("#SBATCH --nodes=", "\n".join([*lines, "#SBATCH --nodes="]), 1)
    given = [f"export MAX_RESTARTS={job.restarts} TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.grace_s - 60}"]
    given += [] if job.gpus else ["export NPROC=1"]
    given += [] if rendered.recipe is None else [f"export RECIPE={shlex.quote(rendered.recipe)}"]
    given += [f"set -- {shlex.join(rendered.arguments)}"]
    text = text.replace("set -uo pipefail\n", "\n".join(["set -uo pipefail", *given, ""]), 1)
    return text.replace("\n", f"\n{_head(rendered)}\n", 1)


def _head(rendered: Rendered) -> str:
    return f"# Made by: {rendered.command}"


def render(kind: str, argv: list[str]) -> tuple[str, tuple[str, ...]]:
    """(the file, notes). Raises UserError."""
    rendered = parse_job(kind, argv)
    if kind == "slurm":
        return slurm(rendered), rendered.notes
    content = {"jobset": jobset, "pytorchjob": pytorchjob}[kind](rendered)
    text = yaml.dump(content, Dumper=_Plain, sort_keys=False, width=1000)
    return f"{_head(rendered)}\n{text}", rendered.notes


class _Plain(yaml.SafeDumper):
    """Without anchors: PyTorchJob's two templates are the same object."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def main(argv: list[str]) -> int:
    try:
        if not argv:
            raise UserError(f"no template is given: {USAGE}")
        text, notes = render(argv[0], argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
