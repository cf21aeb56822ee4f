"""Order, windows, skipping, and batches that follow from (seed, step) alone."""

import gc
import io
import itertools
import pathlib
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import pipeline as p
from salcl_jax.data import workers
from salcl_jax.data.sources import Source

SIZE = 40
BACKENDS = [False, pytest.param(True, id="tf.data")]


def photo(number: int) -> np.ndarray:
    image = np.full((SIZE, 2 * SIZE, 3), 10 * number % 256, np.uint8)
    image[:, SIZE:] = 255 - image[:, :SIZE]
    return image


def encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def make(n: int, broken: tuple[int, ...] = ()) -> Source:
    """n photos, 1:2; number k has label k % 3 and k % 4 boxes; the broken ones are no images."""

    def read(i: int) -> dict:
        boxes = np.array([[0.1, 0.2, 0.6, 0.8]] * (i % 4), np.float32).reshape(-1, 4)
        return {
            "encoded": b"rubbish" if i in broken else encode(photo(i)),
            "label": i % 3,
            "boxes": boxes,
            "classes": np.full(len(boxes), i, np.int32),
        }

    return Source("made", "folder", ("a", "b", "c"), n, read, True, True)


def stream(source: Source, steps: int, use_tf: bool, **options) -> list[dict]:
    if use_tf:
        pytest.importorskip("tensorflow")
    options = {"batch_size": 12, "canvas": 16, "seed": 3, "workers": 2} | options
    return list(itertools.islice(p.train_batches(source, use_tf=use_tf, **options), steps))


def same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_order_visits_each_index_once_an_epoch():
    epochs = [[p.order(e * 17 + i, 17, 5) for i in range(17)] for e in range(4)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [p.order(i, 17, 6) for i in range(17)] != epochs[0]
    assert p.order(2 * 17 + 3, 17, 5) == epochs[2][3]  # no need to pass through the earlier ones


def test_windows_have_the_drawn_area_and_the_aspect_of_the_photo():
    drawn = np.array([p.draw_window(i, 0, (0.25, 0.81)) for i in range(2000)])
    height, width = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    np.testing.assert_allclose(height, width, rtol=1e-6)
    area = height * width
    assert area.min() >= 0.25 - 1e-6 and area.max() <= 0.81 + 1e-6
    assert abs(area.mean() - 0.53) < 0.01  # uniform
    assert drawn.min() >= 0 and drawn.max() <= 1
    centres = (drawn[:, :2] + drawn[:, 2:]) / 2
    assert np.abs(centres.mean(0) - 0.5).max() < 0.01
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.07
    assert p.draw_window(9, 0, (1.0, 1.0)) == (0.0, 0.0, 1.0, 1.0)


def test_a_window_shows_that_part_of_the_photo():
    source = make(8)
    left = p.load(source, 3, canvas=16, window=(0.0, 0.0, 0.5, 0.5), max_boxes=2)
    assert (left["image"][:, :-1] == 30).all()  # the filter of the edge reaches a pixel over it
    assert left["aspect"] == 2.0 and left["id"] == 3 and left["label"] == 0
    right = p.load(source, 3, canvas=16, window=(0.5, 0.5, 1.0, 1.0))
    assert (right["image"][:, 1:] == 225).all() and right["boxes"].shape == (0, 4)


def test_broken_images_are_passed_over_and_counted():
    source = make(10, broken=(4, 5, 9))
    found = [p.load(source, i, canvas=16) for i in (3, 4, 5, 9)]
    assert [int(e["id"]) for e in found] == [3, 1, 2, 6]  # 0.618 of 10, without a common factor: 7 on
    assert [int(e["skipped"]) for e in found] == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="10 images tried for number 2 cannot be used") as got:
        p.load(make(10, broken=tuple(range(10))), 2, canvas=16)
    assert "not_image" in str(got.value)
    with pytest.raises(ValueError, match="too_small"):
        p.load(make(3), 0, canvas=16, min_side=41)


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_batches_hold_the_positions_they_should(use_tf):
    source = make(30, broken=(7,))
    batches = stream(source, 5, use_tf, with_boxes=True, max_boxes=2)
    ids = np.concatenate([batch["id"] for batch in batches])
    want = [p.order(position, 30, 3) for position in range(60)]
    assert ids.tolist() == [26 if i == 7 else i for i in want]  # 19 on
    assert sum(batch["skipped"].sum() for batch in batches) == 2  # once an epoch
    batch = batches[0]
    types = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert types == {
        "image": ("uint8", (12, 16, 16, 3)),
        "aspect": ("float32", (12,)),
        "id": ("int32", (12,)),
        "skipped": ("int32", (12,)),
        "label": ("int32", (12,)),
        "boxes": ("float32", (12, 2, 4)),
        "classes": ("int32", (12, 2)),
    }
    np.testing.assert_array_equal(batch["label"], batch["id"] % 3)
    assert ((batch["classes"] >= 0).sum(1) == np.minimum(batch["id"] % 4, 2)).all()
    assert (batch["image"][:, 8, 2, 0] == 10 * batch["id"] % 256).all()


