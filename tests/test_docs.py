"""The guides say what is true: pages build without warnings, commands and files are valid, examples run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_readme import load, value_of

from salcl_jax import config as lib
from salcl_jax import guidance, maps
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init
from salcl_jax.validation import validate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
COMMANDS = [
    line.strip()
    for text in GUIDES.values()
    for kind, block in re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.S | re.M)
    for line in block.replace("\\\n", " ").splitlines()
    if not kind and ("salcl_jax.main" in line or "salcl_jax.compile" in line)
]
FILE = r"`((?:configs|launch|salcl_jax)/[\w/.]+\w)"


@pytest.fixture
def edges(tmp_path, monkeypatch):
    """The file of the guide, where the package finds it; `draw` of it."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDES["new_saliency_source.md"], flags=re.S)
    (tmp_path / "edges.py").write_text(code)
    monkeypatch.setattr(maps, "__path__", [*maps.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "salcl_jax.maps.edges", raising=False)
    return maps.find("edges")


class Encoder:
    """Stands in for a network: its only stage is what it is given."""

    def encode(self, params, stats, x, train):
        assert not train
        return {"stage2": x}, None


def test_the_new_source_of_the_guide_measures_edges(edges):
    x = np.random.default_rng(0).normal(size=(2, 1, 4, 5, 3)).astype(np.float32)
    c = lib.ConfigDict({"stages": ("stage2", "stage3")})
    found = np.asarray(edges(Encoder(), c, None, None, jnp.array(x)))
    expected = np.zeros((2, 4, 5))
    for i, y, x0 in np.ndindex(expected.shape):
        here = x[i, 0, y, x0]
        below, right = x[i, 0, min(y + 1, 3), x0], x[i, 0, y, min(x0 + 1, 4)]
        expected[i, y, x0] = np.sqrt(np.sum((below - here) ** 2) + np.sum((right - here) ** 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_new_source_of_the_guide_is_chosen_by_its_name_alone(edges):
    c = load("configs/scenes.py:smoke")
    c.model.width, c.model.projector_hidden, c.model.predictor_hidden = 4, 8, 8
    c.saliency.source, c.saliency.size = "edges", 32
    validate(c)
    network = build(**c.model)
    state = make_init(network, lib.finish(c, devices=1, images=64))
    draw = guidance.make_saliency(network, c)
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    found = jax.jit(lambda: draw(state().params, state().batch_stats, images))()
    assert found.shape[0] == 2 and found.shape[1] > 1
    ends = [found.min(axis=(1, 2)), found.max(axis=(1, 2))]
    np.testing.assert_allclose(ends, [[0, 0], [1, 1]], atol=1e-6)


def test_without_its_file_a_source_is_refused():
    c = load("configs/scenes.py")
    c.saliency.source = "edges"
    with pytest.raises(lib.ConfigError, match="saliency.source = 'edges': allowed: none, activation, "):
        validate(c)
    with pytest.raises(ValueError, match=r"'\.\.ops': allowed: none, activation, attention"):
        maps.find("..ops")  # a checkpoint's record may name anything


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_guide_is_a_valid_configuration(command, edges):
    options = dict(re.findall(r"--(\S+?)=(\"[^\"]*\"|\S+)", command))
    c = load(options.pop("config")).lock()
    fields = {name.removeprefix("config."): value for name, value in options.items() if "config." in name}
    c.update_from_flattened_dict({name: value_of(value) for name, value in fields.items()})
    validate(c)


@pytest.mark.parametrize("name", GUIDES)
def test_files_and_fields_that_a_guide_names_exist(name):
    text = GUIDES[name]
    for path in re.findall(FILE, text):
        assert (ROOT / path).exists() or path == "salcl_jax/maps/edges.py", path
    for path, variant in re.findall(r"`(configs/\w+\.py):(\w+)`", text):
        load(f"{path}:{variant}")
    sections = "|".join(key for key, value in lib.base().items() if isinstance(value, lib.ConfigDict))
    for field in re.findall(rf"`(?:config\.)?((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", text):
        section = lib.base()
        for part in field.split("."):
            section = section[part]


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small_and_shown(path):
    assert path.stat().st_size < 200_000
    pages = [*GUIDES.values(), *((ROOT / page).read_text() for page in ("README.md", "RESULTS.md"))]
    assert any(path.name in text for text in pages)


@pytest.mark.skipif(not importlib.util.find_spec("sphinx"), reason="pip install -e .[docs]")
@pytest.mark.skipif(not importlib.util.find_spec("myst_parser"), reason="pip install -e .[docs]")
def test_pages_are_built_without_a_warning(tmp_path):
    """As `make docs` does, in a process of its own: the check of shapes would change the docstrings."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    how = {"env": os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, "cwd": tmp_path}
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True, **how)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    page = (tmp_path / "html" / "reference.html").read_text()
    for name in ("salcl_jax.ops.boxes.iou", "salcl_jax.guidance.make_crops", "salcl_jax.api.load"):
        assert f'id="{name}"' in page, name
    assert "Intersection over union in [0, 1]" in page
