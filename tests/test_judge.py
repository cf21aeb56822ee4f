"""What tasks see: every photo once on any number of devices, the right rows, folds and crops."""

import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from salcl_jax import classify, frozen, guidance, tasks
from salcl_jax import config as lib
from salcl_jax.evaluators.pooling import LEVELS
from salcl_jax.judge import Judge, Subject, shared_classes, subset
from salcl_jax.models.heads import MLP
from salcl_jax.models.network import Network
from salcl_jax.rng import key_for
from salcl_jax.sharding import make_mesh
from salcl_jax.train_step import make_init

PHOTOS = 37  # odd: no number of devices or batch size divides it
CLASSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of three colours, one broken and one unlabelled, with folds in the columns of a CSV file."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = ["file,label,split,fold,few"]
    for i in range(PHOTOS):
        colour = np.full(3, 60) + 120 * np.eye(3)[i % CLASSES]
        pixels = np.clip(colour + rng.normal(0, 25, (40, 48 + i % 5, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
        lines.append(f"{i:02d}.png,{i % CLASSES},{'train' if i < 25 else 'val'},{i // CLASSES % 2},"
                     f"{0 if i < 8 else 1 if i > 11 and i % CLASSES else 2}")  # fold 1 lacks a class
    (root / "11.png").write_bytes(b"no photo")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


class Stub(nn.Module):
    """A convolution a stage in place of a ResNet: maps of 24, 24, 12, 6 and 3 cells at 48 px."""

    @nn.compact
    def __call__(self, x, *, views, train):
        found = {}
        for level, stride, width in zip(LEVELS, (2, 1, 2, 2, 2), (4, 4, 6, 6, 8), strict=True):
            x = nn.relu(nn.Conv(width, (3, 3), (stride, stride), name=level)(x))
            found[level] = x
        return found | {"pooled": x.mean((1, 2))}


def config_for(folder, **fields):
    c = lib.base()
    lib.small(c)
    c.update_from_flattened_dict({
        "eval.size": 48, "eval.batch_size": 16, "data.canvas": 48, "data.workers": 1, "tasks.jobs": 1,
        "saliency.size": 48, "tasks.linear.epochs": 20, **fields,
    })  # fmt: skip
    for part, split in (("train", "train"), ("test", "val")):
        c.tasks.classify[part] = lib.source(
            "folder", roots=(str(folder),), labels=str(folder / "labels.csv"), split=split
        )
    c.tasks.semi.train = c.tasks.classify.train
    return c


@functools.cache
def trained():
    """Network and state, the same for all tests."""
    c = lib.base()
    lib.small(c)
    network = Network(Stub(), MLP(8, 8), MLP(8, 8))
    return network, jax.jit(make_init(network, lib.finish(c, devices=1, images=1)))()._replace(opt_state=())


def judge_for(c, devices=1, **options):
    network, state = trained()
    judge = Judge(network, c, make_mesh(jax.devices()[:devices]), **options)
    return judge, judge.subject("trained", state)


def test_every_photo_counts_once_on_1_and_8_devices(folder):
    c, found = config_for(folder), []
    for devices in (1, 8):
        judge, subject = judge_for(c, devices)
        found.append(judge.features(subject, judge.source("classify.train"), ("pooled", "stage3")))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=2e-3, atol=2e-3)
    # All but the broken photo, in order.
    np.testing.assert_array_equal(found[0]["id"], [i for i in range(25) if i != 11])
    np.testing.assert_array_equal(found[0]["label"], found[0]["id"] % CLASSES)


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_figures_are_those_of_one_device(folder, task):
    c = config_for(folder, **{"tasks.linear.rates": (0.1, 1.0)})
    one, eight = (tasks.run(task, *judge_for(c, devices)) for devices in (1, 8))
    assert set(one) == set(eight)
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], atol=1e-6, err_msg=name)


def test_raw_pixels_tell_colours_apart(folder):
    judge, _ = judge_for(config_for(folder))
    figures = tasks.run("knn", judge, judge.subject("pixels", None))
    assert figures["knn/top1"] == 1.0