def test_both_backends_give_the_same_batches():
    source = make(30, broken=(7,))
    options = {"window_area": (0.3, 0.9), "with_boxes": True, "max_boxes": 3, "start_step": 2}
    same(stream(source, 4, False, **options), stream(source, 4, True, **options))


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_two_processes_hold_what_one_would(use_tf):
    source, window = make(31), {"window_area": (0.3, 0.9)}
    one = stream(source, 3, use_tf, **window)
    parts = [
        stream(source, 3, use_tf, process_index=i, process_count=2, **window) for i in (0, 1)
    ]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    same(one, joined)
    assert parts[0][0]["image"].shape[0] == 6


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_resuming_continues_the_stream(use_tf):
    source, window = make(31), {"window_area": (0.3, 0.9)}
    whole = stream(source, 6, use_tf, **window)
    same(whole[4:], stream(source, 2, use_tf, start_step=4, **window))
    assert not np.array_equal(whole[0]["id"], stream(source, 1, use_tf, seed=4)[0]["id"])


def test_a_far_step_starts_at_once():
    (batch,) = stream(make(31), 1, False, start_step=10**9)
    assert batch["id"].tolist() == [p.order(12 * 10**9 + i, 31, 3) for i in range(12)]


def test_large_batches_and_odd_sizes_are_complete():
    for size in (1, 7, 11, 48):
        batches = stream(make(13), 2, False, batch_size=size)
        ids = np.concatenate([batch["id"] for batch in batches])
        assert ids.tolist() == [p.order(i, 13, 3) for i in range(2 * size)]


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_evaluation_sees_each_example_once(use_tf):
    if use_tf:
        pytest.importorskip("tensorflow")
    source = make(21, broken=(5,))
    parts = [
        list(
            p.eval_batches(
                source,
                batch_size=8,
                canvas=16,
                max_boxes=3,
                process_index=i,
                process_count=2,
                workers=2,
                use_tf=use_tf,
            )
        )
        for i in (0, 1)
    ]
    assert [len(part) for part in parts] == [3, 3]
    batches = [batch for pair in zip(*parts, strict=True) for batch in pair]
    ids, mask, skipped, label, classes = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("id", "mask", "skipped", "label", "classes")
    )
    assert ids[:21].tolist() == list(range(21)) and (ids[21:] == -1).all()
    assert mask.dtype == bool and np.flatnonzero(~mask).tolist() == [5, 21, 22, 23]
    assert np.flatnonzero(skipped).tolist() == [5]
    np.testing.assert_array_equal(label[mask], ids[mask] % 3)
    np.testing.assert_array_equal((classes[mask] >= 0).sum(1), ids[mask] % 4)
    limited = list(p.eval_batches(source, batch_size=8, canvas=16, limit=10, use_tf=use_tf))
    ids, mask = (np.concatenate([batch[key] for batch in limited]) for key in ("id", "mask"))
    assert ids[mask].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]  # evenly spread over the set
    assert "boxes" not in limited[0]


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_an_error_comes_out_as_it_went_in(use_tf):
    if use_tf:
        pytest.importorskip("tensorflow")
    source = make(5, broken=tuple(range(5)))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        next(p.train_batches(source, batch_size=4, canvas=16, seed=0, use_tf=use_tf))
    assert "\n" not in str(caught.value)


