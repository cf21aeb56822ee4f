"""Broken photos and slow storage: nothing crashes or hangs, memory stays, each skip is counted and listed."""

import itertools
import json
import os
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import broken
import numpy as np
import pytest
from PIL import Image
from runs import finish, home, metrics, start, summary

from salcl_jax.data import files, masks, records, tfds_source
from salcl_jax.data import pipeline as p
from salcl_jax.data.decode import FORMATS, REASONS
from salcl_jax.data.sources import Source, open_source
from salcl_jax.skipped import Skipped

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[1]
BACKENDS = [False, pytest.param(True, id="tf.data")]
PIXELS = 1_000_000
MEMORY = 160  # MiB beyond what good photos need: one 30,000 x 30,000 bomb takes 850 or more
CHILD = """
import json, resource, sys
from salcl_jax.data import pipeline, sources
from salcl_jax.skipped import Skipped

good, bad, workdir, use_tf = sys.argv[1:4] + [sys.argv[4] == "True"]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
calls = []
with Skipped(workdir, process=0, resume=False) as skipped:
    for root in (good, bad):
        before = peak()
        source = skipped.watch(sources.open_source({"kind": "folder", "roots": (root,)}))
        watched = source.note
        object.__setattr__(source, "note", lambda *what: (calls.append(what), watched(*what)))
        steps = -(-len(source) // 16)
        stream = pipeline.train_batches(source, batch_size=16, canvas=48, seed=0, max_pixels=1_000_000,
                                        workers=4, prefetch=2, use_tf=use_tf)
        batches = [next(stream) for _ in range(steps)]
        stream.close()
        tested = list(pipeline.eval_batches(source, batch_size=16, canvas=48, max_pixels=1_000_000,
                                            use_tf=use_tf))
train = {"skipped": sum(int(b["skipped"].sum()) for b in batches), "images": steps * 16,
         "distinct": len({int(i) for b in batches for i in b["id"]})}
unseen = sum(int((b["skipped"] > 0).sum()) for b in tested)
print(json.dumps(train | {"unseen": unseen, "calls": len(calls), "grown": peak() - before, "n": len(source)}))
"""