def test_colours_are_learnt_by_every_linear_protocol(folder):
    for fields in ({"protocol": "lbfgs"}, {"protocol": "sgd"}, {"protocol": "sgd", "augment": True},
                   {"protocol": "orl_places205"}):  # fmt: skip
        changes = {f"tasks.linear.{name}": value for name, value in fields.items()}
        figures = tasks.run("linear", *judge_for(config_for(folder, **changes, **{
            "tasks.linear.batch_size": 8, "tasks.linear.rates": (30.0,), "tasks.linear.epochs": 60,
        })))  # fmt: skip
        if fields["protocol"] == "orl_places205":
            levels = [name for name in figures if name.startswith("linear/top1/")]
            wanted = ("conv1", "stage1", "stage2", "stage3", "stage4")
            assert levels == [f"linear/top1/{level}" for level in wanted]
        assert figures["linear/top1"] > 0.6, (fields, figures)


def test_few_labels_are_averaged_over_folds(folder):
    c = config_for(folder, **{
        "tasks.linear.protocol": "lbfgs", "tasks.linear.l2": (0.1,), "tasks.linear.subsets": ("few=0..1",),
        "tasks.pixels": 2,
    })  # fmt: skip

    def run():
        judge, _ = judge_for(c)
        return tasks.run("linear", judge, judge.subject("pixels", None))

    figures = run()
    alone, c.tasks.linear.subsets = [], ()
    for fold in (0, 1):
        c.tasks.classify.train.where = f"few={fold}"
        alone.append(run()["linear/top1"])
    assert alone[0] != alone[1]  # else one fold could stand for both
    assert figures["linear/few/top1"] == pytest.approx(np.mean(alone))
    assert figures["linear/few/top1_se"] == pytest.approx(abs(alone[0] - alone[1]) / 2)


def test_fine_tuning_learns_colours_and_averages_folds(folder):
    c = config_for(folder, **{
        "tasks.semi.rates": (1.0,), "tasks.semi.multipliers": (1.0, 10.0), "tasks.semi.epochs": 30,
        "tasks.semi.milestones": (25,), "tasks.semi.batch_size": 8, "tasks.semi.folds": "fold=0..1",
    })  # fmt: skip
    figures = tasks.run("semi", *judge_for(c))
    assert figures["semi/top1"] > 0.6
    assert {"semi/top5", "semi/held_out", "semi/top1_se"} <= set(figures)


@pytest.mark.parametrize(
    "spec, wanted",
    [("", ("",)), ("fold=3", ("fold=3",)), ("fold=0..2", ("fold=0", "fold=1", "fold=2")),
     ("fold=9..10", ("fold=9", "fold=10"))],
)  # fmt: skip
def test_folds(spec, wanted):
    assert classify.folds(spec) == wanted


@pytest.mark.parametrize("spec", ["fold=2..1", "fold=a..b", "fold=1.."])
def test_folds_that_make_no_sense(spec):
    with pytest.raises(ValueError, match="FIRST..LAST"):
        classify.folds(spec)


def test_a_source_without_labels_is_refused(folder):
    c = config_for(folder)
    c.tasks.classify.test = lib.source("folder", roots=(str(folder),))
    with pytest.raises(ValueError, match="no labels"):
        tasks.run("knn", *judge_for(c))


def test_broken_photos_are_told_also_from_the_cache(folder, tmp_path, capsys):
    c = config_for(folder)
    for _ in range(2):
        judge, subject = judge_for(c, cache=str(tmp_path))
        assert tasks.about("knn", judge)["train"].startswith("25 of ")
        for _ in range(2):
            tasks.run("knn", judge, subject)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("warning: ")
        assert "1 of 25 photos cannot be used" in lines[0]
        found = tasks.about("knn", judge)
        assert re.match("24 of .* \\(1 cannot be used\\)", found["train"]) and "cannot" not in found["test"]


def test_a_batch_counts_broken_photos_and_no_padding(folder):
    judge, _ = judge_for(config_for(folder))
    source = judge.source("classify.train")
    assert len(list(judge.batches(source, ""))) == 2  # 25 photos in batches of 16
    assert judge.unread == {source.digest(): 1}


def renamed(source, *names):
    return dataclasses.replace(source, class_names=names)


