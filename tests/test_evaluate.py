"""The evaluation as users start it: what it refuses, what it leaves, and that it judges the right network."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from salcl_jax import checkpoint, cli, config_record, evaluate, tasks
from salcl_jax import config as lib
from salcl_jax.evaluators import TASKS
from salcl_jax.judge import Subject
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init

ROOT = Path(__file__).parents[1]
TINY = {
    "model.width": 4, "model.projector_hidden": 16, "model.projector_out": 16, "model.predictor_hidden": 16,
    "seed": 3, "saliency.stages": ("stage3",), "saliency.size": 48, "roi.count": 2,
}  # fmt: skip
# Fields of a command that make it quick: a few small scenes.
QUICK = {
    "eval.size": 48, "eval.batch_size": 16, "data.workers": 1, "tasks.limit": 24, "tasks.pixels": 4,
    "tasks.linear.epochs": 2, "tasks.voc_svm.shots": "(1,)", "tasks.voc_svm.samples": 1, "tasks.jobs": 1,
    "tasks.segmentation.size": 48, "tasks.segmentation.epochs": 1, "tasks.segmentation.rates": "(0.1,)",
    "tasks.semi.rates": "(0.1,)", "tasks.semi.multipliers": "(10.0,)", "tasks.semi.epochs": 2,
    "tasks.semi.batch_size": 16, "tasks.localization.gallery": 2,
}  # fmt: skip

pytestmark = pytest.mark.xdist_group("evaluate")  # one process: the command that runs every task runs once


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's workdir with a checkpoint of a tiny network that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    c = lib.base()
    lib.small(c)
    c.update_from_flattened_dict(TINY)
    c = lib.finish(c, devices=1, images=100)
    state = jax.jit(make_init(build(**c.model), c))()
    # Trained: anything but what the same seed gives untrained.
    state = state._replace(params=jax.tree.map(lambda x: x * 1.5, state.params))
    with checkpoint.Checkpointer(str(folder / "checkpoints"), every_steps=0, keep=2) as saved:
        saved.save(7, state, {"fields": config_record.learnt_fields(c), "history": {}}, force=True)
    return folder


def start(*arguments, **options):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    } | options  # fmt: skip
    command = [sys.executable, "-m", "salcl_jax.evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def error_of(*arguments):
    """The one line of a refused command; the platform named does not exist: no device is touched."""
    done = start(*arguments, JAX_PLATFORMS="nonesuch")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


SCENES = "--config=configs/scenes.py:smoke"
REFUSED = {
    "no checkpoint": ([SCENES], ("--checkpoint=DIR",)),
    "no such folder": ([SCENES, "--checkpoint=nonesuch"], ("--checkpoint=nonesuch", "no such folder")),
    "unknown task": ([SCENES, "--checkpoint=.", "--task=knn,knnn"], ("--task=knnn", "voc_svm")),
    "photos not named": (
        ["--config=configs/coco.py", "--checkpoint=.", "--task=segmentation"],
        ("config.tasks.segmentation.train.roots", "must be given"),
    ),
    "masks not named": (
        ["--config=configs/coco.py", "--checkpoint=.", "--task=segmentation",
         "--config.tasks.segmentation.train.roots=('x',)", "--config.tasks.segmentation.test.roots=('x',)"],
        ("config.tasks.segmentation.train.masks", "PNG"),
    ),
    "bucket without a place for results": (
        [SCENES, "--checkpoint=gs://bucket/run"], ("gs://bucket/run", "--out=DIR"),
    ),
    "misspelt field": ([SCENES, "--checkpoint=.", "--config.tasks.knn.kk=(3,)"], ("tasks.knn.kk",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_command_is_one_line_before_any_device(name):
    arguments, words = REFUSED[name]
    line = error_of(*arguments)
    assert all(word in line for word in words), line


def test_photos_that_are_missing_say_how_to_get_them(workdir, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    done = start("--config=configs/coco.py:two_cores", f"--checkpoint={workdir}", "--task=voc_svm",
                 f"--out={tmp_path}", f"--config.data.train.data_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 2
    assert "voc/2007: not prepared" in done.stderr and "tfds build voc/2007" in done.stderr


def test_a_folder_without_checkpoint(tmp_path):
    done = start(SCENES, f"--checkpoint={tmp_path}", "--task=knn")
    assert done.returncode == 2 and "no checkpoint in" in done.stderr


def test_the_tasks_chosen():
    assert evaluate.chosen_tasks(["summary", "knn"], ("knn", "linear")) == ["knn", "linear"]
    with pytest.raises(flags.Error, match="nonesuch"):
        evaluate.chosen_tasks(["nonesuch"], ("knn",))


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/7"])
def test_results_go_beside_the_run(tmp_path, given):
    assert cli.eval_folder(str(tmp_path / given)) == str(tmp_path / "run" / "eval")


def test_results_of_a_file_go_beside_it(tmp_path):
    (tmp_path / "r50.pth").touch()
    assert cli.eval_folder(str(tmp_path / "r50.pth")) == str(tmp_path / "r50-eval")
    assert cli.eval_folder("gs://bucket/runs/one/") == os.path.abspath("eval/bucket_runs_one")


def test_an_error_in_a_later_task_loses_nothing(tmp_path, monkeypatch):
    c = lib.base()
    judge = types.SimpleNamespace(config=c, mesh=types.SimpleNamespace(size=1))
    subjects = [Subject("trained", (), "abc")]
    monkeypatch.setattr(evaluate, "_open", lambda *_: (judge, subjects, 7))
    monkeypatch.setattr(tasks, "about", lambda name, judge: {"protocol": name})

    def run(name, judge, subject):
        if name == "linear":
            raise ValueError("the disk is full")
        return {f"{name}/top1": 0.5}

    monkeypatch.setattr(tasks, "run", run)
    with pytest.raises(ValueError, match="the disk is full"):
        evaluate.evaluate(c, "run", ["knn", "linear"], str(tmp_path))
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["results"] == {"knn": {"trained": {"knn/top1": 0.5}}}
    assert found["about"]["knn"]["protocol"] == "knn" and set(found["about"]) == {"knn"}
    assert found["meta"]["weights"] == "abc"


@pytest.fixture(scope="module")
def report(workdir, tmp_path_factory):
    """What one command leaves that runs every task."""
    cache = tmp_path_factory.mktemp("features")
    fields = QUICK | {"tasks.cache": cache, "eval.branch": "online"}
    every = "linear,knn,semi,voc_svm,multilabel,localization,crops,segmentation"
    done = start(
        SCENES, f"--checkpoint={workdir}", f"--task={every}", f"--out={workdir / 'eval'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads((workdir / "eval" / "eval.json").read_text()), cache


def test_every_task_stands_beside_its_baselines(report):
    done, found, _ = report
    for task, rows in found["results"].items():
        pixels = [] if task in ("semi", "localization", "crops") else ["pixels"]
        assert list(rows) == ["trained", "untrained", *pixels], task
        assert all(name.startswith(f"{task}/") for row in rows.values() for name in row)
    assert set(found["results"]) == set(TASKS)
    assert "untrained" in done.stdout and "pixels" in done.stdout
    assert found["results"]["localization"]["trained"]["localization/images"] == 24
    assert 0 < found["results"]["localization"]["trained"]["localization/mask_ap"] < 1


def test_the_report_says_what_was_judged(report):
    _, found, _ = report
    assert found["meta"]["step"] == 7 and "width 4" in found["meta"]["network"]
    assert "salcl_jax.evaluate" in found["meta"]["command"] and "cpu" in found["meta"]["hardware"]
    assert re.fullmatch("[0-9a-f]{16}", found["meta"]["weights"])
    assert "objects in their boxes" in found["about"]["knn"]["view"]
    assert "central square" in found["about"]["semi"]["view"]
    assert "whole photo" in found["about"]["voc_svm"]["view"]
    assert "24 of " in found["about"]["knn"]["train"] and "cosine" in found["about"]["knn"]["protocol"]


def test_pictures_and_tables_are_there(report, workdir):
    text = (workdir / "eval" / "eval.md").read_text()
    for name in ("localization_gallery", "voc_svm_low_shot", "multilabel_classes", "segmentation_classes"):
        assert (workdir / "eval" / "plots" / f"{name}.png").stat().st_size > 1000
        assert f"plots/{name}.png" in text


def test_the_network_is_the_one_recorded(report, workdir):
    """The configuration file has another width and seed: the checkpoint decides."""
    _, found, _ = report
    knn = found["results"]["knn"]
    assert "seed" in found["meta"] and found["meta"]["seed"] == 3
    assert knn["trained"] != knn["untrained"]


def test_features_are_computed_once(report, workdir, tmp_path):
    _, before, cache = report
    stored = sorted(cache.rglob("*.npy"))
    assert stored
    times = [path.stat().st_mtime_ns for path in stored]
    fields = QUICK | {"tasks.cache": cache, "tasks.baselines": "()"}
    done = start(SCENES, f"--checkpoint={workdir}", "--task=knn", f"--out={tmp_path}",
                 *(f"--config.{name}={value}" for name, value in fields.items()))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "features of" not in done.stderr
    assert sorted(cache.rglob("*.npy")) == stored
    assert [path.stat().st_mtime_ns for path in stored] == times
    again = json.loads((tmp_path / "eval.json").read_text())["results"]["knn"]
    assert again == {"trained": before["results"]["knn"]["trained"]}


def test_another_network_than_the_recorded_one_is_refused(workdir, tmp_path):
    command = (SCENES, f"--checkpoint={workdir}", "--task=knn", f"--out={tmp_path}")
    done = start(*command, "--config.model.width=8")
    assert done.returncode == 2 and done.stderr.count("\n") <= 2
    assert "is of another network" in done.stderr


def test_recorded_fields_replace_those_of_the_file_but_not_those_of_the_command():
    c, record = lib.base(), lib.base()
    record.update_from_flattened_dict({"model.width": 8, "saliency.stages": ("stage2", "stage3"), "seed": 5})
    record.optim.lr = 7.0
    fields = json.loads(json.dumps(config_record.learnt_fields(record)))
    c.saliency.size = 96
    config_record.recall(c, fields | {"gone.field": 1}, ("seed", "model", "saliency"), {"saliency.size": 96})
    assert (c.model.width, c.saliency.stages, c.seed) == (8, ("stage2", "stage3"), 5)
    assert c.saliency.size == 96 and c.optim.lr == lib.base().optim.lr


@pytest.mark.slow
def test_real_photos(photos, workdir, tmp_path):
    fields = {"eval.size": 48, "tasks.limit": 60, "tasks.linear.epochs": 2, "tasks.cache": "none",
              "tasks.voc_svm.shots": "()", "tasks.segmentation.size": 48}  # fmt: skip
    for variant in ("", ":voc", ":bsds"):
        done = start(f"--config=configs/judge.py{variant}", f"--checkpoint={workdir}", f"--out={tmp_path}",
                     *(f"--config.{name}={value}" for name, value in fields.items()),
                     SALCL_DATA=str(photos))  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "eval.json").read_text())["results"]["localization"]["trained"]
    assert np.isfinite(figures["localization/mask_ap"])


@pytest.mark.slow
def test_objects_of_real_photos(photos, workdir, tmp_path):
    fields = {"eval.size": 48, "tasks.limit": 60, "tasks.linear.protocol": "lbfgs", "tasks.cache": "none"}
    done = start("--config=configs/judge.py:objects", f"--checkpoint={workdir}", f"--out={tmp_path}",
                 "--task=linear,knn", *(f"--config.{name}={value}" for name, value in fields.items()),
                 SALCL_DATA=str(photos))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "eval.json").read_text())
    assert all("objects in their boxes" in report["about"][task]["view"] for task in ("linear", "knn"))
    # 80 classes; four in ten objects are persons
    assert 0.1 < report["results"]["knn"]["trained"]["knn/top1"] < 0.9
