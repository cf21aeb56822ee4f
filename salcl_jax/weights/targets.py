"""Where weights go: what each destination can hold, its names, and the settings that go with the weights."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from salcl_jax.models.resnet import RESNETS, BottleneckBlock
from salcl_jax.models.vit import VITS, position_embedding
from salcl_jax.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from salcl_jax.types import PyTree
from salcl_jax.weights import names
from salcl_jax.weights.names import Arrays

SUFFIXES = {  # of the file, the first is the usual one; () is a folder
    "torchvision": (".pth", ".safetensors"), "huggingface": (), "detectron2": (".pkl",), "mmdet": (".pth",),
    "timm": (".safetensors", ".pth"), "npz": (".npz",),
}  # fmt: skip
_RESNET = {"huggingface": names.huggingface, "detectron2": names.detectron2}  # the others use torchvision's
_PIXEL_MEAN = [round(255 * x, 3) for x in IMAGENET_MEAN]
_PIXEL_STD = [round(255 * x, 3) for x in IMAGENET_STD]


def check(to: str, model: Any, size: int) -> None:
    """Raise ValueError with one line where the destination has no such network for images of this size.

    model: 'name', 'width' and 'stem' by key.
    """
    name, instead = model["name"], "use --to=npz, which holds any network"
    if to == "npz":
        return
    if name in VITS:
        if to != "timm":
            raise ValueError(f"--to={to}: {name} goes to timm and npz only")
        if size % names.PATCH:
            raise ValueError(f"--size={size}: a ViT's patches have {names.PATCH} px; give a multiple")
        return
    if model["stem"] != "imagenet":
        raise ValueError(
            f"--to={to}: its ResNets begin with a 7x7 convolution of stride 2 and a max pool, those with "
            f"config.model.stem={model['stem']} do not: {instead}"
        )
    any_width = to in ("huggingface", "mmdet") or (to == "detectron2" and _is_deep(name))
    if model["width"] != 64 and not any_width:
        raise ValueError(f"--to={to}: its {name} has width 64, this one {model['width']}: {instead}")


def arrays(
    to: str, model: Any, params: Mapping[str, PyTree], stats: Mapping[str, PyTree], size: int, step: int
) -> Arrays:
    """Arrays of one branch under the destination's names.

    params, stats: modules by name, the encoder and those heads that shall go with it ('projector.0.weight').
    size: side in pixels of the images for which a ViT's positions are written.
    """
    leaves = {module: names.flatten(params[module], stats.get(module, {})) for module in params}
    if to == "npz":
        return {f"{m}/{names.own(p)}": np.asarray(x) for m, found in leaves.items() for p, x in found.items()}
    vit = model["name"] in VITS
    name = names.timm if vit else _RESNET.get(to, names.torchvision)
    encoder = leaves.pop("encoder")
    found = {name(place): names.to_torch(place, x) for place, x in encoder.items()}
    if vit:
        found["pos_embed"] = _positions(size // names.PATCH, VITS[model["name"]][0])
    for module, below in leaves.items():
        for place, x in below.items():
            found[f"{module}.{names.head(place, names.SEQUENTIAL)}"] = names.to_torch(place, x)
    return found if to == "detectron2" else _with_counters(found, step)


def _positions(side: int, width: int) -> np.ndarray:
    """[1, 1 + side^2, width]: none for the class token."""
    grid = position_embedding(side, side, width)
    return np.concatenate([np.zeros_like(grid[:1]), grid])[None]


def _with_counters(found: Arrays, step: int) -> Arrays:
    """PyTorch's batch norms count their updates; a strict load may ask for it."""
    ends = ".running_var"
    counters = {
        f"{name.removesuffix(ends)}.num_batches_tracked": np.array(step, np.int64)
        for name in found
        if name.endswith(ends)
    }
    return found | counters


# What goes with the weights.


def companions(to: str, model: Any, file: str, size: int) -> dict[str, str]:
    """Text files beside the weights by name, or by suffix where the name begins with a dot."""
    if to == "huggingface":
        return {"config.json": _json(_hf_config(model)), "preprocessor_config.json": _json(_hf_images(size))}
    if to == "detectron2":
        return {".yaml": _detectron2(model, file)}
    return {".py": _mmdet(model, file)} if to == "mmdet" else {}


def _is_deep(name: str) -> bool:
    return RESNETS[name][1] is BottleneckBlock


def _json(values: Mapping) -> str:
    return json.dumps(values, indent=2) + "\n"


def _hf_config(model: Any) -> dict:
    depths, block = RESNETS[model["name"]]
    width = model["width"]
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": width,
        "hidden_sizes": [block.expansion * width * 2**i for i in range(4)],
        "depths": list(depths),
        "layer_type": "bottleneck" if _is_deep(model["name"]) else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _hf_images(size: int) -> dict:
    """The shorter side to size / 0.875, its centre, colours as in training."""
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "crop_pct": 0.875,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _detectron2(model: Any, file: str) -> str:
    width = model["width"]
    channels = 4 * width if _is_deep(model["name"]) else width
    return f"""\
# The fields that belong to these weights; merge them over a config such as Base-RCNN-FPN.yaml.
MODEL:
  WEIGHTS: "{file}"
  PIXEL_MEAN: {_PIXEL_MEAN}
  PIXEL_STD: {_PIXEL_STD}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {model["name"].removeprefix("resnet")}
    STEM_OUT_CHANNELS: {width}
    WIDTH_PER_GROUP: {width}
    RES2_OUT_CHANNELS: {channels}
    STRIDE_IN_1X1: False
    NORM: "SyncBN"
INPUT:
  FORMAT: "RGB"
"""


def _mmdet(model: Any, file: str) -> str:
    return f"""\
# The fields that belong to these weights; put a detector's config above them as _base_.
model = dict(
    data_preprocessor=dict(mean={_PIXEL_MEAN}, std={_PIXEL_STD}, bgr_to_rgb=True),
    backbone=dict(
        type="ResNet",
        depth={model["name"].removeprefix("resnet")},
        base_channels={model["width"]},
        style="pytorch",
        frozen_stages=-1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint="{file}"),
    ),
)
"""
