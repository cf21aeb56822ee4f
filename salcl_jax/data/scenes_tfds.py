"""The built-in scenes as a tfds data set. Imports tfds: import this module late."""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from salcl_jax.data import scenes


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """A tfds config named after its dials, so that other dials never share a folder."""

    dials: scenes.Dials = dataclasses.field(default_factory=scenes.Dials)


def config_of(dials: scenes.Dials) -> ScenesConfig:
    text = dials.identity()
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"s{dials.size}_c{dials.num_classes}_{digest}"
    return ScenesConfig(name=name, description=text, dials=dials)


class SalclScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of several textured shapes with exact boxes and instance maps."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [config_of(scenes.Dials())]

    def _info(self) -> tfds.core.DatasetInfo:
        dials = self.builder_config.dials
        label = tfds.features.ClassLabel(names=list(scenes.CLASS_NAMES[: dials.num_classes]))
        features = {
            "image": tfds.features.Image(shape=(dials.size,) * 2 + (3,), encoding_format="png"),
            "instances": tfds.features.Image(shape=(dials.size,) * 2 + (1,), encoding_format="png"),
            "objects": tfds.features.Sequence(
                {"bbox": tfds.features.BBoxFeature(), "label": label}
            ),
            "label": label,  # of the object with most visible pixels
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # record i is scene i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {name: self._generate_examples(name) for name in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        dials = self.builder_config.dials
        first, count = dials.split(split)
        for number in range(count):
            scene = dials.render(first + number)
            yield number, _example(scene)


def _example(scene: dict[str, np.ndarray]) -> dict[str, Any]:
    objects = [
        {"bbox": tfds.features.BBox(*map(float, box)), "label": int(label)}
        for box, label in zip(scene["boxes"], scene["classes"], strict=True)
    ]
    return {
        "image": _png(scene["image"]),
        "instances": _png(scenes.instance_map(scene)),
        "objects": objects,
        "label": int(scene["classes"][scenes.largest(scene)]),
    }


def _png(image: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # noise hardly shrinks: be quick
    buffer.seek(0)
    return buffer


def prepare(data_dir: str | None = None, **dials: Any) -> SalclScenes:
    """The builder of the scenes with these dials (see scenes.Dials), written on first use.

    data_dir None = the tfds default. Several processes may call it at once: each writes to a
    folder of its own, and the first to finish wins. Raises ValueError for an unknown dial.
    """
    unknown = set(dials) - {field.name for field in dataclasses.fields(scenes.Dials)}
    if unknown:
        raise ValueError(f"scenes: unknown dial {', '.join(sorted(unknown))}")
    config = config_of(scenes.Dials(**dials))
    if config.name in SalclScenes.builder_configs:
        config = config.name  # tfds refuses a second config of one name, even an equal one
    folder = os.path.expanduser(data_dir) if data_dir else None
    with _quiet():
        builder = SalclScenes(config=config, data_dir=folder)
        if builder.is_prepared():
            return builder
        try:
            builder.download_and_prepare()
        except Exception:
            if not SalclScenes(config=config, data_dir=folder).is_prepared():
                raise
        return SalclScenes(config=config, data_dir=folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no lines about a custom config or a folder that does not exist yet."""
    tfds.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
