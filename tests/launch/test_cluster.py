"""The launch scripts: two nodes on loopback; Slurm's side played by small programs on PATH.

`srun`, `scancel` and `scontrol` behave as the real ones do where it matters: `srun` turns SIGTERM into SIGKILL for its
tasks, `scancel --signal` reaches every process of a step and not the batch script, and sbatch runs a copy of the
script. What the script decides is tested with an interpreter that only plays a run; what it leads to, with real runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch/cluster"
TORCHRUN = str(CLUSTER / "torchrun.sh")
RUN = (
    "+stage=pretrain model=tiny model.num_hidden_layers=2 model.hidden_size=64 model.vocab_size=512"
    " data.source=synthetic data.tokenizer=bytes data.seq_len=64 train.log_every=1 train.threads=1 tracker=none"
).split()
OURS = ("SLURM_", "MASTER_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "NNODES", "NPROC", "NODE_RANK", "MAX_RESTARTS")

SRUN = r"""#!/usr/bin/env bash
# starts the tasks, each in a session of its own, writes their ids into $FAKE/step, ends with the worst status
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
trap 'kill -KILL $(<"$FAKE/step")' TERM
for ((i = 0; i < tasks; i++)); do
    SLURM_NODEID=$i SLURMD_NODENAME=n$((i + 1)) setsid "$@" &
    ids+=($!)
done
echo "${ids[@]}" >"$FAKE/step"
worst=0
for id in "${ids[@]}"; do
    while kill -0 "$id" 2>/dev/null; do wait "$id"; done
    wait "$id" || worst=$?
done
exit $worst
"""
SCANCEL = r"""#!/usr/bin/env bash
[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] || exit 1
for id in $(<"$FAKE/step"); do kill -TERM -- "-$id"; done
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'n1\nn2\n' ;;
    "show job") echo "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}" ;;
    "requeue $SLURM_JOB_ID") echo "$2" >>"$FAKE/requeued"; exit "${REQUEUE_STATUS:-0}" ;;
    *) exit 1 ;;
esac
"""
PLAYED = r"""#!/usr/bin/env bash
# an interpreter that does $PLAY in the place of torchrun, and shows what it would have started
case "$*" in
    -Pc*) echo "$FAKE/run" ;;
    -c*torch*) echo 8 ;;
    *) echo "node ${NODE_RANK:-}: $* threads=$OMP_NUM_THREADS share_store=$((!TORCH_DISABLE_SHARE_RDZV_TCP_STORE))"
       cd "$FAKE/run" && eval "${PLAY:-true}" ;;
esac
"""


def environment(**given: str) -> dict[str, str]:
    """This one's, without what a surrounding job may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    fixed = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return kept | fixed | given


def processes(mark: str) -> dict[int, bytes]:
    """Process id -> environment, of every process that was started with `mark` in it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"CLUSTER_TEST={mark}\0".encode() in variables:
            found[int(folder.name)] = variables
    return found


@contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; nothing that came from it is left behind, however the test ends."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env | {"CLUSTER_TEST": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
        assert not processes(mark), "it ended, and left processes behind"
    finally:
        while left := processes(mark):
            for each in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}:\n{process.stdout.read() if process.stdout else ''}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_bash_can_read_it(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(CLUSTER / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Two real nodes


def test_two_nodes_take_the_steps_of_one_run(tmp_path: Path) -> None:
    run, last = tmp_path / "run", 6
    command = ["bash", TORCHRUN, *RUN, f"output_dir={run}", f"train.steps={last}"]
    env = environment(NNODES="2", NPROC="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with started(command, env) as one, started(command, env) as other:
        outputs = [process.communicate(timeout=120)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), "\n".join(outputs)
    assert sum("writing hf/" in output for output in outputs) == 1, "rank 0 alone speaks"
    assert steps(run) == list(range(1, last + 1))
    tokens = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    assert tokens > 64 * last, "a process takes 64 tokens a step at most, two of them take two sequences"
    assert (run / "hf/config.json").is_file() and not (run / "error.txt").exists()


# What torchrun.sh starts


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with the played programs, and `run` in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "bin").mkdir()
    programs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "python": PLAYED}
    for name, source in programs.items():
        (tmp_path / "bin" / name).write_text(source)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def played(fake: Path, **given: str) -> dict[str, str]:
    return environment(FAKE=str(fake), PYTHON=str(fake / "bin/python"), **given)


def torchrun(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", TORCHRUN, "+stage=pretrain", "data.path=a b"]
    return subprocess.run(command, cwd=env["FAKE"], env=env, capture_output=True, text=True, check=False)


def test_one_node_needs_no_variables(fake: Path) -> None:
    env = played(fake)
    del env["OMP_NUM_THREADS"]
    done = torchrun(env)
    threads = max(1, len(os.sched_getaffinity(0)) // 8)
    assert done.stdout == (
        "node : -m torch.distributed.run --nnodes=1 --nproc-per-node=8 --max-restarts=0 --standalone"
        f" {ROOT}/launch/stage.py +stage=pretrain data.path=a b threads={threads} share_store=0\n"
    )


def test_several_nodes_need_a_place_to_meet(fake: Path) -> None:
    done = torchrun(played(fake, NNODES="2"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "MASTER_ADDR is not set and NNODES=2" in line


# Slurm


@contextmanager
def sbatch(
    fake: Path, env: dict[str, str], *arguments: str, nodes: int = 1, text: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The batch script, or `text`, as sbatch runs it."""
    copy = fake / "slurm_script"
    copy.write_text(text or (CLUSTER / "slurm.sbatch").read_text())
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": str(nodes)}
    job |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "2", "FAKE": str(fake)}
    job |= {"PATH": f"{fake}/bin:{env['PATH']}"}
    with started(["bash", str(copy), *arguments], env | job) as shell:
        yield shell


