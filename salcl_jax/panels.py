"""The pictures of a run: the same few images at every step, through the functions that training uses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from salcl_jax import frozen, sharding
from salcl_jax.data.sources import Source
from salcl_jax.guidance import make_crops
from salcl_jax.models.network import Network
from salcl_jax.rng import key_for
from salcl_jax.types import TrainState
from salcl_jax.visualize import panel


def make_panel(
    network: Network, config: Any, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]
) -> Callable[[TrainState], np.ndarray]:
    """Function state -> picture of the same few images, with full guidance and fixed draws."""
    source = sources.get("localization", sources["pretext"])
    count = min(config.log.panel_images, len(source))
    size = frozen.divisible(count, mesh)
    batch = next(iter(frozen.batches(source, config, batch_size=size, limit=count)))
    draw = make_crops(network, config)
    maps_fn = frozen.make_maps_fn(network, config, mesh)
    names = [n for n in ("image", "aspect", "boxes") if n in batch]
    if config.roi.source == "ground_truth" and "boxes" not in batch:
        raise ValueError(f"config.roi.source = 'ground_truth': {source.name} has no boxes to draw")

    def crops(state: TrainState, leaves: dict):
        return draw(key_for(config.seed, 0, "panel"), state, leaves, 1.0)

    jitted = jax.jit(crops, out_shardings=sharding.replicated(mesh))

    def draw_panel(state: TrainState) -> np.ndarray:
        leaves = sharding.to_device(sharding.share_of_process({n: batch[n] for n in names}), mesh)
        found = jax.device_get(jitted(state, leaves))
        maps, rois = maps_fn(state, batch["image"])
        rois = found.rois or rois
        small = [] if found.local is None else list(np.moveaxis(found.local[:count], 1, 0))
        views = list(np.moveaxis(found.pair[:count], 1, 0))
        tile = config.crops.size
        views += [_enlarge(view, tile) for view in small]
        return panel(
            batch["image"][:count], maps[:count], type(rois)(*(x[:count] for x in rois)),
            np.stack(views, axis=1), found.boxes[:count],
            batch["boxes"][:count] if "boxes" in batch else None,
        )  # fmt: skip

    return draw_panel


def _enlarge(view: np.ndarray, side: int) -> np.ndarray:
    """Nearest-neighbour copy of crops [n, q, q, 3] at another side, so that all fit one picture."""
    index = np.arange(side) * view.shape[1] // side
    return view[:, index][:, :, index]
