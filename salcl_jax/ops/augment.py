"""Photometric augmentation on the device: torchvision's jitter, BYOL's blur and solarisation.

Every operation runs on every crop and a mask keeps or drops its result: under vmap a lax.cond would
run both sides as well. The elementary functions take one crop [p, p, 3] in [0, 1] and return one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Principal components of ImageNet's pixels in [0, 1]: a column of (r, g, b) each, and their deviations.
_COLOURS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_COLOUR_SPREAD = (0.2175, 0.0188, 0.0045)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

Scalar = Float[Array, ""] | float


class AugmentSpec(NamedTuple):
    """Strengths of one view. Probabilities in [0, 1]; the defaults change nothing.

    brightness, contrast, saturation s: factor from U(max(0, 1 - s), 1 + s); hue s in [0, 0.5]:
    turn from U(-s, s); blur_sigma: bounds of the standard deviation, in crop pixels.
    """

    flip: float = 0.0
    jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5


class Decisions(NamedTuple):
    """What happens to one crop: amounts[i] belongs to operation i, order is a permutation."""

    flip: Bool[Array, ""]
    jitter: Bool[Array, ""]
    order: Int[Array, "4"]
    amounts: Float[Array, "4"]
    grayscale: Bool[Array, ""]
    blur: Bool[Array, ""]
    sigma: Float[Array, ""]
    solarize: Bool[Array, ""]
    threshold: Float[Array, ""]


def augment(
    key: PRNGKeyArray, crops: Float[Array, "b v p p 3"], specs: tuple[AugmentSpec, ...]
) -> Float[Array, "b v p p 3"]:
    """Augment view j of every image by specs[j]; float32 in [0, 1] in and out.

    Flip, jitter (four operations in uniformly random order), grayscale, blur, solarize, as in BYOL.
    Image i uses the i-th split of `key`, so draws do not depend on the device count. Raises
    ValueError unless there is a spec for each view.
    """
    b, v = crops.shape[:2]
    if len(specs) != v:
        raise ValueError(
            f"augment: {len(specs)} specs for {v} views; give one AugmentSpec per view"
        )
    stacked = jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *specs)
    jitters = any(spec.jitter_prob > 0 for spec in specs)
    blurs = any(spec.blur_prob > 0 for spec in specs)

    def one(key, crop, spec):
        return apply(crop, decide(key, spec), jitters=jitters, blurs=blurs)

    keys = jax.vmap(lambda key: jax.random.split(key, v))(jax.random.split(key, b))
    over_views = jax.vmap(one)
    return jax.vmap(over_views, in_axes=(0, 0, None))(keys, crops.astype(jnp.float32), stacked)


def decide(key: PRNGKeyArray, spec: AugmentSpec) -> Decisions:
    """Draw what happens to one crop; the fields of spec may be scalars or arrays of shape []."""
    keys = jax.random.split(key, 3)
    u = jax.random.uniform(keys[0], (5,))
    strengths = jnp.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    low = jnp.maximum(0.0, 1.0 - strengths).at[HUE].set(-strengths[HUE])
    high = (1.0 + strengths).at[HUE].set(strengths[HUE])
    v = jax.random.uniform(keys[1], (5,))
    sigma_low, sigma_high = spec.blur_sigma
    return Decisions(
        flip=u[0] < spec.flip,
        jitter=u[1] < spec.jitter_prob,
        order=jax.random.permutation(keys[2], 4),
        amounts=low + v[:4] * (high - low),
        grayscale=u[2] < spec.grayscale_prob,
        blur=u[3] < spec.blur_prob,
        sigma=sigma_low + v[4] * (sigma_high - sigma_low),
        solarize=u[4] < spec.solarize_prob,
        threshold=jnp.asarray(spec.solarize_threshold, jnp.float32),
    )


def apply(
    crop: Float[Array, "p p 3"], decisions: Decisions, *, jitters: bool = True, blurs: bool = True
) -> Float[Array, "p p 3"]:
    """Do to one crop what was decided; `jitters` or `blurs` False leaves that work out of it."""
    d = decisions
    crop = jnp.where(d.flip, jnp.flip(crop, axis=1), crop)
    if jitters:
        crop = jnp.where(d.jitter, _color_jitter(crop, d.order, d.amounts), crop)
    crop = jnp.where(d.grayscale, to_grayscale(crop), crop)
    if blurs:
        crop = jnp.where(d.blur, gaussian_blur(crop, d.sigma), crop)
    crop = jnp.where(d.solarize, solarize(crop, d.threshold), crop)
    return jnp.clip(crop, 0.0, 1.0)


def adjust_brightness(crop: Float[Array, "p p 3"], factor: Scalar) -> Float[Array, "p p 3"]:
    """Multiply by factor and clip, as torchvision does (BYOL's own code adds instead)."""
    return jnp.clip(crop * factor, 0.0, 1.0)


def adjust_contrast(crop: Float[Array, "p p 3"], factor: Scalar) -> Float[Array, "p p 3"]:
    """Blend with the crop's mean grey and clip; factor 1 is the identity, 0 a flat crop."""
    return _blend(crop, jnp.mean(_grey(crop)), factor)


def adjust_saturation(crop: Float[Array, "p p 3"], factor: Scalar) -> Float[Array, "p p 3"]:
    """Blend with each pixel's grey and clip; factor 1 is the identity, 0 a grey crop."""
    return _blend(crop, _grey(crop), factor)


def adjust_hue(crop: Float[Array, "p p 3"], turn: Scalar) -> Float[Array, "p p 3"]:
    """Turn the hue of HSV by `turn` of the colour circle; value and saturation stay."""
    r, g, b = jnp.split(crop, 3, axis=-1)
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    scale = 1.0 / jnp.where(chroma > 0.0, chroma, 1.0)
    hue = jnp.where(
        value == r,
        (g - b) * scale,
        jnp.where(value == g, (b - r) * scale + 2.0, (r - g) * scale + 4.0),
    )
    # Back to RGB without the six sectors: a channel loses up to `chroma`, by its distance on the
    # circle from its own sixths. One broadcast over channels is several times faster on CPUs than
    # three expressions concatenated.
    sixth = jnp.array([5.0, 3.0, 1.0], crop.dtype).reshape(1, 1, 3) + hue + 6.0 * turn
    sixth = sixth - 6.0 * jnp.floor(sixth / 6.0)
    return value - chroma * jnp.clip(jnp.minimum(sixth, 4.0 - sixth), 0.0, 1.0)


def to_grayscale(crop: Float[Array, "p p 3"]) -> Float[Array, "p p 3"]:
    """Replace all channels by 0.2989 R + 0.587 G + 0.114 B."""
    return jnp.broadcast_to(_grey(crop), crop.shape)


def gaussian_blur(crop: Float[Array, "p p 3"], sigma: Scalar) -> Float[Array, "p p 3"]:
    """Gaussian of `sigma` > 0 crop pixels, cut at radius p // 20 as in BYOL (23 taps at p = 224).

    Near a border the taps inside the crop are scaled to sum to 1, so a flat crop stays flat. Two
    banded matrix products at the default precision. A crop of p < 20 has radius 0 and is unchanged.
    """
    p = crop.shape[0]
    position = jnp.arange(p, dtype=crop.dtype)
    distance = position[:, None] - position[None, :]
    taps = jnp.where(
        jnp.abs(distance) <= p // 20, jnp.exp(-0.5 * jnp.square(distance / sigma)), 0.0
    )
    taps = taps / jnp.sum(taps, axis=1, keepdims=True)
    return jnp.einsum("iy,yxc,jx->ijc", taps, crop, taps)


def solarize(crop: Float[Array, "p p 3"], threshold: Scalar) -> Float[Array, "p p 3"]:
    """Invert the values at or above the threshold."""
    return jnp.where(crop < threshold, crop, 1.0 - crop)


def lighting(
    key: PRNGKeyArray, crops: Float[Array, "b v p p 3"], strength: float
) -> Float[Array, "b v p p 3"]:
    """Adds to each crop a random mixture of the principal colours of ImageNet (Krizhevsky et al. 2012).

    strength: standard deviation of the mixture, in deviations of those colours.
    """
    share = strength * jax.random.normal(key, (*crops.shape[:2], 3))
    shift = jnp.einsum("bvc,c,rc->bvr", share, jnp.array(_COLOUR_SPREAD), jnp.array(_COLOURS))
    return crops + shift[:, :, None, None, :]


def normalize(
    images: Float[Array, "*n 3"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Array, "*n 3"]:
    """Subtract the mean of each channel and divide by its standard deviation."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean, std = (jnp.array(values, images.dtype).reshape(shape) for values in (mean, std))
    return (images - mean) / std


def _color_jitter(crop, order, amounts):
    """The four operations in the given order, in four slots that each can do any of them.

    Brightness, contrast and saturation are one blend with different partners, so a slot costs a
    blend and a hue. A scan, not a Python loop: unrolled, XLA recomputes the earlier slots inside
    the later ones, four times slower on a CPU.
    """

    def slot(crop, operation):
        amount = amounts[operation]
        grey = _grey(crop)
        flat = jnp.where(operation == CONTRAST, jnp.mean(grey), 0.0)
        blended = _blend(crop, jnp.where(operation == SATURATION, grey, flat), amount)
        return jnp.where(operation == HUE, adjust_hue(crop, amount), blended), None

    return jax.lax.scan(slot, crop, order)[0]


def _blend(crop, other, factor):
    return jnp.clip(factor * crop + (1.0 - factor) * other, 0.0, 1.0)


def _grey(crop):
    r, g, b = jnp.split(crop, 3, axis=-1)
    return 0.2989 * r + 0.587 * g + 0.114 * b