def oracle(path: str) -> bool:
    """Whether Pillow itself reads the whole picture, after the limits that its header and size must keep."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > 2**30:
            return False
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                return False
            if "exif" in image.info:
                image.getexif().get(0x0112)
            image.load()
            image.convert("RGB")
        return True
    except Exception:
        return False


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(folder of good photos, folder of broken ones, their paths)."""
    root = tmp_path_factory.mktemp("broken")
    for number in range(4):
        for name, data in broken.good().items():
            broken.put(root / "good" / f"{number}{name}", data)
    (root / "bad").mkdir()
    return root / "good", root / "bad", broken.write(root / "bad")


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_hundreds_of_broken_files(tree, tmp_path, use_tf, fault_table):
    """One epoch and one evaluation of them, in a process whose memory is measured."""
    if use_tf:
        pytest.importorskip("tensorflow")
    good, bad, paths = tree
    assert len(paths) > 500
    unusable = {path for path in paths if not oracle(path)}
    assert 100 < len(unusable) < len(paths) - 100  # of both kinds, so that either mistake shows
    command = [sys.executable, "-c", CHILD, str(good), str(bad), str(tmp_path), str(use_tf)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n"] == len(paths)  # links to folders are walked once
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert Counter(row["file"] for row in listed) == Counter(unusable)  # each once, and no good one
    assert {row["reason"] for row in listed} == set(REASONS) - {"too_small"}
    reasons = {row["file"]: row["reason"] for row in listed}
    big = {name: reasons[str(bad / "odd" / name)] for name in broken.bombs()}
    assert big.pop("header.webp") in ("too_large", "not_image")  # libwebp may refuse it first
    assert set(big.values()) == {"too_large"}, big
    for name, reason in {"pipe": "unreadable", "endless": "unreadable", "sparse": "unreadable",
                         "gone": "unreadable", "self": "unreadable"}.items():  # fmt: skip
        assert reasons[str(bad / "links" / f"{name}.jpg")] == reason
    for name in ("empty.jpg", "page.jpg", "script.jpg", "tagged.png"):
        assert reasons[str(bad / "odd" / name)] == "not_image"
    # A slot counts its own photo and the replacements that failed too.
    assert found["unseen"] == len(unusable) and found["calls"] >= found["skipped"] + found["unseen"]
    share = len(unusable) / len(paths)
    met = found["skipped"] / (found["skipped"] + found["images"])
    assert abs(met - share) < 0.08, (met, share)
    assert found["grown"] < MEMORY
    kind = "tf.data" if use_tf else "threads"
    fault_table(f"{len(paths)} mutated photos ({kind})", f"{len(unusable)} skipped and listed, memory "
                f"+{max(found['grown'], 0)} MiB", 0, 0)  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_photos_without_permission(tmp_path):
    for number in range(6):
        broken.put(tmp_path / f"{number}.png", broken.good()["colour.png"])
    (tmp_path / "3.png").chmod(0)
    source = open_source({"kind": "folder", "roots": (str(tmp_path),)})
    batch = next(p.train_batches(source, batch_size=6, canvas=16, seed=0, use_tf=False))
    assert batch["skipped"].sum() == 1 and 3 not in batch["id"]


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_files_that_vanish_while_streaming(tmp_path, use_tf, fault_table):
    if use_tf:
        pytest.importorskip("tensorflow")
    root = tmp_path / "photos"
    for number in range(60):
        broken.put(root / f"{number:02d}.png", broken.good()["colour.png"])
    with Skipped(str(tmp_path), process=0, resume=False) as skipped:
        source = skipped.watch(open_source({"kind": "folder", "roots": (str(root),)}))
        options = {"batch_size": 10, "canvas": 16, "seed": 0, "workers": 2, "prefetch": 1}
        stream = p.train_batches(source, use_tf=use_tf, **options)
        next(stream)
        for number in range(0, 60, 2):
            (root / f"{number:02d}.png").unlink()
        later = list(itertools.islice(stream, 40))[4:]  # what was read before is past
        assert len(later) == 36 and all((batch["id"] % 2 == 1).all() for batch in later)
        stream.close()
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and {line["reason"] for line in lines} == {"unreadable"}
    fault_table(f"half of the photos deleted while training ({'tf.data' if use_tf else 'threads'})",
                "replaced, each listed once", 0)  # fmt: skip


def made(n: int, bad: range = range(0), stall: float = 0.0) -> Source:
    """n photos, of which a row of neighbours is broken; every seventh takes its time."""
    data = broken.good()["colour.png"]

    def read(i: int) -> dict:
        if stall and i % 7 == 0:
            time.sleep(stall)
        return {"encoded": b"" if i in bad else data, "label": i % 5}

    return Source("made", "folder", (), n, read, True)


@pytest.mark.parametrize("use_tf", BACKENDS)
def test_slow_storage_does_not_change_the_order(use_tf, fault_table):
    if use_tf:
        pytest.importorskip("tensorflow")
    options = {"batch_size": 8, "canvas": 16, "seed": 4, "workers": 4, "prefetch": 2, "use_tf": use_tf}
    quick, slow = (
        list(itertools.islice(p.train_batches(made(40, range(3, 6), stall), **options), 10))
        for stall in (0.0, 0.08)
    )
    for a, b in zip(quick, slow, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    fault_table(f"reads that stall ({'tf.data' if use_tf else 'threads'})", "same batches, same order", 0)


def test_broken_photos_side_by_side_are_counted_once_each():
    """An unfinished download must neither end the run nor count as more than it is."""
    n, lost = 4000, range(1000, 1300)
    batches = list(itertools.islice(p.train_batches(made(n, lost), batch_size=100, canvas=16, seed=0,
                                                    use_tf=False), n // 100))  # fmt: skip
    skipped = sum(int(batch["skipped"].sum()) for batch in batches)
    assert len(lost) <= skipped <= 1.25 * len(lost)  # a replacement may be a broken one too
    ids = np.concatenate([batch["id"] for batch in batches])
    assert not set(ids.tolist()) & set(lost)
    replaced = Counter(ids.tolist())
    assert set(replaced) == set(range(n)) - set(lost) and max(replaced.values()) <= 3


def test_a_label_map_is_no_way_round_the_limit(tmp_path):
    bomb = broken.bombs()["whole.png"]
    assert masks.decode(bomb, PIXELS) is None
    broken.put(tmp_path / "photos" / "a.png", broken.good()["colour.png"])
    broken.put(tmp_path / "maps" / "a.png", bomb)
    spec = {"kind": "folder", "roots": (str(tmp_path / "photos"),), "masks": str(tmp_path / "maps")}
    (batch,) = p.eval_batches(open_source(spec), batch_size=1, canvas=16, max_pixels=PIXELS, with_masks=True)
    assert batch["mask"].all() and (batch["masks"] == masks.VOID).all()


def shards(folder: Path):
    """A data set of two TFRecord files of twenty photos each, opened as a prepared one."""
    tf = pytest.importorskip("tensorflow")
    for shard in range(2):
        with tf.io.TFRecordWriter(str(folder / f"{shard}.tfrecord")) as writer:
            for number in range(20):
                data = list(broken.good().values())[number % 10]
                value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))
                writer.write(tf.train.Example(features=tf.train.Features(feature={"image": value}))
                             .SerializeToString())  # fmt: skip
    return lambda: open_shards(folder)


def open_shards(folder: Path) -> Source:
    files = [types.SimpleNamespace(filename=str(folder / f"{i}.tfrecord"), skip=0, take=20) for i in range(2)]
    info = types.SimpleNamespace(
        features={"image": None}, splits={"train": types.SimpleNamespace(file_instructions=files)},
        file_format=types.SimpleNamespace(value="tfrecord"), full_name="made/1.0.0",
    )  # fmt: skip
    return tfds_source.open_builder(types.SimpleNamespace(info=info), "train")


def test_mutated_tfrecord_files(tmp_path, fault_table):
    """Damage to a record costs that record; damage to what frames the records is one line at the start."""
    reopen = shards(tmp_path)
    path, outcomes = tmp_path / "0.tfrecord", Counter()
    whole = path.read_bytes()
    for bad in (*broken.mutations(whole, 5), *broken.mutations(whole, 6), b""):
        path.write_bytes(bad)
        try:
            source = reopen()
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["stopped"] += 1
            continue
        (*batches,) = p.eval_batches(source, batch_size=20, canvas=16, max_pixels=PIXELS, use_tf=False)
        lost = sum(int(batch["skipped"].sum()) for batch in batches)
        assert lost <= 8 and batches[1]["mask"].all()  # the other shard is whole
        outcomes["skipped" if lost else "read"] += 1
    assert outcomes["stopped"] > 20 and outcomes["skipped"] > 5, outcomes
    fault_table(f"{sum(outcomes.values())} mutated TFRecord files", f"{outcomes['stopped']} refused at the "
                f"start in one line, {outcomes['skipped']} with records skipped", 0)  # fmt: skip


def test_a_tfrecord_file_that_vanishes_or_shrinks_while_streaming(tmp_path):
    reopen = shards(tmp_path)
    notes: list = []
    source = reopen()
    object.__setattr__(source, "note", lambda *what: notes.append(what))
    (tmp_path / "1.tfrecord").unlink()
    data = (tmp_path / "0.tfrecord").read_bytes()
    (tmp_path / "0.tfrecord").write_bytes(data[: len(data) // 2])
    batches = list(p.eval_batches(source, batch_size=40, canvas=16, use_tf=False))
    lost = int(batches[0]["skipped"].sum())
    assert 20 < lost < 35 and len(notes) == lost and {reason for _, reason in notes} == {"unreadable"}
    places = {place.split(" at byte ")[0] for place, _ in notes}
    assert places == {str(tmp_path / "0.tfrecord"), str(tmp_path / "1.tfrecord")} and len(set(notes)) == lost


def test_a_handle_that_failed_is_not_used_again(tmp_path):
    """As after a network share that was away: its open files go on failing."""
    shards(tmp_path)
    path = str(tmp_path / "0.tfrecord")
    reader = records.Reader(records.build_index([(path, 0, -1)]))
    first = reader(0)
    file, away = reader._file(0), str(tmp_path / "away")
    os.close(file.fd)
    file.fd = os.open(tmp_path, os.O_RDONLY)  # reads from it raise OSError
    assert reader(0) == first and len(reader._files) == 1
    os.rename(path, away)
    reader._file(0).read = file.read
    for _ in range(2):
        with pytest.raises(OSError):
            reader(0)
    os.rename(away, path)
    assert reader(0) == first == reader(0)


def test_a_file_on_a_bucket_that_is_gone_is_an_error_of_files(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = f"ram://{tmp_path.name}/gone.tfrecord"
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(b"a")
    reader = records.Reader(records.build_index([(path, 0, -1)]))
    tf.io.gfile.remove(path)
    for read in (lambda: reader(0), lambda: files.read_file(path)):
        with pytest.raises(OSError, match="gone.tfrecord") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_the_list_is_bounded_survives_a_restart_and_starts_anew(tmp_path):
    with Skipped(str(tmp_path), process=0, resume=False, most=3) as skipped:
        for number in (1, 2, 1, 3, 4):
            skipped.note(f"{number}.jpg", "truncated")
    path = tmp_path / "skipped.jsonl"
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == ["1.jpg", "2.jpg", "3.jpg"]
    path.write_bytes(path.read_bytes() + b'\xff\xfe\n{"file": 1}\n[]\n{"fi')  # cut off, damaged
    with Skipped(str(tmp_path), process=0, resume=True) as skipped:
        skipped.note("2.jpg", "unreadable")
        skipped.note("\udcff.jpg", "not_image")  # a name that is not UTF-8
        assert skipped.reasons() == {"not_image": 1, "truncated": 3}
    with Skipped(str(tmp_path), process=0, resume=True) as skipped:
        assert skipped.reasons() == {"not_image": 1, "truncated": 3}
    with Skipped(str(tmp_path), process=1, resume=False) as other:
        other.note("x.jpg", "too_large")
    assert (tmp_path / "skipped.1.jsonl").exists()
    with Skipped(str(tmp_path), process=0, resume=False):
        pass
    assert path.read_text() == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "photos")


def run(shared, roots: Path, workdir: Path, code: int, **fields) -> str:
    given = {"data__train__roots": f"('{roots}',)", "batch_size": 8, "block": True} | fields
    return finish(start(shared, "configs/folder.py:smoke,byol", workdir, **given), code)[1]


@pytest.mark.slow
def test_too_many_broken_photos_stop_the_run_which_lists_them(shared, tmp_path, fault_table):
    root, bad = tmp_path / "photos", []
    for number in range(40):
        path = root / f"{number:02d}.jpg"
        broken.put(path, broken.good()["plain.jpg"])
        if number in (7, 8, 9, 30):
            broken.put(path, broken.good()["plain.jpg"][: 10 * number])
            bad.append(str(path))
    workdir = tmp_path / "run"
    line = run(shared, root, workdir, 70, total_steps=10, log__every=2).strip().splitlines()[-1]
    assert line.startswith("stopped: ") and "config.data.max_skipped" in line and str(root) in line
    assert str(workdir / "skipped.jsonl") in line and "truncated" in line
    run(shared, root, workdir, 0, total_steps=10, log__every=2, data__max_skipped=0.5)
    rows = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == bad
    assert summary(workdir)["skipped_photos"] == dict(Counter(row["reason"] for row in rows))
    assert summary(workdir)["skipped"] == sum(row["train/skipped"] for row in metrics(workdir).values()) >= 8
    fault_table("10 % of the photos broken, 5 % allowed", "stopped with one line; listed", 0, 70)


@pytest.mark.slow
def test_a_run_over_hundreds_of_broken_files(shared, tree, tmp_path, fault_table):
    _, bad, paths = tree
    fields = {"total_steps": 70, "data__max_skipped": 0.9, "data__max_pixels": PIXELS, "block": False}
    run(shared, bad, tmp_path, 0, **fields)
    rows = [json.loads(line)["file"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    unusable = {path for path in paths if not oracle(path)} | {str(bad / "odd" / "tiny.png")}  # data.min_side
    assert Counter(rows) == Counter(unusable)  # 70 steps of 8 are an epoch
    fault_table(f"a run over {len(paths)} mutated photos", f"done; {len(rows)} skipped and listed", 0, 0)
