"""Runs and commands as a notebook follows them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from salcl_jax import notebook

ROOT = Path(__file__).parents[1]
pytest.importorskip("IPython", reason="not installed: pip install -e .[test]")


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match="exit code 2:\n(.*\n)*.*roots"):
        notebook.train(["--config=configs/folder.py", "--config.data.train.roots=('none',)"], str(tmp_path))


def test_figures_are_redrawn_when_there_is_something_new(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(notebook, "draw_run", lambda at: drawn.append(len(notebook.metrics(at))))
    script = (
        "import sys, time\nfor i in range(3):\n    time.sleep(0.5)\n"
        "    open(sys.argv[1], 'a').write('{\"step\": 1}\\n{\"st')\n    time.sleep(0.1)\n"
        "    open(sys.argv[1], 'a').write('ep\": 1}\\n')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "metrics.jsonl")])
    notebook._follow(process, tmp_path, every=0.05)
    assert drawn == sorted(drawn) and drawn[0] <= 2 and drawn[-1] >= 4 and len(drawn) <= 6


def test_a_command_prints_as_it_goes_and_its_failure_is_raised(capfd):
    notebook.command(["sh", "-c", "echo one; echo two >&2"])
    assert capfd.readouterr().out == "one\ntwo\n"
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        notebook.command(["sh", "-c", "exit 3"])


def test_a_command_ends_in_time_with_its_children():
    began = time.monotonic()
    notebook.command(["sh", "-c", "sleep 30; echo never"], seconds=0.3)
    assert time.monotonic() - began < 10