def ended(shell: subprocess.Popen[str]) -> tuple[int, str]:
    output = shell.communicate(timeout=120)[0]
    return shell.returncode, output


def requeued(fake: Path) -> list[str]:
    return (fake / "requeued").read_text().split() if (fake / "requeued").exists() else []


def test_slurm_starts_one_torchrun_a_node_and_they_meet_on_the_first(fake: Path) -> None:
    with sbatch(fake, played(fake, SLURM_RESTART_COUNT="3"), "+stage=pretrain", "data.path=a b", nodes=2) as shell:
        status, output = ended(shell)
    assert status == 0 and not requeued(fake)
    expected = []
    for i in range(2):
        meet = f"--rdzv-backend=c10d --rdzv-endpoint=n1:21234 --rdzv-id=41234.3 --rdzv-conf=is_host={1 - i}"
        options = f"--nnodes=2 --nproc-per-node=8 --max-restarts=3 {meet} --local-addr=n{i + 1}"
        stage = f"{ROOT}/launch/stage.py +stage=pretrain data.path=a b"
        expected.append(f"node {i}: -m torch.distributed.run {options} {stage} threads=1 share_store=0")
    assert sorted(output.splitlines()) == expected


def test_a_step_that_slurm_preempts_is_put_back_into_the_queue(fake: Path) -> None:
    with sbatch(fake, played(fake, PLAY="echo step 7 >preempted; exit 1")) as shell:
        status, output = ended(shell)
    assert (status, requeued(fake)) == (143, ["41234"]) and "saved after step 7; back in the queue" in output


def test_a_step_that_slurm_preempts_before_it_can_save_is_put_back_too(fake: Path) -> None:
    with sbatch(fake, played(fake, PLAY="exit 1", PREEMPTED="2026-01-02T00:00:00")) as shell:
        status, output = ended(shell)
    assert (status, requeued(fake)) == (143, ["41234"]) and "not saved; back in the queue" in output


def test_a_job_that_cannot_be_requeued_says_how_to_go_on(fake: Path) -> None:
    with sbatch(fake, played(fake, PLAY="echo step 7 >preempted; exit 1", REQUEUE_STATUS="1")) as shell:
        status, output = ended(shell)
    assert status == 143 and "saved after step 7; not requeued: the same sbatch goes on" in output


def test_a_fault_is_not_requeued_though_the_life_before_was_preempted(fake: Path) -> None:
    (fake / "run/preempted").write_text("step 7\n")
    with sbatch(fake, played(fake, PLAY="echo 'OSError: disk gone' >error.txt; exit 3")) as shell:
        status, output = ended(shell)
    assert (status, requeued(fake)) == (3, []) and "failed: OSError: disk gone" in output


def test_a_cancelled_job_stays_cancelled(fake: Path) -> None:
    play = "trap 'echo step 7 >preempted; exit 1' TERM; touch up; while :; do sleep 0.02; done"
    with sbatch(fake, played(fake, PLAY=play)) as shell:
        wait_for((fake / "run/up").exists, shell)
        shell.send_signal(signal.SIGTERM)  # scancel: to the shell and to the step
        for task in (fake / "step").read_text().split():
            os.killpg(int(task), signal.SIGTERM)
        status, output = ended(shell)
    assert (status, requeued(fake)) == (143, []) and "saved after step 7; ended by Slurm or scancel" in output


def test_a_run_whose_time_is_up_saves_and_goes_on_when_it_is_started_again(fake: Path) -> None:
    run, last = fake / "pretrain", 40
    arguments = [*RUN, f"output_dir={run}", f"train.steps={last}", "train.save_every=1000"]
    with sbatch(fake, environment(NPROC="1"), *arguments) as shell:
        wait_for(lambda: len(steps(run)) > 0, shell)
        shell.send_signal(signal.SIGUSR1)  # --signal=B:USR1@300
        status, output = ended(shell)
    assert (status, requeued(fake)) == (143, ["41234"]), output
    saved = int((run / "preempted").read_text().split()[1])
    assert 0 < saved < last and f"saved after step {saved}; back in the queue" in output
    with sbatch(fake, environment(NPROC="1", SLURM_RESTART_COUNT="1"), *arguments) as shell:
        status, output = ended(shell)
    assert (status, requeued(fake)) == (0, ["41234"]), output
    assert f"going on from {run}/checkpoints/step_{saved}" in output
    assert steps(run) == list(range(1, last + 1))
    assert (run / "hf/config.json").is_file() and not (run / "preempted").exists()


def test_a_mistake_ends_the_job_with_its_reason(fake: Path) -> None:
    run = fake / "pretrain"
    with sbatch(fake, environment(MAX_RESTARTS="0"), *RUN, f"output_dir={run}", "train.stepz=3") as shell:
        status, output = ended(shell)
    reason = "unknown key train.stepz: did you mean train.steps?"
    assert (status, requeued(fake)) == (1, [])
    assert reason in output.splitlines()[-1] and reason in (run / "error.txt").read_text()
