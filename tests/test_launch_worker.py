"""launch/worker.sh with a program of our own in place of Python: one run at a time, its code is kept."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_fakes import LAUNCH, Cloud, remote_command

pytestmark = pytest.mark.skipif(not shutil.which("flock"), reason="needs flock, as TPU machines have it")
PASSED = ["--config=configs/coco.py:smoke", "--config.crops=(3, 4)", "--config.note=it's  \"$HOME\" \\ *"]


class Worker:
    """A home as tpu_setup.sh leaves it, with `program` (shell) as its Python."""

    def __init__(self, home: Path, program: str):
        self.home = home
        python = home / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/usr/bin/env bash\n{program}\n")
        python.chmod(0o755)
        (home / "salcl_jax").symlink_to(LAUNCH.parent)
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(home)}

    def ssh(self, command: str) -> subprocess.CompletedProcess:
        """As sshd does it; ends when the command has closed its output."""
        shell = ["bash", "-c", command]
        return subprocess.run(shell, env=self.env, capture_output=True, text=True, timeout=30)

    def call(self, words: str) -> subprocess.CompletedProcess:
        return self.ssh(f"bash ~/salcl_jax/launch/worker.sh {words}")

    def status(self) -> str:
        return self.call("status").stdout.removeprefix("status: ").strip()

    def wait(self, status: str) -> None:
        end = time.monotonic() + 20
        while (found := self.status()) != status:
            assert time.monotonic() < end, found
            time.sleep(0.05)

    def text(self, name: str) -> str:
        return (self.home / name).read_text()


SLEEPER = "trap 'echo saved; exit 75' TERM; echo \"$@\"; while :; do sleep 0.05; done"


@pytest.fixture
def sleeper(tmp_path):
    worker = Worker(tmp_path / "home", SLEEPER)
    yield worker
    pid = worker.home / "salcl_jax.pid"
    if worker.status() == "running":
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_arguments_arrive_whole_at_the_program(tmp_path, detach):
    cloud = Cloud(tmp_path / "cloud")
    worker = Worker(tmp_path / "home", 'printf "%s\\n" "$@"; exit 7')
    (command,) = cloud.printed("tpu_run.sh", "--zone=z", *detach, "--", *PASSED)
    result = worker.ssh(remote_command(command))
    worker.wait("7")
    assert result.returncode == (0 if detach else 7), result.stderr
    seen = worker.text("salcl_jax.log") if detach else result.stdout
    assert seen.splitlines() == ["-m", "salcl_jax.main", *PASSED, "--config.distributed=auto"]


def test_status_follows_a_run_from_start_to_end(sleeper):
    assert sleeper.status() == "none"
    started = sleeper.call("run --detach -- --config=a")
    assert started.returncode == 0 and sleeper.status() == "running"
    assert not (sleeper.home / "salcl_jax.exit").exists()
    sleeper.wait("running")
    while "--config=a" not in sleeper.text("salcl_jax.log"):
        time.sleep(0.05)
    assert sleeper.call("stop").returncode == 0
    sleeper.wait("75")
    assert "saved" in sleeper.text("salcl_jax.log")
    assert "no run is alive" in sleeper.call("stop").stdout


def test_a_second_run_is_refused_and_the_same_one_noted(sleeper):
    sleeper.call("run --detach -- --config=a")
    again = sleeper.call("run --detach -- --config=a")
    assert again.returncode == 0 and "alive already" in again.stdout
    for words in ("run --detach -- --config=b", "run -- --config=a"):
        other = sleeper.call(words)
        assert other.returncode == 3 and "a run is alive" in other.stderr
    assert sleeper.text("salcl_jax.log").count("--config=") == 1
    assert sleeper.status() == "running"


def start(sleeper: Worker) -> tuple[int, int]:
    """Numbers of the program, which has begun, and of the shell that waits for it."""
    sleeper.call("run --detach -- --config=a")
    while "--config=a" not in sleeper.text("salcl_jax.log"):
        time.sleep(0.05)
    program = int(sleeper.text("salcl_jax.pid"))
    return program, int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_code_is_kept_when_the_machine_goes_down(sleeper):
    """Everything gets SIGTERM then, the waiting shell too."""
    program, shell = start(sleeper)
    os.kill(shell, signal.SIGTERM)
    os.kill(program, signal.SIGTERM)
    sleeper.wait("75")


def test_a_run_killed_with_its_shell_leaves_no_code_and_can_start_again(sleeper):
    (sleeper.home / "salcl_jax.exit").write_text("0\n")  # of a run before
    program, shell = start(sleeper)
    os.kill(shell, signal.SIGKILL)
    assert sleeper.status() == "running"  # the program still has the chips
    os.kill(program, signal.SIGKILL)
    sleeper.wait("none")
    assert sleeper.call("run --detach -- --config=a").returncode == 0 and sleeper.status() == "running"


def test_output_of_runs_one_after_the_other_is_kept(tmp_path):
    worker = Worker(tmp_path / "home", 'echo "$3"')
    for name in "ab":
        worker.call(f"run --detach -- {name}")
        worker.wait("0")
    assert worker.text("salcl_jax.log") == "a\nb\n"
