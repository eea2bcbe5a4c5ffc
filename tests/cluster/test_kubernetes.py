"""The manifests for Kubernetes: valid, of one piece, and their command run as Kubernetes would run it."""

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubeflow_trainer_api.models as schemas
import pydantic
import pytest
import yaml

from launch import start
from tests.process.fleet import free_port
from train.classify import ClassifySettings
from train.engine.cli import parse_settings

ROOT = Path(__file__).parents[2]
KINDS = {
    "Service": schemas.IoK8sApiCoreV1Service,
    "Job": schemas.IoK8sApiBatchV1Job,
    "TrainJob": schemas.TrainerV1alpha1TrainJob,
}
FREE_KEYS = ("selector", "requests", "limits")  # whose keys are names of the user's
STEPS = 500
SHORT = ["--dataset", "digits", "--model", "mlp", "--tracker", "none", "--log_every", "20", "--eval_every", "20",
         "--num_train_epochs", "100", "--max_train_steps", str(STEPS)]  # fmt: skip


def read(name):
    """Return the documents of a manifest, by kind."""
    text = (ROOT / "launch" / name).read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


JOB, TRAINJOB = read("kubernetes_job.yaml"), read("kubernetes_trainjob.yaml")
DOCUMENTS = JOB | TRAINJOB


def is_valid(document):
    """Say whether the published schema knows every field; the models leave out what they do not know."""
    try:
        return KINDS[document["kind"]].from_dict(document).to_dict() == document
    except pydantic.ValidationError:
        return False


def key_paths(node, path=()):
    """Yield the path to each key whose name the schema sets."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and not (path and path[-1] in FREE_KEYS):
            yield (*path, key)
        yield from key_paths(value, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_valid_and_each_misspelt_field_is_refused(kind):
    assert is_valid(DOCUMENTS[kind])
    paths = [path for path in key_paths(DOCUMENTS[kind]) if path != ("kind",)]
    for *parents, key in paths:
        misspelt = copy.deepcopy(DOCUMENTS[kind])
        parent = misspelt
        for step in parents:
            parent = parent[step]
        parent[key + "s"] = parent.pop(key)
        assert not is_valid(misspelt), (parents, key)
    assert len(paths) > 5


def pods():
    """Return the pod and the container of both manifests, the TrainJob's as its patch of the runtime."""
    pod = JOB["Job"]["spec"]["template"]["spec"]
    (patch,) = TRAINJOB["TrainJob"]["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = job["template"]["spec"]["template"]["spec"]
    return {"Job": (pod, pod["containers"][0]), "TrainJob": (patched, patched["containers"][0])}


def variables():
    return {entry["name"]: entry["value"] for entry in pods()["Job"][1]["env"]}


def test_nodes_and_the_name_of_the_first_are_the_same_everywhere():
    service, job, (pod, _) = JOB["Service"], JOB["Job"], pods()["Job"]
    name = job["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables()["NODES"])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables()["HEAD"] == f"{name}-0.{pod['subdomain']}"


def answer(code, disrupted=False):
    """Return what the Job does about a pod that ended so: the first rule that fits; "Count" if none does."""
    for rule in JOB["Job"]["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and code in codes["values"]:
            assert codes["containerName"] == pods()["Job"][1]["name"]
            return rule["action"]
        condition = {"type": "DisruptionTarget", "status": "True"}
        if disrupted and rule.get("onPodConditions") == [condition]:
            return rule["action"]
    return "Count"


def test_exit_codes_are_answered():
    assert pods()["Job"][0]["restartPolicy"] == "Never"  # else Kubernetes refuses a podFailurePolicy
    assert [answer(start.EXIT_USAGE), answer(start.EXIT_PREFLIGHT)] == ["FailJob", "FailJob"]
    assert [answer(start.EXIT_STOPPED), answer(128 + signal.SIGTERM)] == ["Ignore", "Ignore"]
    assert [answer(start.EXIT_ERROR), answer(128 + signal.SIGKILL)] == ["Count", "Count"]
    assert answer(128 + signal.SIGKILL, disrupted=True) == "Ignore"  # a lost node; a grace period that was too short


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_the_command_is_the_script_s_and_the_run_lies_on_the_claim(kind):
    pod, container = pods()[kind]
    source = container if kind == "Job" else TRAINJOB["TrainJob"]["spec"]["trainer"]
    script, *flags = source["args"]
    settings = parse_settings(ClassifySettings, flags, "")
    assert (ROOT / script).is_file()
    folder = variables()["RUNS"] if kind == "Job" else settings.output_dir
    assert kind == "Job" or settings.run_name
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "persistentVolumeClaim" in volumes[mounted[folder]]
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert set(mounted.values()) == set(volumes)
    caches = {entry["value"] for entry in source["env"] if entry["name"] in ("HF_HOME", "XDG_CACHE_HOME")}
    assert all(any(cache.startswith(path) for path in mounted) for cache in caches)


# ---- The command of the container ------------------------------------------------------------------------------------


@pytest.fixture
def pod(tmp_path):
    """Start a container's command as a process; what is left at the end is killed."""
    started, numbers = [], itertools.count()

    def begin(command, environment):
        base = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        log = tmp_path / f"pod-{next(numbers)}.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=base | environment, stdout=output, stderr=output, start_new_session=True
            )
        started.append(process)
        return process, log

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process, log, text):
    end = time.monotonic() + 60
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def assert_complete(run, steps):
    assert checkpoints(run)[-1] == f"step_{steps:08d}"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "plots/curves.png"):
        assert (run / name).is_file(), name


