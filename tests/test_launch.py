"""Launch scripts: they parse, and --dry-run prints what would be run without running anything."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
NEEDED = {
    "prepare_coco.sh": ["--data-dir=gs://bucket/tfds"],
    "slurm.sbatch": ["--config=configs/coco.py"],
    "tpu_create.sh": ["--zone=z", "--type=v4-32"],
    "tpu_delete.sh": ["--name=pod", "--zone=z"],
    "tpu_run.sh": ["--zone=z", "--", "--config=configs/coco.py"],
    "tpu_setup.sh": ["--zone=z"],
}


def run(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    """The script with an empty PATH for everything but the basic tools, so nothing real can run."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env}
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20)


def dry_run(script: str, *args: str, **env: str) -> list[list[str]]:
    """The printed commands, split as the shell would split them."""
    result = run(script, "--dry-run", *args, **env)
    assert result.returncode == 0, result.stderr
    text = result.stdout
    return [shlex.split(text)] if "$'" not in text else [[text]]


def test_all_scripts_are_known():
    assert {p.name for p in SCRIPTS} == set(NEEDED)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_is_strict_short_and_executable(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert len(text.splitlines()) < 60
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("script", sorted(NEEDED))
def test_dry_run_prints_and_changes_nothing(script, tmp_path):
    result = run(script, "--dry-run", *NEEDED[script], TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and not result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", sorted(set(NEEDED) - {"slurm.sbatch"}))
def test_unknown_or_missing_arguments_end_with_a_message(script):
    for args in (["--dry-run"], ["--dry-run", "--nonsense"]):
        result = run(script, *args)
        assert result.returncode == 2 and script in result.stderr


def test_create_picks_the_runtime_of_the_chip_and_passes_spot():
    args = dry_run("tpu_create.sh", "--zone=z", "--type=v5litepod-16", "--spot", "--project=p")[0]
    assert args[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    for needed in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
                   "--spot", "--zone=z", "--project=p", "--node-id=salcl"):  # fmt: skip
        assert needed in args


def remote_command(args: list[str]) -> str:
    (command,) = [a for a in args if a.startswith("--command=")]
    return command.removeprefix("--command=")


def test_run_reaches_all_workers_and_keeps_arguments_whole(tmp_path):
    """The remote command line is run here by a shell, with a python that reports its arguments."""
    passed = ["--config=configs/coco.py:smoke", "--config.crops=(3, 4)", "--config.note=it's $HOME"]
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    python.chmod(0o755)
    (tmp_path / "salcl_jax").mkdir()
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}

    args = dry_run("tpu_run.sh", "--zone=z", "--", *passed)[0]
    assert "--worker=all" in args and args[4] == "ssh"
    expected = ["-m", "salcl_jax.main", *passed, "--config.distributed=auto"]
    shell = ["bash", "-c", remote_command(args)]
    out = subprocess.run(shell, env=home, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == expected

    args = dry_run("tpu_run.sh", "--zone=z", "--detach", "--", *passed)[0]
    detached = remote_command(args).replace("sleep 2", "wait")
    subprocess.run(["bash", "-c", detached], env=home, check=True)
    assert (tmp_path / "salcl_jax.log").read_text().splitlines() == expected


def test_setup_installs_on_all_workers_and_deletes_nothing_there():
    text = run("tpu_setup.sh", "--dry-run", "--zone=z").stdout
    assert text.count("--worker=all") == 2
    assert "archive" in text and "pip install" in text and "rm -" not in text


def test_delete_wants_the_name_typed():
    result = run("tpu_delete.sh", "--dry-run", "--zone=z")
    assert result.returncode == 2 and "--name" in result.stderr


def test_slurm_connects_processes_only_when_there_are_several_nodes():
    one = dry_run("slurm.sbatch", "--config=a b")[0]
    assert one[0] == "srun" and one[-2:] == ["--config=a b", "--config.distributed=none"]
    assert dry_run("slurm.sbatch", "--config=a", SLURM_JOB_NUM_NODES="4")[0][-1].endswith("=auto")


def test_slurm_gives_each_process_all_gpus_of_its_node(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "${JAX_LOCAL_DEVICE_IDS-unset}" "$2" "$4"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    for gpus, seen in (("8", "0,1,2,3,4,5,6,7"), ("1", "0"), ("", "unset")):
        result = run("slurm.sbatch", "--config=a", PATH=path, SLURM_GPUS_ON_NODE=gpus)
        assert result.stdout.split() == [seen, "python", "salcl_jax.main"], result.stderr


FAKE_TFDS = """
import os, types
class Config:
    def __init__(self, manual_dir): self.manual_dir = manual_dir
download = types.SimpleNamespace(DownloadConfig=Config)
class builder:
    def __init__(self, name, data_dir):
        print(name, data_dir)
        train = types.SimpleNamespace(num_examples=int(os.environ["COUNT"]))
        self.info = types.SimpleNamespace(splits={"train": train})
    def download_and_prepare(self, download_dir, download_config):
        print(download_dir, download_config.manual_dir)
"""


def test_prepare_coco_calls_tfds_and_counts_the_images(tmp_path):
    (tmp_path / "tensorflow_datasets.py").write_text(FAKE_TFDS)
    env = {"SALCL_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "TMPDIR": "/t"}
    result = run("prepare_coco.sh", "--data-dir=gs://b/tfds", COUNT="118287", **env)
    assert result.returncode == 0, result.stderr
    lines = ["coco/2017 gs://b/tfds", "/t/coco_downloads None"]
    assert result.stdout.splitlines()[:2] == lines
    result = run("prepare_coco.sh", "--data-dir=/d", "--work-dir=/w", COUNT="118286", **env)
    assert result.returncode != 0 and "118286 images instead of 118287" in result.stderr

    manual = tmp_path / "zips"
    manual.mkdir()
    args = ["--data-dir=/d", f"--manual={manual}"]
    result = run("prepare_coco.sh", *args, COUNT="118287", **env)
    assert result.returncode == 1 and "train2017.zip" in result.stderr
    for name in ("train2017", "val2017", "test2017", "annotations_trainval2017",
                 "image_info_test2017"):  # fmt: skip
        (manual / f"{name}.zip").touch()
    result = run("prepare_coco.sh", *args, COUNT="118287", **env)
    assert result.stdout.splitlines()[:2] == ["coco/2017 /d", f"/d/downloads {manual}"]


def test_gke_manifest_is_consistent():
    yaml = pytest.importorskip("yaml")
    text = (LAUNCH / "gke.yaml").read_text()
    assert len(text.splitlines()) < 60
    job = yaml.safe_load(text)
    assert job["kind"] == "JobSet"
    slice_job = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = slice_job["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    container = pod["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert slice_job["parallelism"] == slice_job["completions"]
    assert slice_job["parallelism"] * chips == int(rows) * int(columns)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["command"] == ["python", "-m", "salcl_jax.main"]
    assert "--config.distributed=auto" in container["args"]
