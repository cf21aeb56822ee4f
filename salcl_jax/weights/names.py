"""Names and axes of weights, ours and those of PyTorch packages: pure functions of numpy arrays.

A path is where a leaf lies in one of our modules, e.g. ('stage1_block1', 'norm1', 'mean'). Parameters and
batch statistics share one flat dictionary, as in a state dict: their last words differ.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Place = tuple[str, ...]
Arrays = dict[str, np.ndarray]
PATCH = 16

_LEAVES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
}  # fmt: skip
_STATISTICS = ("mean", "var")
_VIT = {"attention": "attn", "out": "proj", "dense1": "mlp.fc1", "dense2": "mlp.fc2"}


class Layout(NamedTuple):
    """How one family of packages names an encoder; name: path -> name, None for a leaf it cannot have."""

    title: str
    name: Callable[[Place], str | None]
    torch_axes: bool = True


def flatten(params: Mapping, stats: Mapping) -> dict[Place, Any]:
    """Leaves of a module's parameters and batch statistics by path."""
    found: dict[Place, Any] = {}

    def visit(tree: Any, path: Place) -> None:
        if not isinstance(tree, Mapping):
            found[path] = tree
            return
        for name, below in tree.items():
            visit(below, (*path, name))

    visit(params, ())
    visit(stats, ())
    return found


def unflatten(leaves: Mapping[Place, Any]) -> tuple[dict, dict]:
    """(params, stats) of a module from its leaves."""
    trees: tuple[dict, dict] = ({}, {})
    for path, value in leaves.items():
        tree = trees[path[-1] in _STATISTICS]
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        tree[path[-1]] = value
    return trees


# Names.


def own(path: Place) -> str | None:
    """Our own names, of .npz files."""
    return "/".join(path)


def torchvision(path: Place) -> str | None:
    """ResNets in torchvision; also timm, mmdet and what is written with these."""
    return _resnet(path, "conv1", "bn1", "layer{stage}.{block}.", "conv{n}", "bn{n}", "downsample.{n}")


def detectron2(path: Place) -> str | None:
    """ResNets in Detectron2: a norm belongs to its convolution, stages count from 2."""
    where = "res{next}.{block}."
    shortcut = ("shortcut", "shortcut.norm")
    return _resnet(path, "stem.conv1", "stem.conv1.norm", where, "conv{n}", "conv{n}.norm", shortcut)


def huggingface(path: Place) -> str | None:
    """ResNets in Hugging Face transformers; everything counts from 0."""
    stem, where = "embedder.embedder.", "encoder.stages.{before}.layers.{block}."
    conv, norm = "layer.{last}.convolution", "layer.{last}.normalization"
    shortcut = ("shortcut.convolution", "shortcut.normalization")
    return _resnet(path, f"{stem}convolution", f"{stem}normalization", where, conv, norm, shortcut)


def _resnet(
    path: Place, stem: str, stem_norm: str, where: str, conv: str, norm: str, shortcut: str | tuple[str, str]
) -> str | None:
    """Name of a ResNet's leaf by the patterns of its parts; None for a leaf of another network."""
    if len(path) != 3 or path[2] not in _LEAVES:
        return None
    place, part, leaf = path[0], path[1], _LEAVES[path[2]]
    if place == "stem":
        return f"{stem if part == 'conv' else stem_norm}.{leaf}"
    found = re.fullmatch(r"stage(\d)_block(\d+)", place)
    if not found:
        return None
    stage, block = int(found[1]), int(found[2]) - 1
    if part.startswith("shortcut"):
        n = int(part == "shortcut_norm")
        part = shortcut[n] if isinstance(shortcut, tuple) else shortcut.format(n=n)
    else:
        n = int(part[-1])
        part = (conv if part.startswith("conv") else norm).format(n=n, last=n - 1)
    return where.format(stage=stage, next=stage + 1, before=stage - 1, block=block) + f"{part}.{leaf}"


def timm(path: Place) -> str | None:
    """ViTs in timm; also MoCo v3, and DINO but for its learnt positions."""
    if path == ("class_token",):
        return "cls_token"
    if path[-1] not in _LEAVES or path[0].startswith("st"):
        return None
    parts = [_VIT.get(part, part) for part in path[:-1]]
    block = re.fullmatch(r"block(\d+)", path[0])
    parts[0] = f"blocks.{int(block[1]) - 1}" if block else {"patch": "patch_embed.proj"}.get(path[0], path[0])
    return ".".join([*parts, _LEAVES[path[-1]]])


LAYOUTS = (
    Layout("torchvision", torchvision),
    Layout("huggingface", huggingface),
    Layout("detectron2", detectron2),
    Layout("timm", timm),
    Layout("npz", lambda path: f"encoder/{own(path)}", torch_axes=False),
)

# A head is linear, batch norm, ReLU, linear: as a torch Sequential, and as OpenMMLab names it.
SEQUENTIAL = {"dense1": "0", "norm": "1", "dense2": "3"}
OPENMMLAB = {"dense1": "fc0", "norm": "bn0", "dense2": "fc1"}


def head(path: Place, parts: Mapping[str, str]) -> str:
    """Name of a leaf of a projector or predictor below its prefix."""
    return f"{parts[path[0]]}.{_LEAVES[path[1]]}"


# Axes.


def torch_shape(path: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in PyTorch of a leaf with this shape."""
    if path[-1] != "kernel":
        return shape
    if path[0] == "patch":
        return (shape[1], 3, PATCH, PATCH)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def to_torch(path: Place, x: np.ndarray) -> np.ndarray:
    """A leaf with PyTorch's axes: convolutions [out, in, y, x], linear layers [out, in].

    A ViT's patch embedding is a linear layer on [y, x, colour] here and a convolution there.
    """
    x = np.asarray(x)
    if path[-1] != "kernel":
        return np.ascontiguousarray(x) if x.ndim else x
    if path[0] == "patch":
        x = x.reshape(PATCH, PATCH, 3, -1)
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T)


def from_torch(path: Place, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if path[-1] != "kernel":
        return x
    x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]) if path[0] == "patch" else x)