def begin_all(pod, folder):
    """Start the Job's pods on loopback, with a CPU for each GPU."""
    container, port = pods()["Job"][1], str(free_port())
    command = [
        word.replace("--nproc-per-node gpu", "--nproc-per-node 1").replace("29500", port)
        for word in [*container["command"], *container["args"], *SHORT]
    ]
    place = {"RUNS": str(folder), "HEAD": "127.0.0.1", "HF_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    return [
        pod(command, variables() | place | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(JOB["Job"]["spec"]["completions"])
    ]


@pytest.mark.slow
def test_an_evicted_pod_ends_all_and_the_same_commands_finish_the_run(pod, tmp_path):
    begun = begin_all(pod, tmp_path)
    wait_for(*begun[0], "step 20/")
    begun[1][0].send_signal(signal.SIGTERM)
    codes = [process.wait(60) for process, _ in begun]  # left to themselves, the others wait for the evicted one
    assert [answer(code) for code in codes] == ["Ignore", "Ignore"], (codes, begun[0][1].read_text())
    run = tmp_path / variables()["RUN_NAME"]
    saved = checkpoints(run)[-1]
    assert saved < f"step_{STEPS:08d}"
    begun = begin_all(pod, tmp_path)
    assert [process.wait(60) for process, _ in begun] == [0, 0], begun[0][1].read_text()
    assert f"resuming {run} from step {int(saved[5:])}" in begun[0][1].read_text()
    assert "2 process(es)" in begun[0][1].read_text()
    assert_complete(run, STEPS)


@pytest.mark.slow
def test_the_trainjob_s_command_takes_what_the_runtime_tells(pod, tmp_path):
    trainer = TRAINJOB["TrainJob"]["spec"]["trainer"]
    command = [*trainer["command"], *trainer["args"], *SHORT, "--output_dir", str(tmp_path), "--max_train_steps", "20"]
    runtime = {"NNODES": "1", "NPROC_PER_NODE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {f"PET_{name}": value for name, value in runtime.items()} | {"PET_MASTER_PORT": str(free_port())}
    process, log = pod(command, environment)
    assert process.wait(60) == 0, log.read_text()
    assert "2 process(es)" in log.read_text()
    assert_complete(tmp_path / parse_settings(ClassifySettings, trainer["args"][1:], "").run_name, 20)