def test_classes_must_be_numbered_alike(folder):
    judge, subject = judge_for(config_for(folder))
    train, test = (judge.source(f"classify.{part}") for part in ("train", "test"))
    assert train.class_names == ("0", "1", "2")
    pairs = {
        ((), ()): (), (("a", "b"), ()): ("a", "b"), (("a", "b"), ("a", "b", "c")): ("a", "b", "c"),
        (("0", "1"), ("a", "b")): ("a", "b"), (("a", "b"), ("0", "1")): ("a", "b"),
    }  # fmt: skip
    for (one, other), wanted in pairs.items():
        assert shared_classes(renamed(train, *one), renamed(test, *other)) == wanted
    with pytest.raises(ValueError, match="class 1 is 'b' and 'c'"):
        shared_classes(renamed(train, "a", "b"), renamed(test, "a", "c"))
    judge.opened["classify.train", ""] = judge.opened["semi.train", ""] = renamed(train, "a", "b", "c")
    judge.opened["classify.test", ""] = renamed(test, "b", "a", "c")
    for task in ("knn", "linear", "semi"):
        with pytest.raises(ValueError, match="number their classes differently"):
            tasks.run(task, judge, subject)
        with pytest.raises(ValueError, match="number their classes differently"):
            tasks.about(task, judge)


def with_boxes(folder, tmp_path):
    """Photos three times as wide as high, blue but for red or green at both ends; boxes of colours."""
    entries, notes = [], []
    for i in range(24):
        pixels = np.zeros((32, 96, 3), np.uint8) + np.uint8([0, 0, 200])
        pixels[:, :30] = pixels[:, -30:] = 200 * np.eye(3)[i % 2]
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 32})
        notes.append({"image_id": i, "category_id": i % 2, "bbox": [0, 0, 30, 32]})
    kinds = [{"id": 0, "name": "red"}, {"id": 1, "name": "green"}]
    (tmp_path / "boxes.json").write_text(
        json.dumps({"images": entries, "annotations": notes, "categories": kinds})
    )
    c = config_for(folder, **{"tasks.voc_svm.shots": ()})
    for task in ("voc_svm", "multilabel"):
        for part in ("train", "test"):
            c.tasks[task][part] = lib.source(
                "folder", roots=(str(tmp_path),), annotations=str(tmp_path / "boxes.json")
            )
    return c


@pytest.mark.parametrize("task", ["voc_svm", "multilabel"])
def test_all_of_a_photo_is_seen_where_all_of_it_is_labelled(folder, tmp_path, task):
    """The central square is blue throughout: only the whole photo tells the classes apart."""
    judge, _ = judge_for(with_boxes(folder, tmp_path))
    figures = tasks.run(task, judge, judge.subject("pixels", None))
    assert figures[f"{task}/map"] == pytest.approx(1.0)
    assert "whole photo" in tasks.about(task, judge)["view"]


def test_the_view_is_part_of_the_key(folder, tmp_path):
    judge, subject = judge_for(config_for(folder), cache=str(tmp_path))
    source = judge.source("classify.test")
    seen = {view: judge.features(subject, source, view=view)["pooled"] for view in (None, "center", "whole")}
    np.testing.assert_array_equal(seen[None], seen["center"])
    assert np.abs(seen["whole"] - seen["center"]).max() > 1e-3