def test_an_error_late_in_the_stream_is_raised_there():
    pytest.importorskip("tensorflow")
    good = make(40)

    def read(i: int) -> dict:
        if i == p.order(30, 40, 0):
            raise ValueError("disk on fire")
        return good.read(i)

    source = Source("made", "folder", (), 40, read, True, True)
    for use_tf in (False, True):
        batches = p.train_batches(source, batch_size=8, canvas=16, seed=0, use_tf=use_tf)
        assert len(list(itertools.islice(batches, 3))) == 3
        with pytest.raises(ValueError, match="disk on fire"):
            next(batches)


def test_wrong_requests_are_told():
    bare = Source("bare", "folder", (), 5, make(5).read)
    cases = [
        ({"batch_size": 5, "process_count": 2}, "does not divide"),
        ({"process_index": 2, "process_count": 2}, "no such process"),
        ({"with_boxes": True}, "has no boxes"),
        ({"window_area": (0.0, 1.0)}, "window_area"),
        ({"window_area": (0.9, 0.5)}, "window_area"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            stream(bare, 1, False, **options)
    assert "label" not in stream(bare, 1, False)[0]


def test_arrays_and_folders_work_without_tensorflow(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", image=rng.integers(0, 256, (9, 16, 16, 3), np.uint8))
    Image.fromarray(photo(3)).save(tmp_path / "1.png")
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("tensorflow", "tensorflow_datasets", "jax")))
from salcl_jax.data import pipeline, sources
for spec in (
    {{"kind": "arrays", "path": {str(tmp_path / "data.npz")!r}}},
    {{"kind": "folder", "roots": ({str(tmp_path)!r},)}},
    {{"kind": "scenes", "scenes": {{"num_train": 2}}}},
):
    source = sources.open_source(spec)
    batch = next(pipeline.train_batches(source, batch_size=4, canvas=16, seed=0))
    print(batch["image"].shape, len(list(pipeline.eval_batches(source, batch_size=4, canvas=16))))
"""
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"(4, 16, 16, 3) {n}" for n in (3, 1, 1)]


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_nothing_of_a_stream_that_ended_is_kept(use_tf):
    if use_tf:
        pytest.importorskip("tensorflow")

    class Photos:
        def __call__(self, item: int, row: int) -> dict:
            return {"image": np.full((4, 4, 3), row, np.uint8)}

    def end(stop: int | None) -> weakref.ref:
        photos = Photos()
        items = workers.parallel_map(photos, 0, stop, 6, workers=2, prefetch=2, use_tf=use_tf)
        assert len(list(itertools.islice(items, 3))) == 3
        items.close()
        return weakref.ref(photos)

    ended = [end(3), end(None)]
    deadline = time.monotonic() + 20  # workers may still be inside a row
    while any(photos() for photos in ended) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert [photos() for photos in ended] == [None, None]


def test_the_program_ends_while_a_stream_is_open(tmp_path):
    pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    script = f"""
from salcl_jax.data import pipeline, sources
source = sources.open_source({{"kind": "folder", "roots": ({str(tmp_path)!r},)}})
batches = pipeline.train_batches(source, batch_size=32, canvas=200, seed=0, workers=4, prefetch=8)
print(next(batches)["image"].shape)
"""
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=90
    )
    assert run.returncode == 0 and run.stdout.strip() == "(32, 200, 200, 3)", run.stderr
