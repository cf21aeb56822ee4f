"""Checkpoints, data and settings from elsewhere: nothing in them is run, no name leads out of its folder."""

import ast
import functools
import json
import os
import pickle
import subprocess
import sys
from operator import getitem
from pathlib import Path

import broken
import numpy as np
import pytest
from PIL import Image
from test_checkpoint import abstract, assert_same_bits, make_state, open_run

from salcl_jax import checkpoint, checkpoint_record, config_record
from salcl_jax import config as config_lib
from salcl_jax.data import decode, files, masks
from salcl_jax.data.sources import open_source
from salcl_jax.evaluate import RECORDED

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "salcl_jax").rglob("*.py"))
# Names that run what they are given, wherever they come from.
NEVER = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "importlib.import_module",
    "runpy.run_path", "runpy.run_module", "code.interact",
}  # fmt: skip
SAFE = {"np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False),
        "torch.load": ("weights_only", True)}  # fmt: skip
ALLOWED = {  # configuration files are Python by design; maps are found among the files of their folder
    "config.py": ["spec.loader.exec_module"],
    "maps/__init__.py": ["importlib.import_module"],
}


def faults(source: str) -> list[str]:
    """Calls and imports in a Python text that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill"):
            found.append(f"from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name in NEVER or name.endswith((".Unpickler", ".exec_module")) or given.get("shell"):
            found.append(name)
        if name in SAFE and given.get(SAFE[name][0]) is not SAFE[name][1]:
            found.append(name)
    return found


@pytest.mark.parametrize("name", [path.relative_to(ROOT / "salcl_jax").as_posix() for path in FILES])
def test_no_file_of_the_package_runs_what_it_reads(name):
    assert faults((ROOT / "salcl_jax" / name).read_text()) == ALLOWED.get(name, [])


def test_the_reader_of_sources_sees_each_of_them():
    bad = ["eval('1')", "exec('')", "pickle.loads(b'')", "np.load(f)", "np.load(f, allow_pickle=True)",
           "np.load(f, allow_pickle=flag)", "torch.load(f)", "subprocess.run(x, shell=True)",
           "__import__('os')", "from pickle import loads", "importlib.import_module(x)",
           "a.exec_module(b)"]  # fmt: skip
    assert all(faults(line) for line in bad)
    assert not any(map(faults, ["re.compile('x')", "np.load(f, allow_pickle=False)", "step.compile()"]))


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["npz", "compressed", "folder", "renamed"])
def test_arrays_with_a_pickle(tmp_path, form):
    sign = tmp_path / "executed"
    image, bomb = np.zeros((2, 8, 8, 3), np.uint8), np.array([Bomb(sign), Bomb(sign)], object)
    path = tmp_path / ("data" if form == "folder" else "data.npz")
    if form == "folder":
        path.mkdir()
        np.save(path / "image.npy", image)
        np.save(path / "label.npy", bomb, allow_pickle=True)
    elif form == "renamed":
        path.write_bytes(pickle.dumps(Bomb(sign)))
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, image=image, label=bomb)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        open_source({"kind": "arrays", "path": str(path)})
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and not sign.exists()


def test_damaged_arrays_are_told_in_one_line(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, image=np.zeros((4, 8, 8, 3), np.uint8), label=np.arange(4))
    whole, told = path.read_bytes(), 0
    for bad in broken.mutations(whole, 1):
        path.write_bytes(bad)
        try:
            source = open_source({"kind": "arrays", "path": str(path)})
            assert source.read(0)["image"].shape == (8, 8, 3)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            told += 1
    assert told > 15


COLUMNS = [
    ("label", np.array(3), "label is int64"), ("label", np.array(["a", "b"]), "label is <U1"),
    ("label", np.zeros((2, 1), int), "integers"), ("label", np.zeros(2), "label is float64"),
    ("label", np.array([0, -2]), "label -2 is no class"), ("label", np.array([0, 10**6]), "label 1000000"),
    ("boxes", np.zeros((2, 4)), "boxes is float64"), ("boxes", np.zeros((2, 1, 3)), r"n, k, 4\]"),
    ("boxes", np.zeros((2, 1, 4), complex), "boxes is complex128"),
    ("classes", np.zeros((2, 2), int), r"classes is int64 \[2, 2\]"), ("classes", np.array(1), "classes is"),
    ("classes", np.zeros((2, 3)), "classes is float64"), ("class_names", np.array("a"), "class_names is <U1"),
    ("class_names", np.arange(2), "class_names is int64"), ("mask", np.array(1, np.uint8), "mask is uint8"),
]  # fmt: skip


@pytest.mark.parametrize("name, column, message", COLUMNS)
def test_a_column_of_another_kind_is_one_line(tmp_path, name, column, message):
    path, names = tmp_path / "data.npz", np.array(["a", "b"])
    good = {"image": np.zeros((2, 8, 8, 3), np.uint8), "boxes": np.zeros((2, 3, 4)), "class_names": names}
    np.savez(path, **good | {name: column})
    with pytest.raises(ValueError, match=message) as caught:
        open_source({"kind": "arrays", "path": str(path)})
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: {name}")


@pytest.mark.parametrize("key", ["pythonClassName", "python\\u0043lassName", "type"])
def test_a_data_set_that_names_code_runs_none(tmp_path, monkeypatch, key):
    pytest.importorskip("tensorflow_datasets")
    sign = tmp_path / "executed"
    (tmp_path / "hostile.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder, name in (("good/1.0.0", "tensorflow_datasets.core.features.image_feature.Image"),
                         ("bad/config/1.0.0", "hostile.Image")):  # fmt: skip
        path = tmp_path / folder / "features.json"
        path.parent.mkdir(parents=True)
        path.write_text(f'{{"featuresDict": {{"features": {{"image": {{"{key}": "{name}"}}}}}}}}')
    with pytest.raises(ValueError, match="good: its description .* cannot be read .*dataset_info.json"):
        open_source({"kind": "tfds", "name": "good", "data_dir": str(tmp_path)})  # its classes are let pass
    with pytest.raises(ValueError, match="names the class 'hostile.Image'"):
        open_source({"kind": "tfds", "name": "bad/config:1.0.0", "data_dir": str(tmp_path)})
    assert not sign.exists()


@pytest.fixture
def secret(tmp_path):
    """A picture beside the folder of photos, which no name in a data set may reach."""
    Image.fromarray(broken.picture(0)).save(tmp_path / "secret.png")
    (tmp_path / "photos").mkdir()
    Image.fromarray(broken.picture(1)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "tables").mkdir()
    return tmp_path


NAMES = ["../secret.png", "{}/secret.png", "a/../../secret.png", "./../secret.png", "../../etc/passwd",
         "/etc/passwd", "file://{}/secret.png", "gs://bucket/secret.png", "..\\secret.png"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["annotations", "labels", "list", "regions", "segments"])
def test_names_in_a_data_set_stay_below_its_roots(secret, kind, name):
    name = name.format(secret)
    spec, table = {"kind": "folder", "roots": (str(secret / "photos"),)}, secret / "tables" / "table"
    if kind == "annotations":
        entry = {"id": 1, "file_name": name, "width": 64, "height": 64}
        table.write_text(json.dumps({"images": [entry], "annotations": [], "categories": []}))
    elif kind == "list":
        table.write_text(name)
    elif kind == "labels":
        table.write_text(f"file,label\n{name},1\n")
    else:
        row = f"{name},cut.png" if kind == "regions" else f"../photos/a.png,{name}"
        table.write_text(f"file,segment_files\n{row}\n")
        Image.fromarray(broken.picture(2)[..., 0]).save(table.parent / "cut.png")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_source(spec | {"regions" if kind == "segments" else kind: str(table)})
    assert "\n" not in str(caught.value) and str(table) in str(caught.value)


@pytest.mark.parametrize("name, out", [("a/b.png", False), ("a/../b.png", False), ("..b.png", False),
                                       ("../b.png", True), ("a/../../b.png", True), ("/b.png", True),
                                       ("gs://b/c.png", True), ("..", True)])  # fmt: skip
def test_what_leads_out_of_a_folder(name, out):
    assert files.escapes(name) is out


def test_a_photo_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """PIL hands PostScript to Ghostscript, whatever the file is called."""
    sign, fake = tmp_path / "executed", tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {sign}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    script = broken.encode(Image.fromarray(broken.picture(0)), "EPS")
    with pytest.raises(decode.SkipImage, match="not_image"):
        decode.decode(script, 16)
    assert masks.decode(script) is None and not sign.exists()


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "checkpoints") as saver:
        saver.save(1, make_state(1), {"step": 1})
    return tmp_path / "checkpoints"


def test_a_checkpoint_that_names_code_runs_none(run):
    """Orbax writes the names of its handlers; others in their place are read as words."""
    for path in (run / "1" / "_CHECKPOINT_METADATA", run / "1" / "state" / "_METADATA"):
        text = path.read_text()
        for word in ("StandardCheckpointHandler", "JsonCheckpointHandler", "DictKey"):
            text = text.replace(word, "os.system")
        path.write_text(text)
    for name in ("²", "../x".replace("/", "_"), "-1", "1e3", " 1"):  # no steps
        (run / name).mkdir()
    trees = checkpoint.load_params(str(run))
    assert_same_bits(trees["params"], make_state(1).params)
    with open_run(run) as saver:
        assert saver.restore(abstract(make_state()))[2] == 1


HOSTILE = {
    "model.name": "__import__('os').system('touch executed')",
    "model.width": "${7*7}",
    "model": {"name": "x"},
    "seed": [1, 2],
    "crops.size": None,
    "crops.area": {"__class__": "os"},
    "saliency.source": 3.5,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_settings_recorded_in_a_checkpoint_are_values_or_refused(name):
    c = config_lib.base()
    try:
        config_record.recall(c, {name: HOSTILE[name]}, RECORDED)
    except config_lib.ConfigError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        kept, before = (functools.reduce(getitem, name.split("."), x) for x in (c, config_lib.base()))
        assert type(kept) is type(before)
        assert not isinstance(before, config_lib.ConfigDict) or kept == before  # a section is no field


def _leaves(c, prefix=""):
    for name, value in c.items():
        below = isinstance(value, config_lib.ConfigDict)
        yield from _leaves(value, f"{prefix}{name}.") if below else [(prefix + name, value)]


def test_a_checkpoint_decides_no_path():
    """Only what describes the network is taken over: no folder, file or program."""
    c, fields = config_lib.base(), {}
    for name, value in _leaves(c):
        if isinstance(value, str):
            fields[name] = "/etc/passwd"
        elif value == ():
            fields[name] = ["/etc/passwd"]
    config_record.recall(c, fields, RECORDED)
    changed = {name for name, value in _leaves(c) if value == "/etc/passwd" or value == ("/etc/passwd",)}
    assert changed and all(name.split(".")[0] in RECORDED for name in changed)
    assert not any(part in name for name in changed for part in ("data", "cache", "init_from", "distributed"))


def test_a_hostile_workdir_is_one_line(tmp_path):
    """config.json, the list of skipped photos and the record of a checkpoint hold code; nothing runs."""
    sign = tmp_path / "executed"
    code = f"__import__('os').mkdir({str(sign)!r})"
    place = tmp_path / "run"
    extra = place / "checkpoints" / "1" / "extra"
    extra.mkdir(parents=True)
    (extra.parent / "state").mkdir()
    extras = {"fields": {"model.name": code}, "history": code}
    hostile = {"extra": extras, "leaves": {"../../x": [code, [], 0]}}
    (extra / "metadata").write_text(json.dumps(checkpoint_record.seal(hostile)))
    for name in ("config.json", "skipped.jsonl", "metrics.jsonl", "summary.json"):
        (place / name).write_text(json.dumps({"file": code, "reason": code, "step": code}) + "\n" + code)
    np.savez(tmp_path / "photos.npz", image=np.zeros((8, 56, 56, 3), np.uint8))
    command = [sys.executable, "-m", "salcl_jax.main", "--config=configs/folder.py:smoke",
               f"--workdir={place}",
               "--config.data.train.kind=arrays", f"--config.data.train.path={tmp_path / 'photos.npz'}",
               "--config.batch_size=8", "--config.model.width=4"]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not sign.exists() and (place / "checkpoints" / "1").exists()
