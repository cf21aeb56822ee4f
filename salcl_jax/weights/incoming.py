"""A file of weights fitted to our networks: any prefix, any of the known layouts, one or two branches.

What a file is, is read from its names: a layout is recognised by the name of one convolution (or attention
layer), what stands before it is the prefix, and words in the prefix tell the target branch from the online
one. So 'backbone.', 'module.encoder_q.', 'online_net.0.' need no entry of their own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from salcl_jax.models.vit import VITS, position_embedding
from salcl_jax.types import PyTree, TrainState
from salcl_jax.weights import files, names
from salcl_jax.weights.names import Arrays, Layout, Place

FEW = 4  # names in a message
_TARGET = {"target", "momentum", "teacher", "ema", "k", "key"}
_ANCHORS: tuple[Place, ...] = (("stage4_block1", "conv1", "kernel"), ("block1", "attention", "qkv", "kernel"))
_HEADS = {  # a prefix is followed by the names of the last linear layer and of the batch norm's mean
    "torch": (names.SEQUENTIAL, "3.weight", "1.running_mean"),
    "openmmlab": (names.OPENMMLAB, "fc1.weight", "bn0.running_mean"),
}
_COUNTERS = ("num_batches_tracked",)
_RECORD = {"name": str, "width": int, "stem": str}  # what a file of ours says of its network


class Incoming(NamedTuple):
    """Networks from a file, and a line that says what was taken."""

    trees: dict[str, dict[str, PyTree]]  # {'params': {'encoder': ...}, ...}: only the modules that were found
    line: str


class _Found(NamedTuple):
    """One module in a file."""

    prefix: str
    values: dict[Place, np.ndarray]
    used: frozenset[str]


def load(path: str, shapes: TrainState, model: Any) -> Incoming:
    """Weights of a file for networks of these shapes; a branch that the file lacks is as the other one.

    model: 'name', 'width' and 'stem', for what a file says of itself and for messages. The encoder must be
    there as a whole and fit; a head is taken where all of it fits, else it is missing in the result. Raises
    ValueError with one line for a file that cannot be read or is of another network, FileNotFoundError and
    ImportError as `files.read`.
    """
    arrays, about = files.read(path)
    _check_record(path, about, model)
    encoders = _encoders(path, arrays, shapes, model)
    heads = {name: _heads(name, arrays, shapes) for name in ("projector", "predictor")}
    found = {"encoder": encoders, **heads}
    trees: dict[str, dict] = {"params": {}, "batch_stats": {}, "target_params": {}, "target_batch_stats": {}}
    for name, branches in found.items():
        for branch in ("", "target_") if name != "predictor" else ("",):
            chosen = branches.get(branch) or branches.get("target_" if not branch else "")
            if chosen:
                trees[f"{branch}params"][name], trees[f"{branch}batch_stats"][name] = names.unflatten(
                    chosen.values
                )
    return Incoming(trees, _describe(path, arrays, found, shapes) + _assumed(about, model))


def put(state: TrainState, trees: Mapping[str, Mapping[str, PyTree]], places: TrainState) -> TrainState:
    """The state with these modules in the place of its own, on the devices that `places` (shardings) says."""
    there = {field: {m: getattr(places, field)[m] for m in trees[field]} for field in trees}
    placed = jax.jit(lambda t: t, out_shardings=there)(dict(trees))
    return state._replace(**{field: {**getattr(state, field), **placed[field]} for field in trees})


def describe(model: Any) -> str:
    """'resnet50, width 64, stem imagenet', or the name of a ViT."""
    if model["name"].startswith("vit"):
        return model["name"]
    return f"{model['name']}, width {model['width']}, stem {model['stem']}"


def _check_record(path: str, about: Mapping, model: Any) -> None:
    if "model" not in about:
        return
    theirs = about["model"]
    if not isinstance(theirs, dict) or any(type(theirs.get(n)) is not kind for n, kind in _RECORD.items()):
        said = repr(str(theirs)[:80])
        raise ValueError(f"{path}: its record lacks the network's name, width or stem ({said}); export again")
    if describe(theirs) != describe(model):
        fields = ("name",) if theirs["name"].startswith("vit") else ("name", "width", "stem")
        flags = " ".join(f"--config.model.{name}={theirs[name]}" for name in fields)
        raise ValueError(f"{path} is {describe(theirs)}, here is {describe(model)}: give {flags}")


def _assumed(about: Mapping, model: Any) -> str:
    """What arrays do not tell: MoCo v3's ViT-S has twelve attention heads in arrays of the same shape."""
    if about.get("model") or model["name"] not in VITS:
        return ""
    return f"; attention heads are not in the file: taken as {VITS[model['name']][2]}"


