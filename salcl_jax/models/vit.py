"""Vision transformer with fixed position embedding, returning token grids and attention."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

PATCH = 16
_REFERENCE_GRID = 14  # positions count in patches of a 224-pixel image


def position_embedding(h: int, w: int, d: int) -> np.ndarray:
    """Fixed 2-D sin-cos embedding [h*w, d] of a patch grid (MoCo v3, Chen et al. 2021), float32.

    Positions are stretched to a 14x14 grid, where they are the integers: the same place in the
    image has about the same embedding at every input size. Raises ValueError unless 4 divides d.
    """
    if d % 4:
        raise ValueError(f"position_embedding: width {d} is not a multiple of 4; change the width.")
    frequency = 1.0 / 10000 ** (np.arange(d // 4) / (d // 4))
    y = ((np.arange(h) + 0.5) * _REFERENCE_GRID / h - 0.5)[:, None] * frequency[None]
    x = ((np.arange(w) + 0.5) * _REFERENCE_GRID / w - 0.5)[:, None] * frequency[None]
    rows = np.concatenate([np.sin(y), np.cos(y)], axis=1)
    columns = np.concatenate([np.sin(x), np.cos(x)], axis=1)
    grid = np.concatenate(
        [np.repeat(rows[:, None], w, axis=1), np.repeat(columns[None], h, axis=0)], axis=2
    )
    return grid.reshape(h * w, d).astype(np.float32)


def _dense(width: int, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.xavier_uniform()
    return nn.Dense(width, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
    """Multi-head self-attention."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"]
    ) -> tuple[Float[Array, "n t d"], Float[Array, "n heads t"]]:
        """Attended tokens, and the weights of the first token on all tokens (float32, sum 1)."""
        n, t, d = x.shape
        qkv = _dense(3 * d, self.dtype, "qkv")(x).reshape(n, t, 3, self.heads, d // self.heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = (
            jnp.einsum("nqhc,nkhc->nhqk", query, key, preferred_element_type=jnp.float32)
            * (d // self.heads) ** -0.5
        )
        weights = nn.softmax(logits)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", weights.astype(self.dtype), value)
        return _dense(d, self.dtype, "out")(mixed.reshape(n, t, d)), weights[:, :, 0]


class Block(nn.Module):
    """Pre-norm transformer block with a 4x wide GELU layer."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"]
    ) -> tuple[Float[Array, "n t d"], Float[Array, "n heads t"]]:
        """New tokens, and the attention weights of the first token."""
        d = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        y, weights = Attention(self.heads, self.dtype, name="attention")(y)
        x = x + y
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = nn.gelu(_dense(4 * d, self.dtype, "dense1")(y), approximate=False)
        return x + _dense(d, self.dtype, "dense2")(y), weights


class ViT(nn.Module):
    """ViT (Dosovitskiy et al. 2021) on 16-pixel patches, any input size divisible by 16.

    `pool` is 'token' (the class token) or 'mean' (of the patch tokens). With `remat` the backward
    pass recomputes each block. Parameters are float32; there are no batch statistics.
    """

    width: int
    depth: int
    heads: int
    pool: str = "token"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n p q 3"], *, views: int, train: bool) -> dict[str, Array]:
        """Token grids 'stage1' .. 'stage4' [n, h, w, d] after each quarter of the depth.

        The last is taken after the final norm. Also 'attention' [n, heads, h, w], float32, of the
        class token in the last block and 'pooled' [n, d] float32. `views` and `train` change
        nothing here. Raises ValueError for a size, depth, width or pool that does not fit.
        """
        del views, train
        n, height, width, _ = x.shape
        self._check(height, width)
        h, w = height // PATCH, width // PATCH
        patches = x.reshape(n, h, PATCH, w, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
        tokens = _dense(self.width, self.dtype, "patch")(patches.reshape(n, h * w, -1))
        positions = jnp.asarray(position_embedding(h, w, self.width), tokens.dtype)[None]
        first = self.param("class_token", nn.initializers.normal(0.02), (1, 1, self.width))
        first = jnp.broadcast_to(first.astype(tokens.dtype), (n, 1, self.width))
        tokens = jnp.concatenate([first, tokens + positions], axis=1)

        block = nn.remat(Block) if self.remat else Block
        outputs = {}
        for i in range(1, self.depth + 1):
            tokens, weights = block(self.heads, self.dtype, name=f"block{i}")(tokens)
            if i == self.depth:
                tokens = nn.LayerNorm(dtype=self.dtype, name="norm")(tokens)
            if i % (self.depth // 4) == 0:
                stage = tokens[:, 1:].reshape(n, h, w, self.width)
                outputs[f"stage{4 * i // self.depth}"] = stage
        outputs["attention"] = weights[:, :, 1:].reshape(n, self.heads, h, w)
        final = tokens.astype(jnp.float32)
        outputs["pooled"] = final[:, 0] if self.pool == "token" else final[:, 1:].mean(1)
        return outputs

    def _check(self, height: int, width: int) -> None:
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"ViT: input of {height}x{width} pixels is not a multiple of {PATCH}; "
                "change the crop or saliency size."
            )
        if self.depth % 4 or self.width % self.heads:
            raise ValueError(
                f"ViT: depth {self.depth} must be a multiple of 4, and width {self.width} a "
                f"multiple of the {self.heads} heads."
            )
        if self.pool not in ("token", "mean"):
            raise ValueError(f"ViT: unknown pool {self.pool!r}; choose 'token' or 'mean'.")


VITS = {  # width, depth, heads
    "vit_ti16": (192, 12, 3),
    "vit_s16": (384, 12, 6),
    "vit_b16": (768, 12, 12),
}
