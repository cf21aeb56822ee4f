"""The command line: whatever the user gets wrong is one line on stderr and exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCENES = "--config=configs/scenes.py"


def run(*arguments, cwd=ROOT, platform="cpu", path=()):
    path = os.pathsep.join(map(str, (ROOT, *path)))
    env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "salcl_jax.main", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def error_of(*arguments, **how):
    """The one line; asserts that there is nothing else."""
    done = run(*arguments, **how)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


BROKEN = "def get_config(variant=''):\n    return nothing\n"
COMMANDS = {
    "misspelt field": ([SCENES, "--config.crops.sizee=3"], ("--config.crops.sizee", "did you mean size?")),
    "misspelt section": ([SCENES, "--config.crop.size=3"], ("--config.crop.size", "did you mean crops?")),
    "no field at all": ([SCENES, "--config.zzz=3"], ("--config.zzz: no such field",)),
    "below a number": ([SCENES, "--config.crops.size.x=3"], ("--config.crops.size.x: no such field",)),
    "word for number": ([SCENES, "--config.crops.size=big"], ("--config.crops.size=big", "int")),
    "word for a switch": ([SCENES, "--config.log.tensorboard=maybe"], ("tensorboard=maybe", "boolean")),
    "impossible value": ([SCENES, "--config.crops.area=(1.0,0.2)"], ("config.crops.area", "low <= high")),
    "impossible together": ([SCENES, "--config.crops.size=128"], ("config.crops.size = 128", "canvas = 96")),
    "misspelt option": ([SCENES, "--confg.seed=1"], ("confg.seed",)),
    "stray word": ([SCENES, "batch_size=3"], ("'batch_size=3'", "--config.")),
    "no such file": (["--config=configs/nonesuch.py"], ("configs/nonesuch.py", "no such file", str(ROOT))),
    "no such file, overridden": (["--config=nonesuch.py", "--config.seed=1"], ("nonesuch.py: no such file",)),
    "unknown variant": ([f"{SCENES}:big"], ("configs/scenes.py", "'big'", "this config has", "smoke")),
    "no config": (["--config.seed=1"], ("--config=configs/NAME.py",)),
    "no folder named": (["--config=configs/folder.py"], ("config.data.train.roots",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_or_configuration(name, tmp_path):
    """Refused before any device is touched: the platform named here does not exist."""
    arguments, words = COMMANDS[name]
    line = error_of(*arguments, f"--workdir={tmp_path / 'run'}", platform="nonesuch")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_missing_or_useless_workdir(tmp_path):
    assert "--workdir=DIR" in error_of(SCENES, platform="nonesuch")
    (tmp_path / "file").write_text("")
    line = error_of(SCENES, f"--workdir={tmp_path / 'file' / 'run'}", platform="nonesuch")
    assert "is not a folder that can be written to" in line
    assert "write the folder in full" in error_of(SCENES, "--workdir=~/run", platform="nonesuch")


def test_a_tracker_that_is_not_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    arguments = [SCENES, "--config.log.trackers=('wandb',)", f"--workdir={tmp_path / 'run'}"]
    line = error_of(*arguments, platform="nonesuch", path=(tmp_path,))
    assert "trackers has wandb, but wandb is not installed: pip install -e .[wandb]\n" in line
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_fails_is_named(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    line = error_of(f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path}", platform="nonesuch")
    assert "broken.py: NameError: name 'nothing' is not defined" in line


def test_outside_the_repository_root(tmp_path):
    line = error_of(SCENES, f"--workdir={tmp_path}", cwd=tmp_path, platform="nonesuch")
    assert f"no such file from {tmp_path}" in line and "root of the repository" in line


def test_no_such_platform(tmp_path):
    assert "nonesuch" in error_of(SCENES, f"--workdir={tmp_path}", platform="nonesuch")


def test_a_missing_and_an_empty_folder_of_photos(tmp_path):
    for folder, words in ((tmp_path / "missing", "no such folder"), (tmp_path, "no image files")):
        line = error_of("--config=configs/folder.py", f"--config.data.train.roots=('{folder}',)",
                        f"--workdir={tmp_path / 'run'}")  # fmt: skip
        assert str(folder) in line and words in line


def test_a_tfds_data_set_that_is_not_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    coco = ROOT / "configs" / "coco.py"
    config = [f"--config={coco}"] if coco.exists() else [SCENES, "--config.data.train.kind=tfds"]
    line = error_of(*config, "--config.data.train.name=coco/2017", f"--config.data.train.data_dir={tmp_path}",
                    f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert "coco/2017: not prepared" in line and f"--data_dir={tmp_path}" in line
