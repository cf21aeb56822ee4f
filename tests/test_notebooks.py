"""The notebooks: what they do off Colab and on it, run from top to bottom with small settings."""

import json
import os
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from launch_fakes import Cloud
from PIL import Image
from runs import SMALL, environment, home, newest, photo, summary
from test_readme import load, value_of

from salcl_jax import notebook
from salcl_jax.validation import validate

for package in ("ipykernel", "jupytext", "nbclient"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[test]")
from notebooks import BUILD, COLAB, NAMES, ROOT, cell, code, execute, images, printed, read

STEPS = 60
GUARD = '"google.colab" in sys.modules'
pytestmark = pytest.mark.xdist_group("notebooks")  # the second uses the run of the first


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "notebooks")


@pytest.fixture(scope="module")
def env(shared):
    return environment(shared, block=True) | {"IPYTHONDIR": str(shared / "ipython")}


@pytest.fixture(scope="module")
def settings(shared):
    """Of a run of small scenes that would take a while."""
    fields = SMALL | {
        "batch_size": 8, "eval.batch_size": 16, "eval.limit": 16, "eval.every": 0, "checkpoint.every": 0,
        "eval.localization.kind": "none", "eval.probe_train.kind": "none", "eval.probe_test.kind": "none",
        "log.every": 2, "log.panels": 0, "data.train.scenes.num_train": 32, "weights.mode": "none",
    }  # fmt: skip
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return {"WORKDIR": str(shared / "run"), "STEPS": STEPS, "FIELDS": shlex.join(given)}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_text_form_says(name):
    assert (COLAB / f"{name}.ipynb").read_text() == BUILD.convert(name) == BUILD.convert(name)
    for one in read(name).cells:
        assert not one.get("outputs") and one.get("execution_count") is None


def test_there_are_no_other_notebooks():
    assert {path.stem for path in ROOT.rglob("*.ipynb") if ".venv" not in path.parts} == set(NAMES)
    assert {path.stem for path in COLAB.glob("*.py")} == {*NAMES, "build"}


def test_the_code_comes_in_the_same_way():
    pretrain, explore, tpu = (cell(name, "# @title Code") for name in NAMES)
    assert pretrain == explore
    assert [line.strip() for line in tpu.splitlines() if line not in pretrain] == [
        'checkout = "/content/checkout"'
    ]


def refuse(*command, **_):
    raise AssertionError(f"a command was run: {command}")


@pytest.fixture
def outside(monkeypatch):
    """For cells run in this process, in the folder of the notebooks: no command can be run."""
    monkeypatch.chdir(COLAB)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("run", "Popen", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, refuse)
    for name in ("system", "posix_spawn", "execvp"):
        monkeypatch.setattr(os, name, refuse)


def guarded(name):
    """Cells that look at Colab, behind the settings."""
    found = [source for source in code(name) if GUARD in source and "PREPARE" not in source]
    return [cell(name, "# @title Settings"), *found]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_installed_off_colab(name, outside):
    space = {}
    for source in guarded(name):
        exec(source, space)
    assert Path.cwd() == ROOT and sys.path[0] == str(ROOT)
    assert not [module for module in sys.modules if module.startswith("google.colab")]


