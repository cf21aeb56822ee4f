"""The configuration: files, variants, meaning of shares, comments, and what is refused."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

from salcl_jax import config as lib
from salcl_jax import config_record
from salcl_jax.data.scenes import Dials
from salcl_jax.models.network import build
from salcl_jax.ops.augment import AugmentSpec
from salcl_jax.validation import validate

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants(path: Path) -> list[str]:
    """Names that the file itself offers when asked for one it does not have."""
    with pytest.raises(lib.ConfigError, match="variant 'nonesuch' is unknown") as caught:
        load(path).get_config("nonesuch")
    return str(caught.value).split(": ")[-1].split(", ")


def runnable(c: lib.ConfigDict) -> lib.ConfigDict:
    """Folders and files are the user's to name."""
    names = ("pretext", "localization", "probe_train", "probe_test")
    for part in (c.data.train, *(c.eval[name] for name in names)):
        if part.kind == "folder" and not part.roots:
            part.roots = ("photos",)
        if part.kind == "arrays" and not part.path:
            part.path = "photos.npz"
    return c


CASES = [(path, name) for path in FILES for name in ("", *variants(path))]


@pytest.mark.parametrize("path, name", CASES, ids=lambda x: getattr(x, "stem", x) or "plain")
def test_every_config_and_variant_is_valid_and_is_json(path, name):
    c = runnable(load(path).get_config(name)).lock()
    validate(c)
    with pytest.raises((KeyError, AttributeError)):
        c.crops.sizee = 1
    done = lib.finish(c, devices=1, images=1000)
    assert done.resolved.total_steps >= 1
    fields = json.loads(json.dumps(done.to_dict()))
    again = lib.ConfigDict(json.loads(json.dumps(fields)))
    assert config_record.learnt_fields(again) == config_record.learnt_fields(done)
    assert fields["batch_size"] == c.batch_size and fields["crops"]["area"] == list(c.crops.area)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_has_the_fields_of_base_and_no_others_and_says_its_variants(path):
    module = load(path)
    assert set(config_record.flatten(module.get_config().to_dict())) == set(
        config_record.flatten(lib.base().to_dict())
    )
    said = re.search(r"variants: (.*)", module.__doc__, re.DOTALL)[1]
    for name in variants(path):
        assert re.search(rf"\b{name}\b", said), name
    assert f"configs/{path.name}" in module.__doc__


def test_variants_are_applied_in_order():
    known = {"a": lambda c: c.update(seed=1), "b": lambda c: c.update(seed=c.seed + 5)}
    assert lib.apply_variants(lib.base(), "a,b", known).seed == 6
    assert lib.apply_variants(lib.base(), None, known).seed == 0
    with pytest.raises(lib.ConfigError, match="this config has: a, b"):
        lib.apply_variants(lib.base(), "a,c", known)


def test_plain_byol_turns_all_guidance_off():
    c = lib.base()
    c.local.count = 2
    lib.plain_byol(c)
    validate(c)
    assert (c.saliency.source, c.roi.source, c.weights.mode, c.local.count) == ("none",) * 3 + (0,)
    assert sum(c.pairs.mix.values()) == 0


def _paths(c: lib.ConfigDict, prefix: str = "") -> list[tuple[str, str]]:
    """(section, field) of every leaf."""
    found = []
    for name, value in c.items():
        below = isinstance(value, lib.ConfigDict)
        found += _paths(value, f"{prefix}{name}.") if below else [(prefix[:-1], name)]
    return found