# The encoder.


def _encoders(path: str, arrays: Arrays, shapes: TrainState, model: Any) -> dict[str, _Found]:
    """{'' | 'target_': encoder}; raises ValueError unless there is one, or one a branch, that fits."""
    wanted = _wanted(shapes, "encoder")
    here = f"config.model: {describe(model)}"
    found = _distinct(
        _fit_encoder(path, arrays, wanted, layout, prefix, here)
        for layout, prefix in _anchored(arrays, wanted)
    )
    if not found:
        raise ValueError(f"{path} holds no such encoder ({here}): {_few('it has', [*arrays])}")
    for several in found.values():
        if len(several) > 1:
            which = ", ".join(repr(one.prefix) for one in several)
            raise ValueError(f"{path} holds several encoders, {which}: leave one of them in the file")
    return {branch: one for branch, (one,) in found.items()}


def _anchored(arrays: Arrays, wanted: Mapping[Place, tuple]) -> Iterator[tuple[Layout, str]]:
    """Layouts, with prefixes, by which the file names an encoder."""
    anchor = next(place for place in _ANCHORS if place in wanted)
    for layout in names.LAYOUTS:
        for prefix in _prefixes(arrays, layout.name(anchor)):
            yield layout, prefix


def _prefixes(arrays: Arrays, end: str | None) -> list[str]:
    """What stands before `end` in names that end so; '' or whole words with their last dot."""
    found = [name.removesuffix(end) for name in arrays if end and name.endswith(end)]
    return [prefix for prefix in found if not prefix or prefix.endswith(".")]


def _fit_encoder(
    path: str, arrays: Arrays, wanted: Mapping[Place, tuple], layout: Layout, prefix: str, here: str
) -> _Found:
    there = {place: f"{prefix}{layout.name(place)}" for place in wanted}
    missing = [name for name in there.values() if name not in arrays]
    for name, expected in _misfit(arrays, there, wanted, layout.torch_axes):
        raise ValueError(
            f"{path} is of another network: {name} is {list(arrays[name].shape)} there and "
            f"{list(expected)} here ({here}); set config.model.name, width and stem to the file's"
        )
    used = set(there.values())
    parts = {_first_word(name, prefix) for name in used}
    below = [name for name in _meaningful(arrays) if name.startswith(prefix)]
    strange = [name for name in below if name not in used and _first_word(name, prefix) in parts]
    if missing or strange:
        raise ValueError(
            f"{path} is of another network ({here}): it {_few('lacks', missing)} and "
            f"{_few('has besides', strange)}"
        )
    values = _values(arrays, there, layout.torch_axes)
    if f"{prefix}pos_embed" in arrays:
        _check_positions(path, arrays[f"{prefix}pos_embed"])
        used.add(f"{prefix}pos_embed")
    return _Found(prefix, values, frozenset(used))


def _check_positions(path: str, theirs: np.ndarray) -> None:
    """Refuse positions other than ours: features would be those of another network."""
    side, width = round((theirs.shape[1] - 1) ** 0.5), theirs.shape[-1]
    if theirs.shape[1] == side * side + 1:
        ours = position_embedding(side, side, width)
        if np.allclose(theirs[0, 1:], ours, atol=1e-4) and not theirs[0, 0].any():
            return
    raise ValueError(f"{path} has learnt positions (pos_embed); a ViT here has fixed ones and cannot be it")


# Heads.


def _heads(module: str, arrays: Arrays, shapes: TrainState) -> dict[str, _Found]:
    """{'' | 'target_': head} of those that fit as a whole and are the only ones of their kind."""
    wanted = _wanted(shapes, module)
    found = _distinct(
        _Found(prefix, _values(arrays, there, torch_axes), frozenset(there.values()))
        for prefix, there, torch_axes in _named_heads(arrays, module, wanted)
        if {name for name in _meaningful(arrays) if name.startswith(prefix)} == set(there.values())
        and not any(_misfit(arrays, there, wanted, torch_axes))
    )
    return {branch: several[0] for branch, several in found.items() if len(several) == 1}