@pytest.mark.parametrize("name", NAMES)
def test_on_colab_the_code_is_cloned_and_installed(name, outside, monkeypatch):
    told, colab = [], types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=lambda *at: told.append(["drive.mount", *at]))
    colab.auth = types.SimpleNamespace(authenticate_user=refuse)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(subprocess, "run", lambda command, check: told.append(command))
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    space = {}
    for i, source in enumerate(guarded(name)):
        exec(source, space)
        if i == 0:
            space |= {"REPOSITORY": "URL", "RUNTIME": "tpu", "DRIVE": True}
    clone = ["git", "clone", "--quiet", "URL", "/content/checkout"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-e", "/content/checkout[tpu]"]
    steps = [clone, install, ["drive.mount", "/content/drive"]]
    assert told == (steps[:1] if name == "tpu_vm_coco" else steps)  # and no account in a dry run


@pytest.mark.parametrize("changes", [
    {}, {"PHOTOS": "/my photos/it's"}, {"PHOTOS": "/photos", "NETWORK": "resnet50", "STEPS": 7},
])  # fmt: skip
def test_the_settings_become_a_configuration(changes, monkeypatch):
    calls, space = [], {}
    monkeypatch.setattr(notebook, "train", lambda arguments, workdir: calls.append((arguments, workdir)))
    exec(cell("pretrain_folder", "# @title Settings"), space)
    exec(cell("pretrain_folder", "notebook.train("), space | changes | {"FIELDS": "--config.optim.lr=0.5"})
    ((config, *fields), workdir), *_ = calls
    c = load(config.removeprefix("--config=")).lock()
    given = dict(field.removeprefix("--config.").split("=", 1) for field in fields)
    c.update_from_flattened_dict({name: value_of(value) for name, value in given.items()})
    validate(c)
    assert c.optim.lr == 0.5 and workdir == space["WORKDIR"]
    assert c.data.train.kind == ("folder" if changes else "scenes")
    assert c.data.train.roots == ((changes["PHOTOS"],) if changes else ())
    assert (c.model.name, c.crops.size) == (("resnet50", 224) if "NETWORK" in changes else ("resnet18", 48))
    assert c.total_steps == (7 if "STEPS" in changes else c.total_steps)


@pytest.fixture(scope="module")
def stopped(settings, env, shared):
    """What the training cell says and shows when it is interrupted as Jupyter interrupts cells."""
    from jupyter_client.manager import start_new_kernel

    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    sources = [cell("pretrain_folder", part) for part in ("# @title Settings", "# @title Code")]
    sources = [sources[0], "\n".join(lines), sources[1], cell("pretrain_folder", "notebook.train(")]
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(COLAB))
    said = []
    try:
        for source in sources[:-1]:
            assert client.execute_interactive(source, timeout=60)["content"]["status"] == "ok"
        number = client.execute(sources[-1])
        wait_until(lambda: len(notebook.metrics(settings["WORKDIR"])) > 3)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        while reply["parent_header"].get("msg_id") != number:
            reply = client.get_shell_msg(timeout=60)
        assert reply["content"]["status"] == "ok", reply["content"]
        while client.iopub_channel.msg_ready():
            message = client.get_iopub_msg(timeout=5)
            said.append(message["content"].get("text", ""))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(said), newest(Path(settings["WORKDIR"]))


def wait_until(reached):
    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def trained(stopped, settings, env):
    """Cells of the first notebook; its run continues the one that was stopped."""
    return execute("pretrain_folder", settings, env)


def test_stopping_the_cell_stops_the_run_which_saves(stopped):
    said, step = stopped
    assert "the run saves first" in said and "run this cell again to continue" in said
    assert 0 < step < STEPS


def test_pretrain_continues_and_shows_curves_and_panels(trained, settings):
    workdir = Path(settings["WORKDIR"])
    assert summary(workdir)["steps"] == STEPS
    lines = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and lines[0] == 0 and lines[-1] == STEPS
    curves, panel = images(trained, "notebook.train(")
    assert curves.shape[0] > 300 and curves.std() > 10
    first, last = images(trained, "panels = sorted")
    np.testing.assert_array_equal(panel[..., :3], last[..., :3])
    assert first.shape == last.shape and np.any(first != last)
    assert f"step 0\nstep {STEPS}\n" in printed(trained).replace("\n\n", "\n")
    assert "pretext/loss" in printed(trained) and "untrained" in printed(trained)