def test_the_protocol_in_words_is_what_runs(folder):
    fields = {"tasks.semi.folds": "fold=0..1", "tasks.limit": 5, "tasks.linear.augment": True}
    c = config_for(folder, **fields)
    judge, _ = judge_for(c)
    semi = tasks.about("semi", judge)
    assert "weight decay 0.0005" in semi["protocol"] and "mean of 2 folds, fold=0..1" in semi["protocol"]
    rows = sum(i // CLASSES % 2 == 0 for i in range(25))
    assert semi["train"].startswith(f"{rows} of ") and semi["test"].startswith("5 of ")
    assert "random crops" in tasks.about("linear", judge)["protocol"]
    for protocol in ("sgd", "orl"):
        c.tasks.classify.on, c.tasks.linear.protocol = "object", protocol
        linear = tasks.about("linear", judge)
        assert "cached" in linear["protocol"] and "random" not in linear["protocol"]
        assert "boxes" in linear["view"]


@pytest.mark.parametrize("source, words", [
    ("none", "map 'activation'"), ("contrast", "each against its batch of 16"), ("gradcam", "batch of 16"),
    ("activation", "map 'activation'"),
])  # fmt: skip
def test_the_map_in_words_is_the_one_drawn(folder, source, words):
    c = config_for(folder, **{"saliency.source": source})
    c.tasks.localization.test = c.tasks.classify.test
    protocol = tasks.about("localization", judge_for(c)[0])["protocol"]
    assert words in protocol and ("batch" in protocol) == (source in ("contrast", "gradcam"))


def test_the_cache_holds_for_the_same_weights_and_photos_only(folder, tmp_path):
    c, seen = config_for(folder), []

    def watch(batches, count, label):
        seen.append(label)
        return batches

    judge, subject = judge_for(c, cache=str(tmp_path), watch=watch)
    source = judge.source("classify.test")
    first = judge.features(subject, source)
    again = judge_for(c, cache=str(tmp_path), watch=watch)[0].features(subject, source)
    np.testing.assert_array_equal(first["pooled"], again["pooled"])
    assert len(seen) == 1
    other = jax.tree.map(lambda x: x + 0.01, subject.state.params)
    judge.features(judge.subject("other", subject.state._replace(params=other)), source)
    judge.features(subject, subset(source, np.arange(3)))
    judge.features(subject, source, ("stage4",))
    assert len(seen) == 4
    # The other branch has weights of its own, here equal ones: nothing to compute.
    c.eval.branch = "target"
    branch = Judge(judge.network, c, judge.mesh, str(tmp_path), watch)
    branch.features(branch.subject("trained", subject.state), source)
    assert len(seen) == 4


def test_online_figures_are_never_cached(folder, tmp_path):
    seen = []
    options = {"cache": str(tmp_path), "watch": lambda batches, n, label: seen.append(label) or batches}
    judge, subject = judge_for(config_for(folder), **options)
    online = Subject("online", subject.state, digest="")
    for _ in range(2):
        judge.features(online, judge.source("classify.test"))
    assert len(seen) == 2


def test_a_subset_reads_its_rows_and_has_a_digest_of_its_own(folder):
    judge, _ = judge_for(config_for(folder))
    source = judge.source("classify.train")
    some = subset(source, np.array([4, 2]))
    assert len(some) == 2 and some.read(0)["label"] == source.read(4)["label"] == 1
    assert len({some.digest(), source.digest(), subset(source, np.array([2, 4])).digest()}) == 3


def test_subsets_made_anew_leave_nothing_behind(folder, capsys):
    judge, subject = judge_for(config_for(folder))
    source, online = judge.source("classify.train"), Subject("online", subject.state, digest="")
    for _ in range(3):
        judge.features(online, subset(source, np.arange(9, 13)))
    assert list(judge.unread.values()) == [1]
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.parametrize("colours", [False, True])
def test_random_crops_depend_on_the_step_and_not_on_the_devices(folder, colours):
    c = config_for(folder)
    judge, subject = judge_for(c)
    images = np.random.default_rng(0).integers(0, 255, (16, 48, 48, 3)).astype(np.uint8)
    images, aspect = np.tile(images[:1], (16, 1, 1, 1)), np.ones(16, np.float32)
    make = frozen.make_augmented(judge.network, c, ("pooled",), colours=colours)
    runs = [frozen.on_devices(make, make_mesh(jax.devices()[:n])) for n in (1, 8)]
    one, eight = (run((subject.state, np.int32(5)), images, aspect)["pooled"] for run in runs)
    np.testing.assert_allclose(one, eight, rtol=2e-3, atol=2e-3)
    later = runs[0]((subject.state, np.int32(6)), images, aspect)["pooled"]
    assert np.abs(later - one).max() > 1e-3
    assert np.abs(one[0] - one[1]).max() > 1e-3  # another crop for each photo


def test_dense_features_are_the_stages_side_by_side(folder):
    c = config_for(folder)
    judge, subject = judge_for(c)
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3)).astype(np.uint8)
    make = frozen.make_dense(judge.network, c, size=48, stages=("stage3", "stage4"))
    dense = make(subject.state, jnp.asarray(images))
    whole = frozen.whole_canvas(frozen.to_float(jnp.asarray(images)), 48)
    stages, _ = judge.network.encode(subject.state.params, subject.state.batch_stats, whole, train=False)
    third, fourth = (np.asarray(stages[name][:, 0]) for name in ("stage3", "stage4"))
    assert dense.shape == (2, *third.shape[1:3], third.shape[3] + fourth.shape[3])
    np.testing.assert_allclose(dense[..., : third.shape[3]], third, rtol=1e-5, atol=1e-5)
    # Enlarging keeps the mean of every channel where cells divide evenly.
    np.testing.assert_allclose(
        np.mean(dense[..., third.shape[3] :], (1, 2)), fourth.mean((1, 2)), rtol=1e-3, atol=1e-3
    )


