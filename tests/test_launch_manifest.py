"""launch/gke.yaml against a schema of the parts it uses: JobSet v1alpha2, batch/v1 Job, core/v1 Pod."""

import copy
import math
import re
import subprocess

import pytest
from launch_fakes import LAUNCH, Cloud

yaml = pytest.importorskip("yaml")

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
STRINGS = {".*": r".+"}  # any key
EXITS = {"!operator": "In|NotIn", "!values": [int], "containerName": NAME}
CONTAINER = {
    "!name": NAME, "!image": r"\S+", "command": [r"[\s\S]+"], "args": [r"[\s\S]+"], "workingDir": ".+",
    "env": [{"!name": ".+", "value": ".*"}], "ports": [{"!containerPort": int}],
    "resources": {"requests": {r"[a-z./]+": int}, "limits": {r"[a-z./]+": int}},
}  # fmt: skip
POD = {
    "!restartPolicy": "Never|OnFailure", "terminationGracePeriodSeconds": int, "nodeSelector": STRINGS,
    "serviceAccountName": NAME, "hostNetwork": bool, "dnsPolicy": "ClusterFirstWithHostNet|ClusterFirst",
    "!containers": [CONTAINER],
}  # fmt: skip
JOB = {
    "!parallelism": int, "!completions": int, "completionMode": "Indexed", "backoffLimit": int,
    "podFailurePolicy": {"!rules": [{"!action": "FailJob|FailIndex|Ignore|Count", "onExitCodes": EXITS}]},
    "!template": {"metadata": {"annotations": STRINGS, "labels": STRINGS}, "!spec": POD},
}  # fmt: skip
ACTIONS = "FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts"
REASONS = "BackoffLimitExceeded|DeadlineExceeded|FailedIndexes|MaxFailedIndexesExceeded|PodFailurePolicy"
JOB_SET = {
    "!apiVersion": r"jobset\.x-k8s\.io/v1alpha2", "!kind": "JobSet",
    "!metadata": {"!name": NAME, "namespace": NAME, "labels": STRINGS, "annotations": STRINGS},
    "!spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [
            {"!name": r"[A-Za-z]([\w,:]*\w)?", "!action": ACTIONS, "onJobFailureReasons": [REASONS],
             "targetReplicatedJobs": [NAME]}]},
        "network": {"enableDNSHostnames": bool, "subdomain": NAME},
        "!replicatedJobs": [{"!name": NAME, "replicas": int, "!template": {"!spec": JOB}}],
    },
}  # fmt: skip


def problems(value, schema, path="") -> list[str]:
    """What is wrong with `value`. A schema is a type, a pattern, [schema], or {key: schema}, where a key with
    '!' must be there and a key that is a pattern stands for any that match."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [p for i, item in enumerate(value) for p in problems(item, schema[0], f"{path}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is no mapping"]
        known = {key.lstrip("!"): inner for key, inner in schema.items()}
        found = [f"{path}.{key[1:]} is missing" for key in schema if key[0] == "!" and key[1:] not in value]
        for key, item in value.items():
            inner = known.get(key) or next((s for k, s in known.items() if re.fullmatch(k, key)), None)
            found += problems(item, inner, f"{path}.{key}") if inner else [f"{path}.{key} is no field"]
        return found
    if isinstance(schema, str):
        fits = isinstance(value, str) and re.fullmatch(schema, value)
        return [] if fits else [f"{path}={value!r} is not {schema}"]
    return [] if type(value) is schema else [f"{path}={value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def manifest() -> dict:
    text = (LAUNCH / "gke.yaml").read_text()
    assert len(text.splitlines()) < 80
    return yaml.safe_load(text.replace("${IMAGE}", "registry/image:1").replace("${BUCKET}", "bucket"))


def job_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_manifest_has_only_known_fields_of_the_right_type(manifest):
    assert problems(manifest, JOB_SET) == []


@pytest.mark.parametrize("where, key, value", [
    ((), "kind", "Job"), (("spec",), "failurPolicy", {}), (("spec", "failurePolicy"), "maxRestarts", "20"),
    (("spec", "failurePolicy", "rules", 0), "action", "Fail"), (("metadata",), "name", "Salcl_jax"),
])  # fmt: skip
def test_the_schema_notices(manifest, where, key, value):
    broken = copy.deepcopy(manifest)
    inner = broken
    for step in where:
        inner = inner[step]
    inner[key] = value
    assert len(problems(broken, JOB_SET)) == 1
    del inner[key]
    if f"!{key}" in JOB_SET or key in ("action", "name"):
        assert "missing" in problems(broken, JOB_SET)[0]


def test_machines_and_chips_make_up_the_topology(manifest):
    job, pod = job_of(manifest), job_of(manifest)["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == math.prod(map(int, topology.split("x")))
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_program_connects_itself_and_is_not_restarted_where_that_is_no_use(manifest):
    job = job_of(manifest)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "salcl_jax.main"]
    assert "--config.distributed=auto" in container["args"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and job["template"]["spec"]["restartPolicy"] == "Never"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 70]}
    (mend,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (mend["action"], mend["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_command_of_the_readme_fills_in_the_names(tmp_path):
    """With a kubectl that keeps what it is given, and a stand-in for envsubst."""
    cloud = Cloud(tmp_path / "cloud")
    keep = f'#!/bin/sh\necho "$@" > {tmp_path}/args\ncat > {tmp_path}/in\n'
    (cloud.root / "bin" / "kubectl").write_text(keep)
    substitute = cloud.root / "bin" / "envsubst"
    substitute.write_text('#!/bin/sh\nsed -e "s|[$]{IMAGE}|$IMAGE|g" -e "s|[$]{BUCKET}|$BUCKET|g"\n')
    substitute.chmod(0o755)
    lines = (LAUNCH / "README.md").read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("IMAGE=") and line.endswith("kubectl apply -f -")]
    subprocess.run(["bash", "-c", command], env=cloud.env, cwd=LAUNCH.parent, check=True)
    assert (tmp_path / "args").read_text() == "apply -f -\n"
    filled = (tmp_path / "in").read_text()
    assert "${" not in filled and problems(yaml.safe_load(filled), JOB_SET) == []
