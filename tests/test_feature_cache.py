"""Features on disk: what is kept is what was computed, and only for the same key."""

import logging
import os
import shutil

import numpy as np
import pytest

from salcl_jax.feature_cache import cached, digest, user_folder


class Counter:
    """Gives other columns at each call, so that a stored one is recognised."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"pooled": np.full((3, 2), float(self.calls), np.float32), "label": np.arange(3)}


def test_the_same_key_is_computed_once_and_another_again(tmp_path):
    compute = Counter()
    key = {"weights": "a", "size": 64, "levels": ["pooled"]}
    first = cached(str(tmp_path), key, compute)
    again = cached(str(tmp_path), dict(reversed(key.items())), compute)
    assert compute.calls == 1
    assert set(again) == {"pooled", "label"}
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])
        assert again[name].dtype == first[name].dtype
    assert cached(str(tmp_path), key | {"size": 65}, compute)["pooled"][0, 0] == 2


def test_without_a_folder_nothing_is_kept():
    compute = Counter()
    cached(None, {}, compute)
    assert cached(None, {}, compute)["pooled"][0, 0] == 2


INDICES = ["{", "[]", "7", '{"columns": 7}', '{"columns": ["pooled"]}', "[" * 100_000]


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "an archive", *INDICES, "half a write"])
def test_what_cannot_be_read_is_computed_again(tmp_path, damage):
    compute = Counter()
    cached(str(tmp_path), {}, compute)
    (place,) = tmp_path.iterdir()
    if damage == "truncated":
        os.truncate(place / "pooled.npy", 100)
    elif damage == "empty":
        os.truncate(place / "pooled.npy", 0)
    elif damage == "an archive":
        with open(place / "pooled.npy", "wb") as file:
            np.savez(file, np.zeros((3, 2)))
    elif damage == "missing":
        (place / "label.npy").unlink()
    elif damage in INDICES:
        (place / "columns.json").write_text(damage)
    else:
        shutil.move(place, tmp_path / ".half-1")
    assert cached(str(tmp_path), {}, compute)["pooled"][0, 0] == 2
    assert cached(str(tmp_path), {}, compute)["pooled"][0, 0] == 2
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith(".half")]) == 1


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = cached(str(tmp_path / "file"), {}, Counter())
    assert found["pooled"][0, 0] == 1
    assert "config.tasks.cache" in caplog.text


def test_the_digest_sees_every_bit_name_and_shape():
    tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.arange(4)}}
    same = {"b": {"c": np.arange(4)}, "a": np.zeros((2, 3), np.float32)}
    assert digest(tree) == digest(same)
    flipped = np.zeros((2, 3), np.float32)
    flipped[1, 2] = np.float32(1e-45)
    others = [
        tree | {"a": flipped},
        tree | {"a": np.zeros((3, 2), np.float32)},
        tree | {"a": np.zeros((2, 3), np.int32)},
        {"d": tree["a"], "b": tree["b"]},
    ]
    assert len({digest(tree), *map(digest, others)}) == 5


def test_the_folder_follows_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder("features") == str(tmp_path / "salcl_jax" / "features")
