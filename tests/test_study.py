"""Studies: the grid, the statistics of its report, and the command from start to a second start."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from salcl_jax import aot, config_record, study_plan, study_report
from salcl_jax import config as lib
from salcl_jax import study as study_program
from salcl_jax.data import sources
from salcl_jax.study_plan import Run, Study

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.py"))
RNG = np.random.default_rng(0)
CHECK = """
from salcl_jax import config as lib
from salcl_jax.study_plan import Study

def config():
    c = lib.load_module({scenes!r}).get_config("smoke")
    c.eval.linear, c.log.panels, c.checkpoint.every = False, 0.0, 0.5
    c.tasks.baselines = ("untrained",)
    return c

def lost(c):
    c.data.train = lib.source("folder", roots=({lost!r},))

def judge():
    c = config()
    c.saliency.source, c.saliency.stages = "border", ("stage1",)
    return c

def get_study():
    return Study(question="Anything?", config=config, rows={{"byol": lib.plain_byol, "guided": lambda c: None,
                 "same": lib.plain_byol, "lost": lost}}, baseline="byol", judge=judge, seeds=(3,),
                 matched={{"more": ("byol", "guided")}},
                 tasks=("knn", "localization"),
                 figures={{"knn/top1": "k-NN", "localization/corloc": "CorLoc"}})
