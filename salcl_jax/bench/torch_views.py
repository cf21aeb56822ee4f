"""Crops and augmentation of a batch on the GPU in plain PyTorch, with the draws and formulas of BYOL.

Everything works on a whole batch of crops [n, 3, p, p] in [0, 1] with amounts [n], for the compiler to fuse.
Constants are numbers, as tensors would be copied to the GPU at every step. The formulas are those of
`ops/augment.py`; crops are bilinear without antialiasing, which is less work.
"""

import math

import torch
import torch.nn.functional as F

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # of the four
VIEWS = ({"blur": 1.0, "solarize": 0.0}, {"blur": 0.1, "solarize": 0.2})  # probabilities
FLIP, JITTER, GRAYSCALE = 0.5, 0.8, 0.2  # probabilities in both views
SIGMA = (0.1, 2.0)  # pixels at 224 px
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)


def make_view(canvas: torch.Tensor, aspect: torch.Tensor, view: int, size: int) -> torch.Tensor:
    """A normalised random crop of each canvas uint8 [n, 3, s, s] of a photo of that width / height."""
    n, device = canvas.shape[0], canvas.device
    u = torch.rand(14, n, device=device)
    boxes = random_boxes(u[:4], aspect)
    crops = crop(canvas.float() / 255, boxes, u[4] < FLIP, size)
    order = torch.rand(n, 4, device=device).argsort(1)
    crops = torch.where(_wide(u[5] < JITTER), color_jitter(crops, order, amounts(u[6:10])), crops)
    crops = torch.where(_wide(u[10] < GRAYSCALE), grey(crops).expand_as(crops), crops)
    sigma = (SIGMA[0] + u[11] * (SIGMA[1] - SIGMA[0])) * size / 224
    crops = torch.where(_wide(u[12] < VIEWS[view]["blur"]), blur(crops, sigma), crops)
    if VIEWS[view]["solarize"]:
        crops = torch.where(_wide(u[13] < VIEWS[view]["solarize"]) & (crops >= 0.5), 1 - crops, crops)
    channels = zip(crops.clamp(0, 1).unbind(1), MEAN, STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def random_boxes(u: torch.Tensor, aspect: torch.Tensor) -> torch.Tensor:
    """Boxes (y0, x0, y1, x1) [n, 4] on the unit square from uniform numbers [4, n]."""
    share = AREA[0] + u[0] * (AREA[1] - AREA[0])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + u[1] * (high - low))
    h = (share * aspect / ratio).sqrt().clamp(max=1)
    w = (share * ratio / aspect).sqrt().clamp(max=1)
    y, x = u[2] * (1 - h), u[3] * (1 - w)
    return torch.stack([y, x, y + h, x + w], 1)


def crop(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear crops [n, 3, size, size] of images in [0, 1], mirrored where `flip`."""
    y0, x0, y1, x1 = boxes.unbind(1)
    x0, x1 = torch.where(flip, x1, x0), torch.where(flip, x0, x1)
    at = (torch.arange(size, device=images.device) + 0.5) / size
    y = 2 * (y0[:, None] + at * (y1 - y0)[:, None]) - 1
    x = 2 * (x0[:, None] + at * (x1 - x0)[:, None]) - 1
    shape = (len(boxes), size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def amounts(u: torch.Tensor) -> torch.Tensor:
    """Factors of brightness, contrast, saturation, and the turn of the hue [n, 4], from uniform [4, n]."""
    centres = (1.0, 1.0, 1.0, 0.0)
    return torch.stack([c + (2 * v - 1) * s for v, c, s in zip(u, centres, STRENGTHS, strict=True)], 1)


def color_jitter(crops: torch.Tensor, order: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """The four operations in the order of each crop: order, amount [n, 4]."""
    for slot in range(4):
        what = order[:, slot]
        factor = _wide(amount.gather(1, what[:, None])[:, 0])
        lightness = grey(crops)
        mean = lightness.mean((1, 2, 3), keepdim=True)
        other = torch.where(_wide(what == CONTRAST), mean, torch.zeros_like(mean))
        other = torch.where(_wide(what == SATURATION), lightness, other)
        blended = (factor * crops + (1 - factor) * other).clamp(0, 1)
        crops = torch.where(_wide(what == HUE), turn_hue(crops, factor), blended)
    return crops


def turn_hue(crops: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the hue of HSV by `turn` [n, 1, 1, 1] of the circle; value and saturation stay."""
    r, g, b = crops.unbind(1)
    value, chroma = crops.amax(1), crops.amax(1) - crops.amin(1)
    scale = 1 / torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(value == g, (b - r) * scale + 2, (r - g) * scale + 4)
    hue = torch.where(value == r, (g - b) * scale, hue)
    sixth = torch.stack([5 + hue, 3 + hue, 1 + hue], 1)
    sixth = (sixth + 6 * turn).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(sixth, 4 - sixth).clamp(0, 1)


def grey(crops: torch.Tensor) -> torch.Tensor:
    """Lightness [n, 1, p, p]."""
    r, g, b = crops.split(1, 1)
    return GREY[0] * r + GREY[1] * g + GREY[2] * b


def blur(crops: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian of sigma [n] pixels cut at p // 20, as two products with banded matrices (tensor cores)."""
    p = crops.shape[-1]
    at = torch.arange(p, device=crops.device)
    distance = (at[:, None] - at).float()
    taps = torch.exp(-0.5 * (distance / sigma[:, None, None]).square())
    taps = torch.where(distance.abs() <= p // 20, taps, torch.zeros_like(taps))
    taps = (taps / taps.sum(2, keepdim=True))[:, None]
    return taps @ crops @ taps.transpose(2, 3)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