def _named_heads(
    arrays: Arrays, module: str, wanted: Mapping[Place, tuple]
) -> Iterator[tuple[str, dict[Place, str], bool]]:
    """(prefix, names of the leaves, whether axes are torch's) of what may be a head of this kind."""
    if f"{module}/dense1/kernel" in arrays:
        yield f"{module}/", {place: f"{module}/{names.own(place)}" for place in wanted}, False
    for parts, end, also in _HEADS.values():
        for prefix in _prefixes(arrays, end):
            kind = "predictor" if "predictor" in prefix else "projector"
            if kind == module and f"{prefix}{also}" in arrays:
                yield prefix, {place: prefix + names.head(place, parts) for place in wanted}, True


# Shared.


def _wanted(shapes: TrainState, module: str) -> dict[Place, tuple]:
    leaves = names.flatten(shapes.params[module], shapes.batch_stats[module])
    return {place: tuple(leaf.shape) for place, leaf in leaves.items()}


def _branch(prefix: str) -> str:
    return "target_" if _TARGET & set(re.split(r"[._/]", prefix.lower())) else ""


def _first_word(name: str, prefix: str) -> str:
    return re.split(r"[./]", name.removeprefix(prefix))[0]


def _misfit(
    arrays: Arrays, there: Mapping[Place, str], wanted: Mapping[Place, tuple], torch_axes: bool
) -> Iterator[tuple[str, tuple]]:
    """(name, shape that is wanted) of arrays of another shape."""
    for place, name in there.items():
        expected = names.torch_shape(place, wanted[place]) if torch_axes else wanted[place]
        if name in arrays and arrays[name].shape != expected:
            yield name, expected


def _values(arrays: Arrays, there: Mapping[Place, str], torch_axes: bool) -> dict[Place, np.ndarray]:
    found = {place: np.asarray(arrays[name], np.float32) for place, name in there.items()}
    return {place: names.from_torch(place, x) if torch_axes else x for place, x in found.items()}


def _distinct(found: Iterable[_Found]) -> dict[str, list[_Found]]:
    """By branch, without repetitions: files often hold one network under two names."""
    branches: dict[str, list[_Found]] = {}
    for one in found:
        others = branches.setdefault(_branch(one.prefix), [])
        same = next((i for i, other in enumerate(others) if _equal(one, other)), None)
        if same is None:
            others.append(one)
        else:
            others[same] = others[same]._replace(used=others[same].used | one.used)
    return branches


def _equal(a: _Found, b: _Found) -> bool:
    return all(np.array_equal(x, b.values[place]) for place, x in a.values.items())


def _meaningful(arrays: Arrays) -> list[str]:
    """Names without the counters of batch norms."""
    return [name for name in arrays if not name.endswith(_COUNTERS)]


def _few(what: str, found: list[str]) -> str:
    """'lacks 12 (a, b, ...)', 'lacks none'."""
    shown = ", ".join(found[:FEW]) + (", ..." if len(found) > FEW else "")
    return f"{what} {len(found)} ({shown})" if found else f"{what} none"


def _describe(path: str, arrays: Arrays, found: Mapping[str, Mapping[str, Any]], shapes: TrainState) -> str:
    """What was taken, what keeps its initial values, and what of the file stays unused."""
    taken, used, kept = [], set(), []
    for module, branches in found.items():
        for branch, one in sorted(branches.items()):
            where = f" of {one.prefix!r}" if one.prefix else ""
            taken.append(f"{branch.replace('_', ' ')}{module}{where}")
            used |= one.used
        kept += [] if branches else [f"{module}/{names.own(place)}" for place in _wanted(shapes, module)]
    left = [name for name in _meaningful(arrays) if name not in used and not name.startswith("optimizer")]
    return (
        f"weights: {path}: took {len(used)} arrays ({', '.join(taken)}); {_few('not in the file:', kept)}; "
        f"{_few('not used:', left)}"
    )
