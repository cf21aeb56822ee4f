"""Launch scripts: --dry-run prints what would be run and runs nothing; a run does what it prints."""

import os
import shutil
import subprocess
import sys

import pytest
from launch_fakes import LAUNCH, SCRIPTS, Cloud, remote_command

NEEDED = {
    "prepare_data.sh": ["--data=coco_plus", "--data-dir=gs://bucket/my photos", "--manual=MANUAL"],
    "slurm.sbatch": ["--config=configs/coco.py", "--config.note=it's a $HOME"],
    "tpu_create.sh": ["--name=pod", "--zone=z", "--type=v4-32", "--spot", "--project=p"],
    "tpu_delete.sh": ["--name=pod", "--zone=z", "--project=p"],
    "tpu_logs.sh": ["--zone=z", "--worker=0-2", "--lines=7"],
    "tpu_resume.sh": ["--name=pod", "--zone=z", "--type=v4-32", "--project=p", "--", "--config=a b"],
    "tpu_run.sh": ["--zone=z", "--detach", "--", "--config=configs/coco.py", "--config.note=it's a $HOME"],
    "tpu_setup.sh": ["--name=pod", "--zone=z", "--project=p"],
    "tpu_stop.sh": ["--zone=z"],
    "worker.sh": ["run", "--", "--config=a b"],
}
STRAIGHT = {"prepare_data.sh", "slurm.sbatch", "tpu_delete.sh", "tpu_logs.sh", "tpu_run.sh", "tpu_setup.sh",
         "tpu_stop.sh"}  # fmt: skip


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")


def needed(script: str, folder) -> list[str]:
    """Arguments for a script; MANUAL becomes a folder with archives."""
    (folder / "zips").mkdir()
    for name in ("train2017", "unlabeled2017"):
        (folder / "zips" / f"{name}.zip").touch()
    return [arg.replace("MANUAL", str(folder / "zips")) for arg in NEEDED[script]]


