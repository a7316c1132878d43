"""What a scheduler must know of a job beside the run's own configuration: nodes, GPUs, time, image, volume.

`parse_job` takes one command line apart: settings named here are the job's, everything else is the run's and is
composed and checked like the run itself would do it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from conf.errors import UserError, nearest
from conf.load import load
from conf.validate import violations

KINDS = ("slurm", "jobset", "pytorchjob")
SLURM_ONLY = ("time", "partition", "account", "qos", "constraint")
POD_ONLY = ("image", "claim", "mount", "root", "namespace", "queue", "cpus", "memory", "shm", "rdma")


@dataclass(frozen=True)
class Job:
    """Settings of a job. `restarts`: of the ranks after a fault, by torchrun under Slurm, of all pods on Kubernetes."""

    name: str = ""  # of the job; the stage's, or the recipe's
    nodes: int = 2
    gpus: int = 8  # of a node; 0: one rank on the CPUs
    restarts: int = 3
    grace_s: int = 300  # between the word that the job must end and its end: a step and a checkpoint must fit
    # Slurm
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    # Kubernetes
    image: str = ""  # with the repository's requirements installed
    claim: str = ""  # PersistentVolumeClaim that all pods mount (ReadWriteMany)
    mount: str = "/shared"
    root: str = "/shared/winnow"  # the repository in the pod
    namespace: str = ""
    queue: str = ""  # Kueue's LocalQueue
    cpus: str = ""  # of a pod
    memory: str = ""  # of a pod, such as 1800Gi
    shm: str = "64Gi"  # of /dev/shm, through which NCCL and data workers talk inside a node
    rdma: str = ""  # RESOURCE:COUNT of the RDMA device plugin, such as rdma/ib:8

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * max(self.gpus, 1)


@dataclass(frozen=True)
class Rendered:
    """A job, the arguments of launch/stage.py or launch/pipeline.py behind it, and the recipe (None: one stage)."""

    job: Job
    arguments: tuple[str, ...]
    recipe: str | None
    command: str  # that renders it again
    notes: tuple[str, ...] = ()


def parse_job(kind: str, argv: Sequence[str]) -> Rendered:
    """`nodes=4 gpus=8 +stage=S key=value ...` or `nodes=4 recipe=NAME [dir=DIR] key=value ...`.

    UserError with a line for every mistake."""
    if kind not in KINDS:
        raise UserError(f"there is no template {kind}: {nearest(kind, KINDS)}")
    broken = [arg for arg in argv if len(arg.splitlines()) > 1]
    if broken:
        raise UserError(f"{broken[0]!r} holds a line break: give the setting on one line")
    hints = get_type_hints(Job)
    settings: dict[str, Any] = {}
    rest: list[str] = []
    wrong: list[str] = []
    for arg in argv:
        key, equals, text = arg.partition("=")
        if key not in hints or not equals:
            rest.append(arg)
        elif hints[key] is int and not text.isdecimal():
            wrong.append(f"{arg}: {key} must be a whole number")
        else:
            settings[key] = int(text) if hints[key] is int else text
    foreign = SLURM_ONLY if kind != "slurm" else POD_ONLY
    wrong += [f"{key}={settings[key]} means nothing to {kind}: leave it out" for key in settings if key in foreign]
    if wrong:
        raise UserError("\n".join(wrong))
    job = Job(**settings)
    recipe = next((arg.removeprefix("recipe=") for arg in rest if arg.startswith("recipe=")), None)
    if recipe is None:
        default, arguments, notes, output = _stage(job, rest)
    else:
        default, arguments, notes, output = _recipe(
            kind, job, recipe, [arg for arg in rest if not arg.startswith("recipe=")]
        )
    job = replace(job, name=job.name or default)
    wrong = [*_misfits(kind, job, output)]
    if wrong:
        raise UserError("\n".join(wrong))
    command = shlex.join(["python", "launch/cluster/render.py", kind, *argv])
    return Rendered(job, tuple(arguments), recipe, command, tuple(notes))


def _stage(job: Job, rest: list[str]) -> tuple[str, list[str], list[str], str]:
    """(name, arguments, notes, output_dir) of a job with one stage."""
    from launch.recipe import resolved_model

    loaded = load(rest)
    config, notes = loaded.config, []
    start = config.init_from
    if start is None and config.stage != "pretrain":
        notes.append(f"init_from is not given: the run takes the newest one before {config.stage} under runs/ there")
    elif start is not None and not Path(start).exists():
        notes.append(f"init_from={start} is not on this machine: only the run can check what its model sets")
    else:
        wrong = violations(replace(config, model=resolved_model(loaded, None)), job.ranks)
        if wrong:
            raise UserError("\n".join(wrong))
    return config.stage.replace("_", "-"), rest, notes, config.output_dir


def _recipe(kind: str, job: Job, name: str, rest: list[str]) -> tuple[str, list[str], list[str], str]:
    """The same of a whole recipe."""
    from launch.recipe import find_recipe, plan, read_recipe

    if kind != "slurm":
        raise UserError(
            f"recipe={name} runs inside one Slurm allocation; for {kind} render its stages (--list) one by one"
        )
    path = find_recipe(name)
    out = next((arg.removeprefix("dir=") for arg in rest if arg.startswith("dir=")), f"runs/{path.stem}")
    overrides = [arg for arg in rest if not arg.startswith("dir=")]
    plan(read_recipe(path), Path(out), overrides, job.ranks)
    return path.stem.replace("_", "-"), ["--dir", out, "--ranks", str(job.ranks), *overrides], [], out


def _misfits(kind: str, job: Job, output: str) -> Iterator[str]:
    for key, least in (("nodes", 1), ("grace_s", 60)):
        if getattr(job, key) < least:
            yield f"{key}={getattr(job, key)} is too few: give {least} or more"
    if kind == "slurm":
        if not re.fullmatch(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|(\d+-)?\d{1,3}:\d{2}(:\d{2})?|\d+", job.time):
            yield f"time={job.time} is no time of Slurm's: give HH:MM:SS or D-HH:MM:SS"
        spaced = [key for key in ("name", *SLURM_ONLY) if re.search(r"\s", getattr(job, key))]
        yield from (f"{key}={getattr(job, key)!r} holds a space: Slurm takes none there" for key in spaced)
        return
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", job.name):
        yield f"name={job.name} must be small letters, digits and -, at most 40: hosts are named after it"
    for key in ("image", "claim"):
        if not getattr(job, key):
            yield f"{kind} needs {key}=...: " + (
                "the container" if key == "image" else "the volume that all pods share"
            )
    if job.rdma and not re.fullmatch(r"[^:]+:\d+", job.rdma):
        yield f"rdma={job.rdma} must be RESOURCE:COUNT, such as rdma/ib:8"
    for key, path in (("output_dir", output), ("root", job.root)):
        if not PurePosixPath(path).is_relative_to(job.mount):
            yield f"{key}={path} is not under mount={job.mount}, the volume that all pods share: give a path there"