@pytest.fixture(scope="module")
def explored(trained, settings, env, shared):
    """Cells of the second notebook with scenes, and again with photos of many proportions in folders."""
    rng = np.random.default_rng(0)
    for i in range(12):
        (shared / "photos" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photo(rng)[0]).resize((70 + 5 * i, 60))
        image.save(shared / "photos" / f"class {i % 2}" / f"{i}.jpg")
    (shared / "photos" / "class 0" / "broken.jpg").write_bytes(b"no photo")
    scenes = {"CHECKPOINT": settings["WORKDIR"], "LIMIT": 24, "SHOWN": 2}
    photos = {"PHOTOS": str(shared / "photos"), "LABELS": "folders", "SHOWN": 1}
    return execute("explore_checkpoint", scenes, env, photos, "open_source(")


def test_explore_shows_maps_and_neighbours_and_probes_objects(explored):
    cells, _ = explored
    assert "24 of 2000 photos of scenes/train" in printed(cells)
    (maps,) = images(cells, "def regions_and_map")
    assert maps.shape[:2] == (2 * (200 + 24) + 6, 4 * (200 + 6) + 6)
    neighbours = [images(cells, part)[0] for part in ("neighbours(model)", "neighbours(untrained)")]
    assert neighbours[0].shape == neighbours[1].shape == (2 * (110 + 24) + 6, 6 * (110 + 6) + 6, 3)
    lines = printed(cells).splitlines()
    figures = [line.split() for line in lines if line.startswith(("trained", "untrained"))]
    assert [name for name, _, _ in figures] == ["trained", "untrained"]
    assert all(0 <= float(value) <= 100 for _, value, _ in figures)


def test_explore_takes_photos_of_any_kind_and_their_folders_as_classes(explored):
    _, cells = explored
    assert "12 of 13 photos" in printed(cells) and "broken.jpg: not_image" in printed(cells)
    assert "10 pictures to fit on, 2 to test on, 2 classes" in printed(cells)
    (neighbours,) = images(cells, "neighbours(model)")
    assert neighbours.shape[0] < 110 + 24 + 6  # all are wider than high


@pytest.fixture
def cloud(tmp_path):
    plan = {"queued-resources describe": [[1, "ERROR: NOT_FOUND: no"], [0, "ACTIVE"]],
            "tpu-vm describe": [[0, "READY"]], "tail -n": [[0, "worker 0: process 0 of 4"]]}  # fmt: skip
    return Cloud(tmp_path / "cloud", plan)


TPU = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "NAME": "pod", "FIELDS": "--config.total_epochs=9"}


def test_a_dry_run_on_a_tpu_vm_prints_everything_and_does_nothing(cloud, env):
    text = printed(execute("tpu_vm_coco", TPU, env | cloud.env))
    assert cloud.log() == []
    lines = [line for line in text.splitlines() if line]
    run = next(line for line in lines if "worker.sh\\ run" in line)
    for part in ("--config=configs/coco.py", "--workdir=gs://b/runs/one", "--config.total_epochs=9",
                 "--config.data.train.data_dir=gs://b/tfds", "--detach"):  # fmt: skip
        assert part in run
    wanted = ["prepare_data.py tfds", "create pod", "git -C", "scp", "tail", "rsync", "stop", "delete pod"]
    assert [sum(part in line for line in lines) for part in wanted] == [1] * len(wanted)
    tpu = [line for line in lines if line.startswith("gcloud compute")]
    assert len(tpu) >= 8 and all(" --zone=z" in line and "--project=p" in line for line in tpu)


def test_without_dry_run_the_slice_is_made_and_never_deleted_by_itself(cloud, env, tmp_path):
    wet = {"DRY_RUN": False, "RUN": "two", "COPY": str(tmp_path / "copy")}
    text = printed(execute("tpu_vm_coco", TPU | wet, env | cloud.env))
    assert "worker 0: process 0 of 4" in text
    done = [" ".join(command) for command in cloud.log("sleep")]
    order = ["create pod", "git -C", "scp", "uv pip install", "worker.sh run --detach", "tail", "rsync"]
    places = [next(i for i, line in enumerate(done) if part in line) for part in order]
    assert places == sorted(places)
    never = (" delete ", "worker.sh stop", "prepare_data")
    assert not [line for line in done if any(part in line for part in never)]
    assert "gs://b/runs/two" in done[-1]