def test_all_scripts_are_known():
    assert {path.name for path in SCRIPTS} == {*NEEDED, "common.sh"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_is_strict_and_short(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text()
    assert len(text.splitlines()) < 80 and max(map(len, text.splitlines())) <= 120
    if path.name != "common.sh":
        assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
        assert os.access(path, os.X_OK)


def test_shellcheck_finds_nothing():
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install -e .[test]")
    found = subprocess.run([shellcheck, "-x", "-S", "style", *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", NEEDED)
def test_help_shows_the_usage(cloud, script):
    result = cloud.run(script, "--help")
    assert result.returncode == 0 and not result.stderr and not cloud.log()
    assert f"launch/{script}" in result.stdout and "set -" not in result.stdout


@pytest.mark.parametrize("script", NEEDED)
@pytest.mark.parametrize("args", [["--nonsense"], ["--dry-run", "--nonsense=1"], []])
def test_unknown_or_missing_arguments_end_with_one_line(cloud, script, args):
    result = cloud.run(script, *args)
    assert result.returncode == 2 and result.stderr.startswith(f"{script}: ")
    assert result.stderr.count("\n") == 1 and not result.stdout and not cloud.log()
    assert not args or "--nonsense" in result.stderr


@pytest.mark.parametrize("script", NEEDED)
def test_a_dry_run_prints_and_does_nothing(cloud, tmp_path, script):
    assert cloud.printed(script, *needed(script, tmp_path))
    assert cloud.log() == [] and cloud.files() == []


@pytest.mark.parametrize("script", sorted(STRAIGHT))
def test_a_run_does_what_the_dry_run_prints(cloud, tmp_path, script):
    args, env = needed(script, tmp_path), {"SLURM_JOB_ID": "7"}
    printed = cloud.printed(script, *args, **env)
    (cloud.root / "plan").write_text('{"srun": [[75, "saved"]]}')
    result = cloud.run(script, *args, **env)
    assert result.returncode == (75 if script == "slurm.sbatch" else 0), result.stderr
    assert cloud.log() == [command for command in printed if command[0] != "mkdir"]
    assert cloud.files() == (["salcl_jax_data"] if script == "prepare_data.sh" else [])


def test_create_asks_for_the_slice_and_waits_for_it(tmp_path):
    states = [[1, "ERROR: NOT_FOUND: no"], [0, "ACCEPTED"], [0, "WAITING_FOR_RESOURCES"], [0, "ACTIVE"]]
    plan = {"queued-resources describe": states, "tpu-vm describe": [[0, "READY"]]}
    cloud = Cloud(tmp_path / "cloud", plan)
    printed = cloud.printed("tpu_create.sh", *NEEDED["tpu_create.sh"])
    result = cloud.run("tpu_create.sh", *NEEDED["tpu_create.sh"])
    assert result.returncode == 0, result.stderr
    assert [command[4] for command in cloud.log("sleep")] == ["describe", "create", *["describe"] * 4]
    assert {tuple(command) for command in cloud.log("sleep")} == set(map(tuple, printed))
    (create,) = [command for command in printed if "create" in command]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    options = "--node-id=pod --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base --spot"
    assert set(create[6:]) == {*options.split(), "--zone=z", "--project=p"}


@pytest.mark.parametrize("chip, runtime", [("v6e-16", "v2-alpha-tpuv6e"), ("v5p-32", "v2-alpha-tpuv5"),
                                           ("v5litepod-16", "v2-alpha-tpuv5-lite")])  # fmt: skip
def test_create_picks_the_runtime_of_the_chip(cloud, chip, runtime):
    create = cloud.printed("tpu_create.sh", "--zone=z", f"--type={chip}")[-1]
    assert f"--runtime-version={runtime}" in create and "--spot" not in create
    create = cloud.printed("tpu_create.sh", "--zone=z", f"--type={chip}", "--version=own")[-1]
    assert "--runtime-version=own" in create and not any("--project" in arg for arg in create)


@pytest.mark.parametrize("states, code, message, creates", [
    ([[0, "FAILED"]], 1, "will not become active (FAILED)", 0),
    ([[1, "NOT_FOUND"], [0, "SUSPENDED"]], 1, "will not become active (SUSPENDED)", 1),
    ([[1, "no permission"]], 1, "no permission", 0),
    ([[0, "PROVISIONING"]], 1, "not active after 1 minutes", 0),
])  # fmt: skip
def test_create_says_why_there_is_no_slice(tmp_path, states, code, message, creates):
    cloud = Cloud(tmp_path / "cloud", {"queued-resources describe": states})
    result = cloud.run("tpu_create.sh", "--zone=z", "--type=v4-8", "--wait-minutes=1")
    assert result.returncode == code and message in result.stderr
    assert sum("create" in command for command in cloud.log()) == creates


def test_delete_and_resume_want_the_name_typed(cloud):
    for script, rest in (("tpu_delete.sh", []), ("tpu_resume.sh", ["--type=v4-8", "--", "--config=a"])):
        result = cloud.run(script, "--dry-run", "--zone=z", *rest)
        assert result.returncode == 2 and "--name is needed" in result.stderr


def test_setup_installs_on_all_workers_and_deletes_nothing_there(cloud):
    archive, copy, install = cloud.printed("tpu_setup.sh", "--zone=z")
    assert archive[:2] == ["git", "-C"] and archive[2] == str(LAUNCH.parent) and archive[-1] == "HEAD"
    assert "--worker=all" in copy and "--worker=all" in install and copy[5] in archive[-2]
    assert "pip install" in remote_command(install) and "rm -" not in remote_command(install)
    assert subprocess.run(["bash", "-n", "-c", remote_command(install)]).returncode == 0


def test_setup_leaves_no_archive_behind(cloud):
    archive = cloud.printed("tpu_setup.sh", "--zone=z")[1][5]
    with open(archive, "w"):  # what git would write
        assert cloud.run("tpu_setup.sh", "--zone=z").returncode == 0 and cloud.files() == []


def test_logs_carry_the_number_of_their_worker(cloud, tmp_path):
    (command,) = cloud.printed("tpu_logs.sh", "--zone=z", "--lines=2")
    assert "--worker=all" in command
    (tmp_path / "salcl_jax.log").write_text("old\none\ntwo\n")
    once = remote_command(command).replace(" -F ", " ")
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOSTNAME": "t1v-n-1a2b-w-13"}
    out = subprocess.run(["bash", "-c", once], env=env, capture_output=True, text=True, check=True).stdout
    assert out == "worker 13: one\nworker 13: two\n"


def test_slurm_connects_processes_only_when_there_are_several_nodes(cloud):
    one = cloud.printed("slurm.sbatch", "--config=a b")[0]
    assert one[0] == "srun" and one[-2:] == ["--config=a b", "--config.distributed=none"]
    many = cloud.printed("slurm.sbatch", "--config=a", SLURM_JOB_NUM_NODES="4", SLURM_CPUS_PER_TASK="12")[0]
    assert many[-1] == "--config.distributed=auto"
    assert {"--ntasks-per-node=1", "--cpus-per-task=12", "--kill-on-bad-exit=0"} <= set(many)


def test_slurm_gives_each_process_all_gpus_of_its_node(cloud):
    srun = cloud.root / "bin" / "srun"
    srun.write_text('#!/bin/sh\necho "${JAX_LOCAL_DEVICE_IDS-unset}"\n')
    for gpus, seen in (("8", "0,1,2,3,4,5,6,7"), ("1", "0"), ("", "unset")):
        result = cloud.run("slurm.sbatch", "--config=a", SLURM_GPUS_ON_NODE=gpus)
        assert result.stdout.split() == [seen], result.stderr


@pytest.mark.parametrize("code, cancelled, requeued", [
    (75, False, True), (0, False, False), (2, False, False), (70, False, False), (75, True, False),
])  # fmt: skip
def test_slurm_queues_the_job_again_only_when_the_time_was_up(cloud, code, cancelled, requeued):
    """SIGTERM to the script itself means cancelled or preempted: then it is for Slurm to decide."""
    tell = "kill -TERM $PPID; " if cancelled else ""
    (cloud.root / "bin" / "srun").write_text(f"#!/bin/sh\n{tell}exit {code}\n")
    result = cloud.run("slurm.sbatch", "--config=a", SLURM_JOB_ID="7")
    assert result.returncode == code
    assert cloud.log() == ([["scontrol", "requeue", "7"]] if requeued else [])
