"""The model card: what weights are, where they come from, how to load them."""

from collections.abc import Mapping
from typing import Any

from salcl_jax.ops.augment import IMAGENET_MEAN, IMAGENET_STD

_LICENCES = {  # by the beginning of a data set's name
    "coco": "COCO's photos come from Flickr, each under its owner's licence; the annotations are CC BY 4.0.",
    "imagenet": "ImageNet's photos are for non-commercial research and education only.",
    "voc": "PASCAL VOC's photos come from Flickr, each under its owner's licence.",
}
_TIMM = {
    "vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_b16": "vit_base_patch16_224",
}  # fmt: skip
_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- self-supervised-learning
- resnet
---

"""


def card(about: Mapping[str, Any], fields: Mapping[str, Any], judged: Mapping | None) -> str:
    """A page of Markdown.

    about: to, file, model, branch, heads, step, size, sha256, versions. fields: those of the run, flat.
    judged: content of its eval.json, None where there is none.
    """
    head = _FRONT_MATTER if about["to"] == "huggingface" else ""
    parts = [
        f"# {about['network']}, pre-trained without labels",
        _summary(about, fields),
        f"## How to load it\n\n{_how_to_load(about)}",
        f"## Figures\n\n{_figures(judged, about)}",
        f"## Licence\n\n{_licence(fields)}",
        f"## Configuration\n\n{_table(('field', 'value'), sorted(fields.items()))}",
    ]
    return head + "\n\n".join(parts) + "\n"


def data_name(fields: Mapping[str, Any]) -> str:
    """The training data in a few words."""
    name = fields.get("data.train.name") or {"scenes": "built-in scenes"}.get(fields.get("data.train.kind"))
    images = fields.get("resolved.images")
    return f"{name or 'a folder or array of photos'}" + (f", {images:,} images" if images else "")


def _summary(about: Mapping, fields: Mapping) -> str:
    total = fields.get("resolved.total_steps")
    steps = f"{about['step']:,}" + (f" of {total:,}" if total else "")
    method = [str(fields.get(name)) for name in ("loss.name", "saliency.source", "roi.source")]
    heads = ", ".join(["encoder", *about["heads"]])
    rows = [
        ("file", f"`{about['file']}`, SHA-256 `{about['sha256']}`"),
        ("holds", f"{heads} of the {about['branch']} branch, float32"),
        ("training data", data_name(fields)),
        ("training", f"{steps} steps of {fields.get('batch_size')} images"),
        ("loss, map, regions", ", ".join(method)),
        ("input", f"RGB in [0, 1], less mean {IMAGENET_MEAN}, over standard deviation {IMAGENET_STD}"),
        ("trained on crops of", f"{fields.get('crops.size')} px"),
        ("written by", ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)),
    ]
    return _table(("", ""), rows) + _notes(about)


def _notes(about: Mapping) -> str:
    if about["model"]["name"].startswith("vit"):
        return (
            f"\n\nPositions are fixed sines, written for images of {about['size']} px. For another size "
            "export again with `--size`: timm would interpolate these."
        )
    return (
        "\n\nConvolutions and pooling are padded alike on all sides, as in PyTorch. Batch norm: epsilon "
        "1e-5, momentum 0.1 in PyTorch's sense; the running variances are biased estimates."
    )


def _how_to_load(about: Mapping) -> str:
    file, strict = about["file"], ", strict=False" if about["heads"] else ""
    read = f'torch.load("{file}", weights_only=True)'
    if file.endswith(".safetensors"):
        read = f'safetensors.torch.load_file("{file}")'
    load = f"model.load_state_dict({read}{strict})"
    name = about["model"]["name"]
    code = {
        "torchvision": f"model = torchvision.models.{name}()\nmodel.fc = torch.nn.Identity()\n{load}",
        "timm": f'model = timm.create_model("{_TIMM.get(name, name)}", num_classes=0'
        f"{_image_size(about)})\n{load}",
        "huggingface": 'model = transformers.AutoModel.from_pretrained("FOLDER")\n'
        'backbone = transformers.ResNetBackbone.from_pretrained("FOLDER", out_features=["stage4"])',
        "npz": f'arrays = numpy.load("{file}")  # encoder/stage1_block1/conv1/kernel and so on',
    }
    if about["to"] in ("detectron2", "mmdet"):
        settings = {"detectron2": ".yaml", "mmdet": ".py"}[about["to"]]
        text = f"The fields to set, normalisation among them, are in `{file.rpartition('.')[0]}{settings}`."
    else:
        text = f"```python\n{code[about['to']]}\n```"
    here = "`--config.init_from=FILE` starts from it, `evaluate --checkpoint=FILE` judges it"
    return f"{text}\n\nIn salcl_jax: {here}."


def _image_size(about: Mapping) -> str:
    return f", img_size={about['size']}" if about["model"]["name"].startswith("vit") else ""


def _figures(judged: Mapping | None, about: Mapping) -> str:
    """All figures of eval.json: those of this network and of the same network untrained."""
    if not judged:
        return "Not judged yet: `python -m salcl_jax.evaluate` writes them."
    rows = []
    for found in judged["results"].values():
        trained, untrained = found.get("trained") or {}, found.get("untrained") or {}
        rows += [(name, _number(x), _number(untrained.get(name))) for name, x in trained.items()]
    meta = judged["meta"]
    where = f"Step {meta.get('step')}, {meta.get('branch')} branch, images of {meta.get('size')} px."
    if (meta.get("step"), meta.get("branch")) != (about["step"], about["branch"]):
        where += f" **Not these weights**, which are of step {about['step']}, {about['branch']} branch."
    return f"{where}\n\n{_table(('', 'trained', 'untrained'), rows)}"


def _number(x: Any) -> str:
    return "" if x is None else f"{x:.4g}"


def _licence(fields: Mapping) -> str:
    name = str(fields.get("data.train.name") or "")
    known = next((text for start, text in _LICENCES.items() if name.startswith(start)), None)
    known = known or "The terms of the training photos are known to whoever chose them."
    return (
        f"{known} The weights bring no licence of their own: who publishes them states one, and checks that "
        "the photos' terms allow it."
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in lines)