def test_dense_pixels_are_patches(folder):
    images = np.random.default_rng(0).integers(0, 255, (1, 48, 48, 3)).astype(np.uint8)
    found = frozen.make_dense_pixels(48)(None, jnp.asarray(images))
    assert found.shape == (1, 6, 6, 192)
    np.testing.assert_allclose(found[0, 2, 5], images[0, 16:24, 40:48].reshape(-1) / 255, atol=1e-5)


def test_pixel_features_are_reduced_crops(folder):
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3)).astype(np.uint8)
    box = jnp.array([[[0.0, 0.0, 0.5, 1.0]]] * 2)
    found = frozen.make_pixels(4)(None, jnp.asarray(images), box)["pooled"]
    wanted = np.asarray(Image.fromarray(images[1, :24]).resize((4, 4), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found[1, 0].reshape(4, 4, 3), wanted / 255, atol=0.02)


def test_the_gallery_shows_the_best_and_the_worst(folder, monkeypatch):
    """Boxes of three sizes: what reaches the picture are the photos of largest and smallest coverage."""
    c = config_for(folder, **{"tasks.localization.gallery": 1})
    c.tasks.localization.test = lib.source("scenes")
    for name, value in {"size": 48, "num_train": 9, "num_val": 1}.items():
        c.tasks.localization.test.scenes[name] = value
    c.tasks.localization.test.data_dir = str(folder / "scenes")
    judge, subject = judge_for(c)
    figures = tasks.run("localization", judge, subject)
    assert figures["localization/images"] == 9
    columns = judge.kept["localization", "trained"]
    drawn = np.concatenate([maps for maps, _ in judge.kept["maps", "trained"]])
    shown = {}
    monkeypatch.setattr(
        tasks.report, "gallery",
        lambda images, maps, rois, boxes, scores, count: shown.update(
            scores=scores, n=[len(images), len(maps), len(rois.boxes), len(boxes)], maps=maps
        ) or images[0],
    )  # fmt: skip
    tasks.gallery(judge, subject)
    order = np.sort(columns["coverage"])
    assert {order[0], order[-1]} <= set(shown["scores"]) and len(shown["scores"]) == 3
    assert shown["n"] == [3, 3, 3, 3]
    # The maps are those that were scored.
    for score, shape in zip(shown["scores"], shown["maps"], strict=True):
        np.testing.assert_array_equal(shape, drawn[np.flatnonzero(columns["coverage"] == score)[0]])


def crops_config(folder, **fields):
    c = config_for(folder, **fields)
    c.tasks.localization.test = lib.source("scenes")
    for name, value in {"num_train": 24, "num_val": 1, "size": 64}.items():
        c.tasks.localization.test.scenes[name] = value
    c.tasks.localization.test.data_dir = str(folder / "crops")
    return c


def test_crops_are_those_that_training_draws(folder):
    c = crops_config(folder, **{"pairs.mix.cover": 0.5})
    judge, subject = judge_for(c)
    figures = tasks.run("crops", judge, subject)
    assert "cover 0.5 at regions of map 'border' of stage3" in tasks.about("crops", judge)["protocol"]
    assert figures["crops/chance/shared_boxes"] > figures["crops/chance/shared_random"] > 0
    batch = next(iter(judge.batches(judge.source("localization.test"), "")))
    found = judge.windows_fn()((subject.state, np.int32(1)), batch["image"], batch["boxes"], batch["aspect"])
    maps, _ = judge.maps_fn()(subject.state, batch["image"])
    keys = jax.random.split(key_for(c.seed, 1, "what crops show"), (frozen.DRAWS, 4))
    for t, own in enumerate(keys):
        drawn = guidance.make_windows(c)(tuple(own), jnp.array(maps), jax.tree.map(jnp.array, batch), 1.0)
        np.testing.assert_allclose(found[""][:, t], drawn.boxes[:, :2], atol=1e-4)
    again = judge.windows_fn()((subject.state, np.int32(2)), batch["image"], batch["boxes"], batch["aspect"])
    assert np.abs(again["random"] - found["random"]).max() > 0.1


def test_crops_of_pairs_without_regions_are_refused(folder):
    c = crops_config(folder, **{"roi.source": "none", "saliency.source": "none", "weights.mode": "none"})
    with pytest.raises(ValueError, match="no pair follows a region; give roi.source"):
        tasks.run("crops", *judge_for(c))
