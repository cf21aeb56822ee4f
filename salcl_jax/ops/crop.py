"""Crops of canvases: drawing random boxes, and reading boxes as fixed-size images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from salcl_jax.ops import boxes as box_ops

# Sides below one canvas pixel grow to it: a zero side has a NaN gradient in scale_and_translate.
_MIN_SIDE_PIXELS = 1.0


def crop_and_resize(
    images: Float[Array, "b s s c"],
    boxes: Float[Array, "b n 4"],
    size: int,
    *,
    antialias: bool = True,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "b n {size} {size} c"]:
    """Bilinear crops of each image, differentiable in the boxes and in the images.

    Pixels have half-pixel centres (torch's align_corners=False), so that box [0, 0, 1, 1] with
    size = s is the identity. `antialias` widens the kernel where a box shrinks to its crop. Samples
    outside the canvas are 0: keep boxes inside with `clip_inside`. `precision` None means
    Precision.DEFAULT, as jax.image would otherwise take the slow HIGHEST.
    """
    side = images.shape[1]
    precision = jax.lax.Precision.DEFAULT if precision is None else precision
    center, lengths = box_ops.center_size(boxes)
    lengths = jnp.maximum(lengths, _MIN_SIDE_PIXELS / side)
    scale = size / (lengths * side)
    shift = -(center - 0.5 * lengths) * side * scale

    def one(image, scale, shift):
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, shift, "linear", antialias=antialias, precision=precision
        )

    over_boxes = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(over_boxes)(images, scale, shift)


def random_resized_crop_boxes(
    key: PRNGKeyArray,
    aspect: Float[Array, "b"],
    n: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Array, "b n 4"]:
    """n random boxes of each photo: uniform area, log-uniform aspect ratio, uniform position.

    `area` bounds the box's share of the photo, `ratio` its width / height in pixels of the photo,
    `aspect` is the photo's own width / height. Drawn once, sides then clamped to the photo, as in
    BYOL's code. Image i uses the i-th split of `key`, so draws do not depend on the device count.

    >>> boxes = random_resized_crop_boxes(jax.random.key(0), jnp.array([1.5]), 2, (0.25, 0.25), (1.0, 1.0))
    >>> y0, x0, y1, x1 = boxes[0, 0]
    >>> print(((y1 - y0) * (x1 - x0)).round(3), (1.5 * (x1 - x0) / (y1 - y0)).round(3))
    0.25 1.0
    """

    def draw(key, aspect):
        u = jax.random.uniform(key, (n, 4))
        share = area[0] + u[:, 0] * (area[1] - area[0])
        log_low, log_high = jnp.log(ratio[0]), jnp.log(ratio[1])
        pixel_ratio = jnp.exp(log_low + u[:, 1] * (log_high - log_low))
        # w h = share and (w * aspect) / h = pixel_ratio in units of the photo's sides.
        h = jnp.minimum(jnp.sqrt(share * aspect / pixel_ratio), 1.0)
        w = jnp.minimum(jnp.sqrt(share * pixel_ratio / aspect), 1.0)
        y0, x0 = u[:, 2] * (1.0 - h), u[:, 3] * (1.0 - w)
        return jnp.stack([y0, x0, jnp.minimum(y0 + h, 1.0), jnp.minimum(x0 + w, 1.0)], axis=-1)

    return jax.vmap(draw)(jax.random.split(key, aspect.shape[0]), aspect)


def center_boxes(aspect: Float[Array, "b"], share: float = 0.875) -> Float[Array, "b 4"]:
    """Central square of each photo, its side `share` of the photo's shorter side.

    aspect: width / height of the photos that fill the canvases. The default shows what resizing the
    shorter side to 256 pixels and cutting out the central 224 shows.

    >>> center_boxes(jnp.array([2.0]), share=1.0).tolist()
    [[0.0, 0.25, 1.0, 0.75]]
    """
    size = share * jnp.stack([jnp.minimum(aspect, 1.0), jnp.minimum(1.0 / aspect, 1.0)], axis=-1)
    return box_ops.from_center_size(jnp.full_like(size, 0.5), size)