def test_every_field_is_read_somewhere():
    """By attribute or name, or by the function that takes its whole section."""
    taken = {
        "model": set(inspect.signature(build).parameters),
        "augment.view1": set(AugmentSpec._fields),
        "augment.view2": set(AugmentSpec._fields),
        **{section: {field.name for field in dataclasses.fields(Dials)}
           for section, _ in _paths(lib.base()) if section.endswith(".scenes")},
    }  # fmt: skip
    read = set()
    for path in (ROOT / "salcl_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name == "config.py":  # only what it does with fields, not what it defines or checks
            tree = next(n for n in tree.body if getattr(n, "name", "") == "finish")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
            elif isinstance(node, ast.ClassDef) and node.name == "Shape":  # taken by field name
                read |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    unread = [f"{s}.{f}" for s, f in _paths(lib.base()) if f not in taken.get(s, read)]
    assert not unread


def test_sections_that_are_unpacked_have_no_field_missing():
    c = lib.base()
    assert set(c.model) == set(inspect.signature(build).parameters)
    assert set(c.augment.view1) == set(AugmentSpec._fields)
    assert set(c.data.train.scenes) == {field.name for field in dataclasses.fields(Dials)}


def test_every_field_has_a_comment_on_its_line():
    tree, source = ast.parse(Path(lib.__file__).read_text()), Path(lib.__file__).read_text().splitlines()
    bare, seen = [], 0
    for function in tree.body:
        if getattr(function, "name", "") not in ("base", "source", "_augmentation"):
            continue
        for node in function.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                seen += 1
                if not re.search(r"#\s+\S", source[node.lineno - 1]):
                    bare.append(source[node.lineno - 1].strip())
    assert seen > 100 and not bare


def test_finish_turns_shares_into_steps():
    c = lib.base()
    c.total_epochs, c.batch_size = 3, 64
    c.optim.lr, c.optim.final_lr, c.optim.warmup = 0.2, 0.01, 0.1
    c.eval.every, c.log.panels, c.checkpoint.every, c.checkpoint.keep_every = 0.25, 0.0, 0.001, 0.0
    r = lib.finish(c, devices=4, images=1000).resolved
    assert r.total_steps == 47  # 3000 / 64 = 46.9
    assert r.peak_lr == pytest.approx(0.2 * 64 / 256)
    assert r.final_lr == pytest.approx(0.01 * 64 / 256)
    assert (r.warmup_steps, r.eval_every) == (5, 12)  # 4.7 and 11.75
    assert (r.panels_every, r.checkpoint_every, r.keep_every) == (47, 1, 0)
    assert (r.devices, r.images) == (4, 1000)


def test_finish_takes_steps_as_they_are_and_leaves_the_original_alone():
    c = lib.base()
    c.total_epochs, c.total_steps, c.optim.warmup = 0, 123, 0.0
    done = lib.finish(c.lock(), devices=1, images=10)
    assert done.resolved.total_steps == 123 and done.resolved.warmup_steps == 0
    assert "resolved" not in c
    done.crops.size = 32
    assert c.crops.size == 224


def test_learnt_fields_are_those_that_change_what_is_learnt():
    def changed(name, value):
        c, d = lib.base(), lib.base()
        d.update_from_flattened_dict({name: value})
        return config_record.differences(config_record.learnt_fields(c), config_record.learnt_fields(d))

    assert changed("crops.size", 96) == ["crops.size: 224 -> 96"]
    assert changed("data.window_area", (0.5, 1.0)) == ["data.window_area: [1.0, 1.0] -> [0.5, 1.0]"]
    for name, value in (("eval.every", 0.5), ("log.every", 7), ("data.workers", 3), ("checkpoint.keep", 9),
                        ("collapse.patience", 3), ("distributed", "none")):  # fmt: skip
        assert changed(name, value) == []
    done = lib.finish(lib.base(), devices=8, images=1000)
    assert config_record.learnt_fields(done) == config_record.learnt_fields(
        lib.finish(lib.base(), devices=1, images=1000)
    )
    assert config_record.learnt_fields(done) != config_record.learnt_fields(
        lib.finish(lib.base(), devices=8, images=999)
    )


def _ways(**shares):
    return {"pairs.mix.cover": 0.0, **{f"pairs.mix.{way}": share for way, share in shares.items()}}


NO_MAP = {"saliency.source": "none", "roi.source": "random", "weights.mode": "none"}
REFUSED = [
    ("batch_size", {"batch_size": 510}, 8),
    ("batch_size", {"batch_size": 12, "accumulate": 3}, 8),
    ("accumulate", {"batch_size": 8, "accumulate": 8}, 1),
    ("accumulate", {"accumulate": 0}, 1),
    ("total_steps", {"total_steps": 5}, 1),
    ("total_steps", {"total_epochs": 0}, 1),
    ("total_steps", {"total_steps": -5}, 1),
    ("crops.size", {"crops.size": 400}, 1),
    ("saliency.size", {"saliency.size": 400}, 1),
    ("local.size", {"local.size": 400, "local.count": 1}, 1),
    ("crops.size", {"crops.size": 8}, 1),
    ("crops.size", {"model.name": "vit_s16", "crops.size": 100}, 1),
    ("eval.size", {"model.name": "vit_s16", "eval.size": 100}, 1),
    ("roi.count", {"roi.count": 0}, 1),
    ("roi.source", {"roi.source": "none"}, 1),
    ("roi.source", {**NO_MAP, **_ways(), "roi.source": "none", "local.count": 2}, 1),
    ("roi.source", {"roi.source": "salience"}, 1),
    ("saliency.source", {"saliency.source": "attention"}, 1),
    ("saliency.source", {"saliency.source": "none"}, 1),
    ("saliency.source", {**NO_MAP, **_ways(), "weights.mode": "product"}, 1),
    ("saliency.source", {**NO_MAP, **_ways(), "roi.source": "saliency"}, 1),
    ("saliency.source", {**NO_MAP, **_ways(map_center=0.1)}, 1),
    ("saliency.source", {**NO_MAP, **_ways(contrastive_crop=0.1)}, 1),
    ("pairs.zoom", {"pairs.zoom": 0.5}, 1),
    ("saliency.stages", {"saliency.stages": ()}, 1),
    ("saliency.stages", {"saliency.stages": ("stage9",)}, 1),
    ("saliency.stages", {"saliency.source": "gradcam", "saliency.stages": ("stage3",)}, 1),
    ("saliency.stages", {"saliency.source": "similarity", "saliency.stages": ("stage3", "stage4")}, 1),
    ("saliency.branch", {"crops.gradient": True, **_ways(roi_jitter=0.5)}, 1),
    ("roi.source", {"crops.gradient": True, "saliency.branch": "online", "roi.source": "random"}, 1),
    ("crops.gradient", {"crops.gradient": True, "saliency.branch": "online"}, 1),
    ("weights.normalize", {"weights.normalize": "image"}, 1),
    ("weights.floor", {"weights.floor": -0.1}, 1),
    ("weights.floor", {"weights.floor": 1.5}, 1),
    ("weights.temperature", {"weights.temperature": 0.0}, 1),
    ("pairs.mix", _ways(cover=0.6, roi_jitter=0.6), 1),
    ("pairs.mix.cover", _ways(cover=-0.1), 1),
    ("pairs.jitter_shift", {"pairs.jitter_shift": -0.1}, 1),
    ("pairs.jitter_area", {"pairs.jitter_area": (2.0, 0.5)}, 1),
    ("crops.area", {"crops.area": (1.0, 0.08)}, 1),
    ("crops.area", {"crops.area": (0.0, 1.0)}, 1),
    ("crops.area", {"crops.area": (0.5, 1.5)}, 1),
    ("crops.area", {"crops.area": (0.5,)}, 1),
    ("crops.area", {"crops.area": (0.5, "x")}, 1),
    ("crops.ratio", {"crops.ratio": (1.5, 0.75)}, 1),
    ("data.window_area", {"data.window_area": (0.5, 1.2)}, 1),
    ("roi.min_size", {"roi.min_size": 0.95}, 1),
    ("roi.min_size", {"roi.min_size": 0.0}, 1),
    ("guidance.start", {"guidance.start": 0.5}, 1),
    ("guidance.full", {"guidance.full": 1.5}, 1),
    ("model.name", {"model.name": "resnet51"}, 1),
    ("model.projector_out", {"model.projector_out": 0}, 1),
    ("loss.name", {"loss.name": "bylo"}, 1),
    ("loss.temperature", {"loss.temperature": 0.0}, 1),
    ("optim.name", {"optim.name": "adam"}, 1),
    ("optim.lr", {"optim.lr": -0.1}, 1),
    ("optim.lr", {"optim.lr": float("nan")}, 1),
    ("optim.final_lr", {"optim.final_lr": -0.1}, 1),
    ("optim.clip_norm", {"optim.clip_norm": -1.0}, 1),
    ("optim.trust", {"optim.trust": 0.0}, 1),
    ("optim.warmup", {"optim.warmup": 10.0}, 1),
    ("ema.base", {"ema.base": 1.1}, 1),
    ("augment.view1.hue", {"augment.view1.hue": 0.7}, 1),
    ("augment.view2.blur_prob", {"augment.view2.blur_prob": 1.1}, 1),
    ("augment.view2.brightness", {"augment.view2.brightness": -0.1}, 1),
    ("augment.view2.blur_sigma", {"augment.view2.blur_sigma": (2.0, 0.1)}, 1),
    ("data.train.kind", {"data.train.kind": "none"}, 1),
    ("data.train.roots", {"data.train.kind": "folder"}, 1),
    ("data.train.path", {"data.train.kind": "arrays"}, 1),
    ("data.train.name", {"data.train.name": ""}, 1),
    ("data.train.expected", {"data.train.expected": -1}, 1),
    ("data.workers", {"data.workers": 0}, 1),
    ("data.max_skipped", {"data.max_skipped": 5.0}, 1),
    ("eval.localization.kind", {"eval.localization.kind": "coco"}, 1),
    ("eval.localization.roots", {"eval.localization.kind": "folder"}, 1),
    ("eval.probe_test.kind", {"eval.probe_train.kind": "scenes"}, 1),
    ("eval.knn", {"eval.knn": ()}, 1),
    ("eval.knn", {"eval.knn": (0,)}, 1),
    ("eval.every", {"eval.every": 5.0}, 1),
    ("log.every", {"log.every": 0}, 1),
    ("log.trackers", {"log.trackers": ("wandb", "tensorboard")}, 1),
    ("checkpoint.keep", {"checkpoint.keep": 0}, 1),
    ("collapse.patience", {"collapse.patience": 0}, 1),
]


@pytest.mark.parametrize("field, changes, devices", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_run_is_refused_by_the_name_of_its_field(field, changes, devices):
    c = lib.base()
    validate(c, devices)  # nothing else is wrong
    c.update_from_flattened_dict(changes)
    with pytest.raises(lib.ConfigError) as caught:
        validate(c, devices)
    message = str(caught.value)
    assert re.match(rf"config\.{re.escape(field)} ", message), message
    assert "\n" not in message and len(message) < 250


ALLOWED = [
    {"total_steps": 10, "total_epochs": 0},
    {"data.canvas": 64, "crops.size": 64, "saliency.size": 64},  # no small crops: their size does not matter
    {"local.count": 2, "weights.normalize": "image"},
    {**NO_MAP, **_ways(roi_jitter=0.4, roi_global=0.3, roi_center=0.3)},
    {**NO_MAP, **_ways(cover=0.5, zoom=0.5)},  # regions of a control are whole: no map has a say in them
    {**NO_MAP, **_ways(), "roi.source": "none"},
    {"crops.gradient": True, "saliency.branch": "online", **_ways(roi_jitter=0.5)},
    {"crops.gradient": True, "saliency.branch": "online", "local.count": 2},
    {"model.name": "vit_s16", "saliency.source": "attention"},
    {"weights.floor": 0.0, "optim.warmup": 0.0, "guidance.start": 0.0, "guidance.full": 0.0},
    {"batch_size": 64, "accumulate": 4},
    {"log.trackers": ("wandb", "mlflow")},
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_can_run_is_allowed(changes):
    c = lib.base()
    c.update_from_flattened_dict(changes)
    validate(c, devices=8)
