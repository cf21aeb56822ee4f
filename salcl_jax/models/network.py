"""Encoder, projector and predictor as pure functions of (params, batch_stats).

The only file that knows how Flax applies a module; the rest sees trees and functions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from salcl_jax.models.heads import MLP
from salcl_jax.models.resnet import RESNETS, STAGE_NAMES, STEMS, ResNet
from salcl_jax.models.vit import VITS, ViT

__all__ = [
    "STAGE_NAMES",
    "Network",
    "build",
    "forward_online",
    "forward_target",
    "parameter_table",
]

PyTree = Any


@dataclass(frozen=True)
class Network:
    """The three modules. Every method takes the whole params and batch_stats dictionaries.

    With train=True batch norm uses the statistics of each view and the new running statistics are
    returned; with train=False it uses the running ones and returns them unchanged.
    """

    encoder: nn.Module
    projector: nn.Module
    predictor: nn.Module

    def init(self, key: PRNGKeyArray, size: int) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        """Fresh float32 (params, batch_stats), each {'encoder', 'projector', 'predictor'}.

        size: side of the images in pixels (parameters do not depend on it). A module without batch
        norm has {} as its statistics.
        """
        variables = _init(self, key, size)
        params = {name: v["params"] for name, v in variables.items()}
        return params, {name: v.get("batch_stats", {}) for name, v in variables.items()}

    def encode(
        self,
        params: dict[str, PyTree],
        batch_stats: dict[str, PyTree],
        images: Float[Array, "b v p q 3"],
        *,
        train: bool,
    ) -> tuple[dict[str, Array], PyTree]:
        """Activations of normalised images, all views in one pass, and new encoder statistics.

        Returns 'stage1' .. 'stage4' [b, v, h, w, d] in the compute dtype and 'pooled' [b, v, d]
        float32; a ResNet adds 'conv1' and 'stem' [b, v, h, w, d], a ViT 'attention' [b, v, heads, h, w].
        """
        return _apply(self.encoder, params["encoder"], batch_stats["encoder"], images, train)

    def project(
        self,
        params: dict[str, PyTree],
        batch_stats: dict[str, PyTree],
        pooled: Float[Array, "b v d"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b v e"], PyTree]:
        """Projections, float32, and new projector statistics."""
        return _apply(self.projector, params["projector"], batch_stats["projector"], pooled, train)

    def predict(
        self,
        params: dict[str, PyTree],
        batch_stats: dict[str, PyTree],
        z: Float[Array, "b v d"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b v e"], PyTree]:
        """Predictions from projections, float32, and new predictor statistics."""
        return _apply(self.predictor, params["predictor"], batch_stats["predictor"], z, train)


@partial(jax.jit, static_argnums=(0, 2))  # drops the forward pass: only its shapes are needed
def _init(network: Network, key: PRNGKeyArray, size: int) -> dict[str, PyTree]:
    keys = jax.random.split(key, 3)
    how = {"views": 1, "train": False}
    x = jnp.zeros((1, size, size, 3), jnp.float32)
    y, encoder = network.encoder.init_with_output(keys[0], x, **how)
    z, projector = network.projector.init_with_output(keys[1], y["pooled"], **how)
    predictor = network.predictor.init(keys[2], z, **how)
    return {"encoder": encoder, "projector": projector, "predictor": predictor}


def _apply(
    module: nn.Module, params: PyTree, stats: PyTree, x: Float[Array, "b v ..."], train: bool
) -> tuple[PyTree, PyTree]:
    """Apply a module to [b, v, ...] flattened to [b*v, ...]; unflatten whatever it returns."""
    b, v = x.shape[:2]
    variables = {"params": params, "batch_stats": stats}
    flat = x.reshape(b * v, *x.shape[2:])
    if train:
        y, new = module.apply(variables, flat, views=v, train=True, mutable=["batch_stats"])
        stats = new.get("batch_stats", {})
    else:
        y = module.apply(variables, flat, views=v, train=False)
    return jax.tree.map(lambda a: a.reshape(b, v, *a.shape[1:]), y), stats


def forward_online(
    network: Network,
    params: dict[str, PyTree],
    batch_stats: dict[str, PyTree],
    images: Float[Array, "b v p q 3"],
    train: bool = True,
) -> tuple[Float[Array, "b v e"], Float[Array, "b v f"], Float[Array, "b v d"], dict[str, PyTree]]:
    """Online branch: (projection, prediction, pooled, new batch_stats)."""
    outputs, encoder = network.encode(params, batch_stats, images, train=train)
    z, projector = network.project(params, batch_stats, outputs["pooled"], train=train)
    q, predictor = network.predict(params, batch_stats, z, train=train)
    stats = {"encoder": encoder, "projector": projector, "predictor": predictor}
    return z, q, outputs["pooled"], stats


def forward_target(
    network: Network,
    params: dict[str, PyTree],
    batch_stats: dict[str, PyTree],
    images: Float[Array, "b v p q 3"],
    train: bool = True,
) -> tuple[Float[Array, "b v e"], dict[str, PyTree]]:
    """Target branch: (projection, new batch_stats); needs no predictor in either tree."""
    outputs, encoder = network.encode(params, batch_stats, images, train=train)
    z, projector = network.project(params, batch_stats, outputs["pooled"], train=train)
    return z, {**batch_stats, "encoder": encoder, "projector": projector}


def build(
    *,
    name: str,
    width: int,
    stem: str,
    projector_hidden: int,
    projector_out: int,
    predictor_hidden: int,
    dtype: str,
    remat: bool,
    zero_init_residual: bool,
) -> Network:
    """Network by encoder name, a key of RESNETS or VITS; the predictor ends as the projector does.

    width: base width of a ResNet (64 is the usual one). width, stem and zero_init_residual do not
    concern a ViT. dtype: 'float32' or 'bfloat16', of the computation only. Raises ValueError for an
    unknown name, stem or dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model: unknown dtype {dtype!r}; choose 'float32' or 'bfloat16'.")
    if stem not in STEMS:
        raise ValueError(f"model: unknown stem {stem!r}; choose one of {STEMS}.")
    if name in RESNETS:
        blocks, block = RESNETS[name]
        encoder = ResNet(blocks, block, width, stem, dtype, remat, zero_init_residual)
    elif name in VITS:
        vit_width, depth, heads = VITS[name]
        encoder = ViT(vit_width, depth, heads, dtype=dtype, remat=remat)
    else:
        raise ValueError(f"model: unknown name {name!r}; choose one of {[*RESNETS, *VITS]}.")
    return Network(
        encoder,
        MLP(projector_hidden, projector_out, dtype),
        MLP(predictor_hidden, projector_out, dtype),
    )


def parameter_table(params: PyTree) -> str:
    """Text with a line per parameter (name, shape, dtype, count) and the total of each part."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows, totals = [], {}
    for path, leaf in leaves:
        names = [str(entry.key) for entry in path]
        rows.append(("/".join(names), str(tuple(leaf.shape)), str(leaf.dtype), f"{leaf.size:,}"))
        totals[names[0]] = totals.get(names[0], 0) + leaf.size
    rows += [(f"total {part}", "", "", f"{count:,}") for part, count in totals.items()]
    rows.append(("total", "", "", f"{sum(totals.values()):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    w, x, y, z = widths
    return "\n".join(f"{a:<{w}}  {b:<{x}}  {c:<{y}}  {d:>{z}}" for a, b, c, d in rows)
