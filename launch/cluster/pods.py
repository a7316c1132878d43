"""The same run for Kubernetes, as plain dicts: a JobSet (an Indexed Job, one pod a node), or Kubeflow's PyTorchJob.

Both start launch/cluster/pod.sh in every pod, whose exit status says how the run ended: 143 saved after SIGTERM (a
drain, a preemption), 2 the user's mistake, else a fault. JobSet starts all pods again up to `restarts` times and not
after a mistake; PyTorchJob (`restartPolicy: ExitCode`) starts a pod again from 128 on, so after a save, and faults are
left to torchrun's own restarts.
"""

from __future__ import annotations

from typing import Any

from launch.cluster.job import Job, Rendered

PORT = 29500
MISTAKE = 2


def jobset(rendered: Rendered) -> dict[str, Any]:
    """jobset.x-k8s.io/v1alpha2."""
    job = rendered.job
    meet = [
        {"name": "MASTER_ADDR", "value": f"{job.name}-node-0-0.{job.name}"},
        {"name": "MASTER_PORT", "value": str(PORT)},
    ]
    mistake = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "winnow", "operator": "In", "values": [MISTAKE]},
    }
    nodes: dict[str, Any] = {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [mistake]},
        "template": _pod(rendered, "winnow", meet, restarts=0),
    }
    nodes["template"]["spec"]["restartPolicy"] = "Never"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": nodes}}],
        },
    }


def pytorchjob(rendered: Rendered) -> dict[str, Any]:
    """kubeflow.org/v1. The operator sets MASTER_ADDR, MASTER_PORT and RANK, and asks that the container be called
    pytorch."""
    job = rendered.job
    template = _pod(rendered, "pytorch", [], job.restarts)

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "ExitCode", "template": template}

    specs = {"Master": replicas(1)} | ({"Worker": replicas(job.nodes - 1)} if job.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "nprocPerNode": str(max(job.gpus, 1)),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": specs,
        },
    }


def _metadata(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"name": job.name}
    if job.namespace:
        found["namespace"] = job.namespace
    if job.queue:
        found["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    return found


def _pod(rendered: Rendered, container: str, meet: list[dict[str, Any]], restarts: int) -> dict[str, Any]:
    """The pod's template. `meet`: how the pods find each other, where the controller does not say it."""
    job = rendered.job
    limits = {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    limits |= {key: text for key, text in (("cpu", job.cpus), ("memory", job.memory)) if text}
    if job.rdma:
        resource, count = job.rdma.rsplit(":", 1)
        limits[resource] = count
    environment = [
        {"name": "NNODES", "value": str(job.nodes)},
        {"name": "NPROC", "value": str(max(job.gpus, 1))},
        {"name": "MAX_RESTARTS", "value": str(restarts)},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(job.grace_s - 60)},
        {"name": "LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        *meet,
    ]
    return {
        "spec": {
            "terminationGracePeriodSeconds": job.grace_s,
            "containers": [
                {
                    "name": container,
                    "image": job.image,
                    "workingDir": job.root,
                    "command": ["bash", "launch/cluster/pod.sh"],
                    "args": [argument.replace("$(", "$$(") for argument in rendered.arguments],  # not a variable
                    "env": environment,
                    "ports": [{"containerPort": PORT, "name": "pytorchjob-port"}],  # the operator looks for this name
                    "resources": {"limits": limits} if limits else {},
                    "volumeMounts": [
                        {"name": "shared", "mountPath": job.mount},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}},
            ],
        }
    }
