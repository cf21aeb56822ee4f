"""ResNet v1.5 with three stems, returning the activations of every stage."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.models.norm import ViewBatchNorm

STAGE_NAMES = ("stage1", "stage2", "stage3", "stage4")
STEMS = ("imagenet", "stride16", "cifar")  # the stride of stage4: 32, 16, 8

_fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(width: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """Convolution without bias, padded (kernel - 1) // 2 on every side as torch does.

    XLA's SAME puts the odd pixel of a strided convolution on the far side: weights moved between
    the two frameworks would then see a shifted image.
    """
    pad = (kernel - 1) // 2
    return nn.Conv(
        width,
        (kernel, kernel),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        kernel_init=_fan_out_normal,
        name=name,
    )


class Stem(nn.Module):
    """First convolution (and pool): 'imagenet' stride 4, 'stride16' stride 2, 'cifar' stride 1."""

    width: int
    kind: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n p q 3"], views: int, train: bool
    ) -> tuple[Float[Array, "n i j d"], Float[Array, "n h w d"]]:
        """[n, p, p, 3] -> [n, p / stride, p / stride, width], rounded up, before and after the pool."""
        kernel, stride = {"imagenet": (7, 2), "stride16": (3, 2), "cifar": (3, 1)}[self.kind]
        x = conv(self.width, kernel, stride, self.dtype, "conv")(x)
        x = nn.relu(ViewBatchNorm(dtype=self.dtype, name="norm")(x, views, train))
        if self.kind == "imagenet":
            return x, nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pads with -inf
        return x, x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    width: int
    stride: int
    zero_init: bool
    dtype: Any = jnp.float32
    expansion = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], views: int, train: bool
    ) -> Float[Array, "n i j d"]:
        """[n, h, w, c] -> [n, h / stride, w / stride, width], rounded up."""
        last_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = conv(self.width, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(ViewBatchNorm(dtype=self.dtype, name="norm1")(y, views, train))
        y = conv(self.width, 3, 1, self.dtype, "conv2")(y)
        y = ViewBatchNorm(dtype=self.dtype, scale_init=last_init, name="norm2")(y, views, train)
        if x.shape != y.shape:
            x = conv(self.width, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = ViewBatchNorm(dtype=self.dtype, name="shortcut_norm")(x, views, train)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (with the stride: v1.5) and 1x1 convolutions and a shortcut (ResNet-50 and 101)."""

    width: int
    stride: int
    zero_init: bool
    dtype: Any = jnp.float32
    expansion = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], views: int, train: bool
    ) -> Float[Array, "n i j d"]:
        """[n, h, w, c] -> [n, h / stride, w / stride, 4 * width], rounded up."""
        out = self.expansion * self.width
        last_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = conv(self.width, 1, 1, self.dtype, "conv1")(x)
        y = nn.relu(ViewBatchNorm(dtype=self.dtype, name="norm1")(y, views, train))
        y = conv(self.width, 3, self.stride, self.dtype, "conv2")(y)
        y = nn.relu(ViewBatchNorm(dtype=self.dtype, name="norm2")(y, views, train))
        y = conv(out, 1, 1, self.dtype, "conv3")(y)
        y = ViewBatchNorm(dtype=self.dtype, scale_init=last_init, name="norm3")(y, views, train)
        if x.shape != y.shape:
            x = conv(out, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = ViewBatchNorm(dtype=self.dtype, name="shortcut_norm")(x, views, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet of He et al. 2016 without its classifier; stage k is 2^(k-1) times the base width.

    With `remat` the backward pass recomputes each block instead of keeping its activations.
    Parameters are float32 and named `stem`, `stage1_block1`, ...
    """

    blocks: tuple[int, ...]
    block: type[nn.Module]
    width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    remat: bool = False
    zero_init_residual: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "n p q 3"], *, views: int, train: bool) -> dict[str, Array]:
        """Activations {'conv1', 'stem', 'stage1', ..., 'stage4'} [n, h, w, d], 'pooled' [n, d] float32.

        'conv1' is the stem before its max pool.

        x: normalised images, [b, v] flattened. Raises ValueError for an unknown stem.
        """
        if self.stem not in STEMS:
            raise ValueError(f"ResNet: unknown stem {self.stem!r}; choose one of {STEMS}.")
        block = nn.remat(self.block, static_argnums=(2, 3)) if self.remat else self.block
        stem = Stem(self.width, self.stem, self.dtype, name="stem")
        first, x = stem(x.astype(self.dtype), views, train)
        outputs = {"conv1": first, "stem": x}
        for stage, (name, count) in enumerate(zip(STAGE_NAMES, self.blocks, strict=True)):
            for i in range(count):
                x = block(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    zero_init=self.zero_init_residual,
                    dtype=self.dtype,
                    name=f"{name}_block{i + 1}",
                )(x, views, train)
            outputs[name] = x
        outputs["pooled"] = x.astype(jnp.float32).mean((1, 2))
        return outputs


RESNETS = {
    "resnet18": ((2, 2, 2, 2), BasicBlock),
    "resnet34": ((3, 4, 6, 3), BasicBlock),
    "resnet50": ((3, 4, 6, 3), BottleneckBlock),
    "resnet101": ((3, 4, 23, 3), BottleneckBlock),
}
