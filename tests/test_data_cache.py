"""Caches: the same batches, bounded memory, fewer reads; remote files by several readers at a time."""

import dataclasses
import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from salcl_jax import config as config_lib
from salcl_jax import config_record
from salcl_jax.data import cache, pipeline, records, sources, workers
from salcl_jax.validation import validate

BACKENDS = [False, pytest.param(True, id="tf.data")]
N = 20


@pytest.fixture
def folder(tmp_path):
    """Twenty photos of noise, of which number 7 is broken."""
    rng = np.random.default_rng(0)
    for i in range(N):
        image = rng.integers(0, 256, (20 + i, 40, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"rubbish")
    return tmp_path


def counting(source: sources.Source) -> tuple[sources.Source, list[int]]:
    reads = []

    def read(i: int) -> dict:
        reads.append(i)
        return source.read(i)

    return dataclasses.replace(source, read=read), reads


def stream(source, steps: int, **options) -> list[dict]:
    options = {"batch_size": 10, "canvas": 16, "seed": 1, "workers": 2, "prefetch": 1} | options
    return list(itertools.islice(pipeline.train_batches(source, **options), steps))


@pytest.mark.parametrize("use_tf", BACKENDS)
@pytest.mark.parametrize("kind", ["encoded", "canvas"])
@pytest.mark.parametrize("gb", [1.0, 1e-5, 0.0])
def test_a_cache_changes_no_batch(folder, kind, gb, use_tf):
    if use_tf:
        pytest.importorskip("tensorflow")
    source = sources.open_source({"kind": "folder", "roots": str(folder)})
    plain = stream(source, 8, use_tf=False)
    kept = stream(source, 8, use_tf=use_tf, cache=kind, cache_gb=gb)
    assert sum(batch["skipped"].sum() for batch in plain) == 4  # once in each of four epochs
    for a, b in zip(plain, kept, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_windows_are_drawn_anew_from_cached_files(folder):
    source = sources.open_source({"kind": "folder", "roots": str(folder)})
    options = {"window_area": (0.3, 0.8), "use_tf": False}
    plain, kept = stream(source, 6, **options), stream(source, 6, cache="encoded", cache_gb=1.0, **options)
    np.testing.assert_array_equal([a["image"] for a in plain], [b["image"] for b in kept])
    with pytest.raises(ValueError, match="cache canvas.*window_area.*encoded"):
        stream(source, 1, cache="canvas", cache_gb=1.0, **options)


def test_cached_photos_are_read_once(folder):
    whole = sources.open_source({"kind": "folder", "roots": str(folder)})
    photos = [i for i in range(N) if i not in (7, 8)]  # the broken one, and the one that stands in for it
    kinds = ("none", 1.0, 100), ("encoded", 1.0, 3), ("canvas", 1.0, 3), ("encoded", 0.0, 100)
    for kind, gb, most in kinds:
        source, reads = counting(whole)
        stream(source, 12, cache=kind, cache_gb=gb, use_tf=False)
        # two batches are an epoch; a few ahead of the first epoch's end may be read beside it
        often = max(reads.count(i) for i in photos)
        assert often <= most and (most < 100 or often >= 6), (kind, gb, often)


def test_a_cache_stops_growing_at_its_limit():
    made = []

    def make(number: int) -> dict:
        made.append(number)
        return {"image": np.full((10, 100), number, np.uint8), "encoded": b"x" * 500}

    kept = cache.Cache(make, limit=6 * 2100.0)
    for _ in range(3):
        for number in range(20):
            assert kept(number)["image"][0, 0] == number
    assert 4 <= len(kept) <= 6 and 1500 * len(kept) <= kept.bytes <= 6 * 2100
    assert made.count(0) == 1 and made.count(19) == 3


def test_what_a_caller_does_to_a_record_stays_with_him():
    kept = cache.Cache(lambda number: {"label": number}, limit=1e6)
    kept(3)["label"] = 99
    assert kept(3) == {"label": 3}


def test_errors_are_not_kept():
    tries = []

    def make(number: int) -> dict:
        tries.append(number)
        if len(tries) == 1:
            raise OSError("the disk was away")
        return {"encoded": b""}

    kept = cache.Cache(make, limit=1e6)
    with pytest.raises(OSError):
        kept(0)
    assert kept(0) == {"encoded": b""} and len(kept) == 1


def test_many_threads_count_each_photo_once():
    together = threading.Barrier(8)

    def make(number: int) -> dict:
        if number == 0:
            together.wait(20)  # all eight have missed it
        return {"encoded": bytes(100)}

    kept = cache.Cache(make, limit=1e9)

    def work():
        for number in range(200):
            kept(number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    one = cache.Cache(lambda number: {"encoded": bytes(100)}, limit=1e9)
    one(0)
    assert len(kept) == 200 and kept.bytes == 200 * one.bytes


def test_the_fields_are_checked_and_do_not_decide_what_is_learnt():
    plain = config_lib.base()
    for changes, field in (
        ({"data.cache": "disk"}, "data.cache"),
        ({"data.cache_gb": -1.0}, "data.cache_gb"),
        ({"data.cache": "canvas", "data.window_area": (0.5, 1.0)}, "data.cache"),
    ):
        c = config_lib.base()
        c.update_from_flattened_dict(changes)
        with pytest.raises(config_lib.ConfigError, match=rf"config\.{field} = "):
            validate(c)
    for changes in ({"data.cache": "canvas", "data.cache_gb": 2.0},
                    {"data.cache": "encoded", "data.window_area": (0.5, 1.0)}):  # fmt: skip
        c = config_lib.base()
        c.update_from_flattened_dict(changes)
        validate(c)
        c.data.window_area = plain.data.window_area
        assert config_record.learnt_fields(c) == config_record.learnt_fields(plain)


def test_batches_that_are_held_are_not_written_again():
    """Arrays are used again, but never those that somebody holds, or holds a view of."""
    made = sources.Source("made", "folder", (), 64, lambda i: {"image": np.full((16, 16, 3), i, np.uint8)})
    batches = pipeline.train_batches(made, batch_size=4, canvas=16, seed=0, workers=2, use_tf=False)
    views = []
    for batch in itertools.islice(batches, 60):
        views.append((batch["image"][1:2, 3], int(batch["id"][1])))
        views = views[-20:]
        assert all((view == number % 256).all() for view, number in views)


def test_arrays_that_nobody_holds_come_back():
    memory = workers._Memory(2)
    batch = memory.lend({"image": np.zeros((4, 3)), "id": np.zeros(4)})
    view, place = batch["image"][1:, 0], batch["image"].ctypes.data
    assert memory.take() is None
    del batch
    assert memory.take() is None
    del view
    again = memory.take()
    assert again["image"].ctypes.data == place and memory.take() is None
    held = [memory.lend({"id": np.zeros(4)}) for _ in range(5)]
    assert len(memory._lent) == 2 and len(held) == 5  # it keeps no more memory than it is told


def _write_remote(path: str, data: bytes) -> None:
    import tensorflow as tf

    tf.io.gfile.makedirs(path.rpartition("/")[0])
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(data)


def _jpeg(shade: int, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_folders_on_a_bucket_are_read_as_local_ones(tmp_path, monkeypatch):
    """TensorFlow's file system in memory stands for a bucket: paths with :// and no local file."""
    tf = pytest.importorskip("tensorflow")
    real, asked = tf.io.gfile.isdir, []
    monkeypatch.setattr(tf.io.gfile, "isdir", lambda path: (asked.append(path), real(path))[1])
    root = f"ram://{tmp_path.name}/photos"
    for i in range(6):
        _write_remote(f"{root}/{'ab'[i % 2]}/{i}.jpg", _jpeg(40 * i))
    _write_remote(f"{root}.csv", b"file,label\na/0.jpg,3\nb/5.jpg,1\n")
    _write_remote(f"{root}.txt", b"a/2.jpg\nb/3.jpg\n")
    cases = (
        ({}, [0, 80, 160, 40, 120, 200], None),
        ({"label_from_folder": True}, [0, 80, 160, 40, 120, 200], [0, 0, 0, 1, 1, 1]),
        ({"labels": f"{root}.csv"}, [0, 200], [3, 1]),
        ({"list": f"{root}.txt"}, [80, 120], None),
    )
    for options, shades, labels in cases:
        source = sources.open_source({"kind": "folder", "roots": (root,)} | options)
        (batch,) = pipeline.eval_batches(source, batch_size=len(shades), canvas=16, workers=2, use_tf=False)
        np.testing.assert_allclose(batch["image"][:, 8, 8, 0], shades, atol=2)
        assert labels is None or batch["label"].tolist() == labels
        assert source.digest() == source.digest() and len(source) == len(shades)
    assert asked and not any(path.endswith(".jpg") for path in asked)  # a request a photo would take hours
    with pytest.raises(FileNotFoundError, match="ram://nowhere"):
        sources.open_source({"kind": "folder", "roots": ("ram://nowhere",)})


def test_a_remote_file_has_several_reads_in_flight(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    path, readers = f"ram://{tmp_path.name}/shard", 4
    _write_remote(path, bytes(range(200)))
    together = threading.Barrier(readers, timeout=20)
    real, opened = tf.io.gfile.GFile, []

    class Slow:
        def __init__(self, *args):
            self.file = real(*args)
            opened.append(self)

        def seek(self, offset):
            self.file.seek(offset)

        def read(self, length):
            together.wait()  # a lock a file would leave the others waiting outside
            return self.file.read(length)

    monkeypatch.setattr(tf.io.gfile, "GFile", Slow)
    file, found = records._RemoteFile(path), {}

    def work(k: int):
        found[k] = [file.read(10 * k + i, 5) for i in range(10)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(readers)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for k in range(readers):
        assert found[k] == [bytes(range(10 * k + i, 10 * k + i + 5)) for i in range(10)]
    assert len(opened) <= 2 * readers  # handles are used again


def test_records_on_a_bucket(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = f"ram://{tmp_path.name}/a.tfrecord"
    with tf.io.TFRecordWriter(path) as writer:
        [writer.write(bytes([i]) * (i + 1)) for i in range(30)]
    reader = records.Reader(records.build_index([(path, 0, -1)]))
    assert [reader(i) for i in range(30)] == [bytes([i]) * (i + 1) for i in range(30)]