"""


def study(**fields) -> Study:
    plain = {
        "question": "Anything?", "config": small, "rows": {"byol": lib.plain_byol, "guided": lambda c: None},
        "baseline": "byol", "judge": small, "tasks": ("knn",), "figures": {"knn/top1": "k-NN"},
    }  # fmt: skip
    return Study(**(plain | fields))


def small() -> lib.ConfigDict:
    return lib.load_module(str(ROOT / "configs" / "scenes.py")).get_config("smoke")


def row(name: str, seed: int, **figures: float) -> dict:
    return {
        "row": name, "seed": seed, "config": "c", "judge": "j", "steps": 10, "images": 160,
        "devices": "1 x cpu",
        "flops_per_step": 1e6 if name == "byol" else 1.2e6, "train_seconds": 1.0, "judge_seconds": 2.0,
        "figures": figures, "untrained": {}, "folder": "nowhere",
    }  # fmt: skip


GROUPS = {"scenes": ":small,clutter,plain,pairs,local,maps,regions,weights,schedule",
          "cutouts": ":long,plain,pairs,local,maps,regions,weights,schedule",
          "small_objects": ":long,plain,pairs,local,maps,regions,weights,schedule",
          "photos": ":long,plain,pairs,local,weights,maps"}  # fmt: skip


@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["core", "all groups"])
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_and_its_rows_are_valid(path, groups):
    plan = study_plan.load(f"{path}{groups.get(path.stem, '')}")
    assert len(study_plan.runs(plan)) == len(plan.seeds) * (len(plan.rows) + len(plan.matched))
    assert plan.question and plan.baseline in plan.rows
    names = {study_plan.digest(study_plan.configuration(plan, Run(name, 0))) for name in plan.rows}
    assert len(names) == len(plan.rows)  # no two rows learn the same


def test_dials_of_a_study_combine():
    plan = study_plan.load(f"{ROOT}/configs/studies/scenes.py:small,clutter")
    scenes = plan.config().tasks.localization.test.scenes
    assert scenes.object_size == (0.12, 0.25) and scenes.clutter == 1.0


def test_the_variant_for_clutter_trains_as_the_row_that_its_table_names():
    plan = study_plan.load(f"{ROOT}/configs/studies/scenes.py:small,clutter,long")
    row = study_plan.configuration(plan, Run("zoom", 0)).to_dict()
    shipped = lib.load_module(str(ROOT / "configs" / "scenes.py")).get_config("clutter").to_dict()
    aside = {"eval", "tasks", "log", "checkpoint", "resolved"}  # what looks at the run
    row["data"]["cache"] = shipped["data"]["cache"]
    row["local"]["size"] = shipped["local"]["size"]  # there are no small crops
    assert {k: v for k, v in row.items() if k not in aside} == {
        k: v for k, v in shipped.items() if k not in aside
    }


def test_the_row_of_photos_named_as_what_ships_has_its_pairs_and_weights():
    plan = study_plan.load(f"{ROOT}/configs/studies/photos.py:weights")
    row = study_plan.configuration(plan, Run("cover_geometric", 0))
    for name, variant in (("folder", ""), ("folder", "resnet50"), ("coco", ""), ("imagenet", "")):
        shipped = lib.load_module(str(ROOT / "configs" / f"{name}.py")).get_config(variant)
        assert row.weights.to_dict() == shipped.weights.to_dict()
        assert row.pairs.mix.to_dict() == shipped.pairs.mix.to_dict()
        for field in ("source", "stages", "branch"):
            assert row.saliency[field] == shipped.saliency[field]


def test_the_variant_for_small_objects_guides_as_the_row_that_its_table_names():
    plan = study_plan.load(f"{ROOT}/configs/studies/cutouts.py:long,maps")
    row = study_plan.configuration(plan, Run("border23_clip", 0)).to_dict()
    shipped = lib.load_module(str(ROOT / "configs" / "folder.py")).get_config("small_objects").to_dict()
    for section in ("saliency", "roi", "pairs", "weights", "guidance"):
        assert row[section] == shipped[section]
    assert row["data"]["canvas"] == shipped["data"]["canvas"]


@pytest.mark.parametrize("name", ["photos", "small_objects"])
def test_objects_judges_the_same_networks_by_their_objects(name):
    photos, objects = (study_plan.load(f"{ROOT}/configs/studies/{name}.py{end}") for end in ("", ":objects"))
    assert list(photos.rows) == list(objects.rows)
    for name in photos.rows:
        one, other = (study_plan.digest(study_plan.configuration(s, Run(name, 0))) for s in (photos, objects))
        assert one == other
    assert (photos.judge().tasks.classify.on, objects.judge().tasks.classify.on) == ("image", "object")
    assert study_plan.judge_digest(photos) != study_plan.judge_digest(objects)


@pytest.mark.parametrize("name", ["photos", "scenes", "cutouts", "small_objects"])
def test_runs_of_a_study_have_the_curve_that_its_report_draws(name):
    plan = study_plan.load(f"{ROOT}/configs/studies/{name}.py")
    c = study_plan.configuration(plan, Run(plan.baseline, 0))
    assert 0 < c.eval.every <= 0.5 and plan.curve == "eval/knn/top1"
    assert c.eval.probe_train.kind != "none" and c.eval.probe_test.kind != "none"


def test_photos_to_train_on_are_those_of_three_folders_and_none_that_judge(photos, monkeypatch):
    monkeypatch.setenv("SALCL_DATA", str(photos))
    plan = study_plan.load(f"{ROOT}/configs/studies/photos.py")
    judged = [judge.test for judge in plan.judge().tasks.values() if hasattr(judge, "test")]
    test = [sources.open_source(source.to_dict()) for source in judged if source.kind != "none"]
    held_out = {source.place(i) for source in test for i in range(len(source))}
    source = sources.open_source(plan.config().data.train.to_dict())
    places = [source.place(i) for i in range(len(source))]
    found = Counter(Path(place).parents[1].name for place in places)
    assert found == {"coco_scenes": 2068, "voc_scenes": 1334, "bsds_scenes": 200}
    assert len(held_out) > 4000 and not held_out & set(places)


def test_rows_of_a_study_are_charged_for_no_map_that_nothing_looks_at():
    rows = {
        "map": study_plan.guided({"zoom": 0.5}, **{"pairs.zoom": 3.0}),
        "true": study_plan.guided({"zoom": 0.5}, **{"roi.source": "ground_truth"}),
        "weighted": study_plan.guided(**{"roi.source": "random", "weights.mode": "product"}),
        "plain": study_plan.plain(**{"optim.lr": 0.5}),
    }
    found = {name: lib.base() for name in rows}
    for name, change in rows.items():
        found[name].weights.mode = "none"
        change(found[name])
    drawn = lib.base().saliency.source
    assert [c.saliency.source for c in found.values()] == [drawn, "none", drawn, "none"]
    assert found["map"].pairs.mix.zoom == 0.5 and found["map"].pairs.zoom == 3.0
    assert found["plain"].optim.lr == 0.5 and sum(found["plain"].pairs.mix.values()) == 0


@pytest.mark.parametrize("fields, words", [
    ({"baseline": "plain"}, "no row plain"),
    ({"matched": {"more": ("byol", "nonesuch")}}, "no row nonesuch"),
    ({"rows": {"byol": lib.plain_byol, "a b": lambda c: None}}, "row 'a b'"),
    ({"matched": {"guided": ("byol", "guided")}}, "row 'guided'"),
    ({"seeds": (1, 1)}, "seeds"),
    ({"rows": {"byol": lambda c: c.roi.update(count=0)}}, "row byol: config.roi.count"),
])  # fmt: skip
def test_a_grid_that_cannot_run_is_refused(fields, words):
    with pytest.raises(lib.ConfigError, match=words):
        study_plan._check(study(**fields), "x.py")


@pytest.mark.parametrize("text, words", [
    ("scenes.py:small,map", "scenes.py:small,map: variant 'map' is unknown; this config has: clean, clutter"),
    ("photos.py:map", "photos.py:map: variant 'map' is unknown; this config has: local, long, maps"),
    ("small_objects.py:map", "variant 'map' is unknown"),
    ("smoke.py:long", "smoke.py:long: variant 'long' is unknown; this study has none"),
    ("nonesuch.py", "nonesuch.py: no such file from "),
])  # fmt: skip
def test_a_variant_that_is_not_there_is_named_with_those_that_are(text, words):
    with pytest.raises(lib.ConfigError, match=re.escape(words)) as raised:
        study_plan.load(f"{ROOT}/configs/studies/{text}")
    assert "row" not in str(raised.value)


def test_an_error_in_the_file_of_a_study_is_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_study():\n    return nothing\n")
    with pytest.raises(lib.ConfigError, match=f"{file}: NameError: name 'nothing' is not defined"):
        study_plan.load(str(file))


def test_operations_are_counted_for_a_cpu_whatever_trains(monkeypatch):
    """The runtimes of accelerators give no count before they compile."""
    meshes = []
    lower = aot._lower
    monkeypatch.setattr(aot, "_lower", lambda c, mesh: meshes.append(mesh) or lower(c, mesh))
    monkeypatch.setattr(jax, "devices", lambda kind="gpu", found=jax.devices: found(kind))
    assert aot.flops_of_step(small()) > 1e9
    assert [device.platform for device in meshes[0].devices.flat] == ["cpu"]


@pytest.mark.parametrize("named, kept", [("cuda", "cuda,cpu"), ("cuda,cpu", "cuda,cpu"), ("", "")])
def test_the_cpu_stays_at_hand_beside_an_accelerator(named, kept):
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", named)
        study_program._keep_the_cpu()
        assert jax.config.jax_platforms == kept
    finally:
        jax.config.update("jax_platforms", before)


def test_the_report_says_which_machines_its_rows_come_from(tmp_path):
    rows = [row("byol", seed, **{"knn/top1": 0.4}) | {"host": host} for seed, host in enumerate(("a", "b"))]
    study_report.write(study(), rows[:1], tmp_path, "command")
    assert "machines" not in (tmp_path / "report.md").read_text()
    study_report.write(study(), rows, tmp_path, "command")
    assert "From 2 machines (a, b)" in (tmp_path / "report.md").read_text()


def test_the_order_has_whole_comparisons_first():
    plan = study(seeds=(4, 5), matched={"more": ("byol", "guided")})
    grid = [Run(name, seed) for seed in (4, 5) for name in ("byol", "guided", "more")]
    assert study_plan.runs(plan) == grid


def test_a_matched_row_gets_as_many_operations():
    plan = study(matched={"more": ("byol", "guided")})
    plain = study_plan.digest(study_plan.configuration(plan, Run("byol", 0)))

    def flops(c):
        return 2.0 if study_plan.digest(c) == plain else 3.0

    byol, more = (study_plan.configuration(plan, Run(name, 0), flops) for name in ("byol", "more"))
    assert 2.0 * more.total_steps == 3.0 * byol.total_steps
    more.total_steps = byol.total_steps
    assert config_record.learnt_fields(more) == config_record.learnt_fields(byol)


def test_the_name_of_a_run_follows_what_it_learns():
    first, second = small(), small()
    second.log.every = 3
    assert study_plan.digest(first) == study_plan.digest(second)
    second.data.train.scenes.seed = 1
    assert study_plan.digest(first) != study_plan.digest(second)
    first.seed = 1
    assert study_plan.digest(first) != study_plan.digest(small())


def test_means_and_errors_are_those_of_scipy():
    values = RNG.normal(size=5)
    found = study_report.mean_of(values)
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(stats.sem(values))
    assert math.isnan(study_report.mean_of([1.0]).error)


def test_differences_are_paired_by_seed():
    base, other = RNG.normal(0, 10, 4), RNG.normal(0, 1, 5)
    rows = [row("byol", seed, x=value) for seed, value in enumerate(base)]
    rows += [row("guided", seed, x=base[seed] + change if seed < 4 else 99.0)
             for seed, change in reversed(list(enumerate(other)))]  # fmt: skip
    found = study_report.paired(rows, "guided", "byol", "x")
    assert found.n == 4 and found.mean == pytest.approx(other[:4].mean())
    test = stats.ttest_rel([base[i] + other[i] for i in range(4)], base)
    assert found.mean / found.error == pytest.approx(test.statistic)


def test_the_table_says_what_was_found():
    changes = {"guided": (0.02, 0.03, 0.04), "random": (-0.01, 0.05, 0.0), "close": (0.02, 0.03, 0.07)}
    rows = [row("byol", s, **{"knn/top1": 0.4 + s / 100}) for s in range(3)]
    for name, found in changes.items():
        rows += [row(name, s, **{"knn/top1": 0.4 + s / 100 + found[s]}) for s in range(3)]
    for one in rows:  # once a seed at least, beside the baseline of the day, and the same for all its rows
        if one["row"] == "guided" or one["seed"] == 0:
            one["untrained"] = {"knn/top1": 0.25 + one["seed"] / 100}
    plan = study(rows=dict.fromkeys(("byol", "guided", "random", "close", "absent"), lib.plain_byol))
    lines = study_report.table(plan, rows).splitlines()
    assert lines[2] == "| untrained | | | | 26.0 ± 0.6 |"
    assert lines[3] == "| byol | 3 | 10 | 1.00 | 41.0 ± 0.6 |"
    assert lines[4] == "| guided | 3 | 10 | 1.20 | 44.0 ± 1.2 (**+3.0 ± 0.6**) |"
    assert lines[5].endswith("(+1.3 ± 1.9) |") and len(lines) == 7
    assert lines[6].endswith("(+4.0 ± 1.5) |")  # three seeds: one time in nine by chance


def start(*arguments):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip
    command = [sys.executable, "-m", "salcl_jax.study", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


@pytest.mark.parametrize("flags, words", [
    (("smoke.py", "--workdir=gs://bucket/studies"), "a study writes to a disk; give a folder"),
    (("smoke.py:long", "--workdir=DIR"), "variant 'long' is unknown; this study has none"),
    (("smoke.py", "--workdir=DIR", "--run=guided-9"), "--run=guided-9: no such run"),
])  # fmt: skip
def test_what_is_wrong_with_the_command_is_one_line(tmp_path, flags, words):
    file, *rest = (flag.replace("DIR", str(tmp_path)) for flag in flags)
    code, _, err = ended(start(f"--study={ROOT}/configs/studies/{file}", *rest))
    assert code == 2 and words in err and "Traceback" not in err, err


def test_a_report_of_nothing_is_none(tmp_path):
    work = tmp_path / "new"  # a matched row counts operations, and keeps them there
    command = (f"--study={ROOT}/configs/studies/smoke.py", f"--workdir={work}", "--report_only")
    code, out, err = ended(start(*command))
    assert code == 0 and not out and "Traceback" not in err, err


def test_a_study_stops_continues_and_does_nothing_twice(tmp_path):
    file, work = tmp_path / "check.py", tmp_path / "work"
    lost = tmp_path / "photos"
    file.write_text(CHECK.format(scenes=str(ROOT / "configs" / "scenes.py"), lost=str(lost)))
    command = (f"--study={file}", f"--workdir={work}", "--jobs=2")
    process = start(*command)
    logs = work / "logs" / "byol-3.txt"
    deadline = time.monotonic() + 200
    while not (logs.exists() and "step 1/" in logs.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 75, err
    code, out, err = ended(start(*command))
    assert code == 70 and "5 runs, 4 to do" in err and "lost-3: ended with" in err, err
    assert logs.read_text().count("total encoder") == 1  # the second start went on from what was saved
    assert "no such folder" in (work / "logs" / "lost-3.txt").read_text()
    with open(work / "check" / "results.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert [r["row"] for r in rows] == ["byol", "guided", "same", "more"]
    more = float(rows[1]["flops_per_step"]) / float(rows[0]["flops_per_step"]) * int(rows[0]["steps"])
    assert int(rows[3]["steps"]) == round(more) > int(rows[0]["steps"])
    assert rows[0]["config"] == rows[2]["config"] and rows[0]["knn/top1"] == rows[2]["knn/top1"]
    assert float(rows[1]["flops_per_step"]) > float(rows[0]["flops_per_step"])
    evals = [json.loads(p.read_text()) for p in (work / "runs").glob("*/judged-*/eval.json")]
    found = {f"{e['results']['knn']['trained']['knn/top1']:.6f}" for e in evals}
    assert {f"{float(r['knn/top1']):.6f}" for r in rows} == found
    assert sorted("untrained" in e["results"]["knn"] for e in evals) == [False, False, True]  # once a seed
    maps = {Path(e["meta"]["checkpoint"]).name[:4]: e["about"]["localization"]["protocol"] for e in evals}
    assert "'border' of stage1" in maps["byol"] and "'activation' of stage2" in maps["guid"], maps
    said = f"python -m salcl_jax.study --study={file}"
    assert all(e["meta"]["command"].startswith(said) for e in evals)
    assert "| guided | 1 | 4 |" in out and (work / "check" / "over_flops.png").stat().st_size > 5000
    code, again, err = ended(start(*command, "--report_only"))
    assert code == 0 and again == out
    first = next((work / "runs").glob("byol-3-*"))
    row = next(first.glob("judged-*.json"))
    changed = json.loads(row.read_text()) | {"photos": "others"}
    row.write_text(json.dumps(changed))
    code, out, err = ended(start(*command))
    assert code == 70 and "5 runs, 1 to do" in err, err
    assert f"byol-3: the photos have changed since; to train on those of today, delete {first}" in err
    assert err.count("photos have changed") == 1 and json.loads(row.read_text()) == changed
