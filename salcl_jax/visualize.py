"""Pictures of what the method sees: canvas, saliency, regions and crops. numpy and Pillow only."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from salcl_jax.types import Rois

Colour = tuple[int, int, int]

# Anchors of matplotlib's 'inferno' at equal distances, dark to bright: lightness grows evenly.
INFERNO = np.array(
    [(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
     (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)], np.float32,
)
# Told apart by most colour-blind eyes (Okabe and Ito), without black.
PALETTE = ((86, 180, 233), (230, 159, 0), (0, 190, 135), (240, 228, 66),
           (204, 121, 167), (213, 94, 0), (0, 114, 178), (190, 190, 190))
WHITE, INK, PAPER, SHADOW = (255, 255, 255), (40, 40, 40), (250, 250, 250), (0, 0, 0)
GAP, HEADER, TAG = 6, 24, 13


def colour_map(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of values in [0, 1]; values outside are clipped, NaN counts as 0."""
    values = np.clip(np.nan_to_num(values), 0.0, 1.0)
    places = np.linspace(0.0, 1.0, len(INFERNO))
    channels = [np.interp(values, places, INFERNO[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def heat(map: np.ndarray, image: np.ndarray, *, alpha: float = 0.65) -> np.ndarray:
    """A saliency map [h, w] in [0, 1] over its canvas uint8 [s, s, 3]: uint8 [s, s, 3].

    The map is enlarged bilinearly (cell centres keep their value) and not rescaled, so that
    pictures of different steps compare; `alpha` is its share, the rest is the canvas in grey.
    """
    side = image.shape[1::-1]
    large = Image.fromarray(np.nan_to_num(map).astype(np.float32)).resize(
        side, Image.Resampling.BILINEAR
    )
    colours = colour_map(np.asarray(large)).astype(np.float32)
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(alpha * colours + (1 - alpha) * grey[..., None]).astype(np.uint8)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    valid: np.ndarray,
    colours: Sequence[Colour],
    labels: Sequence[str] | None = None,
    *,
    width: int = 2,
) -> np.ndarray:
    """A copy of a canvas uint8 [s, s, 3] with the outlines of its valid boxes [r, 4].

    Lines lie just inside a box, with a dark hairline around; colours repeat when there are fewer
    than boxes. A label stands in the box's upper left corner, or above a box too low to hold it.
    The first box is drawn last, on top.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    shown = [i for i in range(len(boxes)) if valid[i]][::-1]
    for i in shown:
        _outline(draw, _pixels(boxes[i], picture.size), tuple(colours[i % len(colours)]), width)
    for i in shown if labels else ():
        left, top, _, bottom = _pixels(boxes[i], picture.size)
        top -= TAG if bottom - top < 2 * TAG and top >= TAG else 0
        _tag(draw, (left, top), labels[i], tuple(colours[i % len(colours)]), picture.size)
    return np.asarray(picture)


def panel(
    images: np.ndarray,
    maps: np.ndarray | None,
    rois: Rois | None,
    crops: np.ndarray,
    crop_boxes: np.ndarray,
    gt_boxes: np.ndarray | None = None,
    *,
    tile: int = 144,
) -> np.ndarray:
    """One row an image: canvas, saliency, regions, crop windows, and the crops as augmented.

    images uint8 [n, s, s, 3]; maps [n, h, w] in [0, 1]; rois [n, r, ...]; crops [n, v, p, p, 3] in
    [0, 1]; crop_boxes [n, v, 4] in canvas units; gt_boxes [n, k, 4], thin and white on the canvas.
    Without maps or rois their column is left out; invalid ROIs are not drawn. A view's window and
    its crop's frame share a colour. `tile`: side of a cell in pixels. Returns uint8 [H, W, 3].
    """
    titles = ["canvas" if gt_boxes is None else "canvas + truth"]
    titles += ["saliency"] * (maps is not None) + ["regions"] * (rois is not None)
    titles += ["windows"] + [f"view {i + 1}" for i in range(crops.shape[1])]
    rows = []
    for i, image in enumerate(images):
        canvas = _resize(image, tile)
        row = [canvas if gt_boxes is None else _truth(canvas, gt_boxes[i])]
        if maps is not None:
            row.append(_heat_tile(maps[i], canvas))
        if rois is not None:
            row.append(_region_tile(canvas, *(np.asarray(x)[i] for x in rois)))
        every = np.ones(len(crop_boxes[i]), bool)
        names = [str(view + 1) for view in range(len(every))]
        row.append(draw_boxes(canvas, crop_boxes[i], every, PALETTE, names))
        row += [_crop_tile(crop, tile, view) for view, crop in enumerate(crops[i])]
        rows.append(row)
    return _sheet(titles, rows, tile)


def columns(
    images: np.ndarray,
    maps: np.ndarray,
    rois: Rois,
    gt_boxes: np.ndarray,
    titles: Sequence[str],
    *,
    tile: int = 144,
) -> np.ndarray:
    """A column an image: its title, the canvas with ground truth, the heat map, the valid regions.

    images uint8 [n, s, s, 3], maps [n, h, w], rois of [n, r], gt_boxes [n, k, 4] (zero rows =
    padding), titles [n]. Drawn as in `panel`. Returns uint8 [H, W, 3].
    """
    pictures = []
    for i, image in enumerate(images):
        canvas = _resize(image, tile)
        regions = _region_tile(canvas, *(np.asarray(x)[i] for x in rois))
        pictures.append((_truth(canvas, gt_boxes[i]), _heat_tile(maps[i], canvas), regions))
    return _sheet(list(titles), [list(row) for row in zip(*pictures, strict=True)], tile)


def grid(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], *, tile: int = 144
) -> np.ndarray:
    """Pictures uint8 [h, w, 3] of any proportions, each under its caption, their longer sides `tile` pixels.

    A row is as high as its highest picture. Returns uint8 [H, W, 3].
    """
    fitted = [[fit(picture, tile) for picture in row] for row in rows]
    heights = [max(picture.shape[0] for picture in row) for row in fitted]
    size = max(map(len, rows)) * (tile + GAP) + GAP, sum(heights) + len(rows) * HEADER + GAP
    sheet = Image.new("RGB", size, PAPER)
    draw, top = ImageDraw.Draw(sheet), HEADER
    for row, texts, high in zip(fitted, captions, heights, strict=True):
        for column, (picture, text) in enumerate(zip(row, texts, strict=True)):
            left = GAP + column * (tile + GAP)
            draw.text((left + tile // 2, top - HEADER // 2), text, fill=INK, font=_font(12), anchor="mm")
            place = left + (tile - picture.shape[1]) // 2, top + (high - picture.shape[0]) // 2
            sheet.paste(Image.fromarray(picture), place)
        top += high + HEADER
    return np.asarray(sheet)


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write uint8 [H, W, 3] so that a reader never meets half a file; makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(array).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _truth(canvas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    real = np.all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    return draw_boxes(canvas, boxes, real, (WHITE,), width=1)


def _heat_tile(map: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(heat(map, canvas))
    text = f"{np.min(map) + 5e-4:.2f} to {np.max(map):.2f}"  # no "-0.00"
    corner = (0, picture.size[1])
    _tag(ImageDraw.Draw(picture), corner, text, (30, 30, 30), picture.size)
    return np.asarray(picture)


def _region_tile(canvas, boxes, valid, score) -> np.ndarray:
    labels = [f"{i + 1}: {value:.2f}" for i, value in enumerate(score)]
    return draw_boxes(canvas, boxes, valid, PALETTE, labels)


def _crop_tile(crop: np.ndarray, tile: int, view: int) -> np.ndarray:
    pixels = np.rint(np.clip(np.nan_to_num(crop), 0.0, 1.0) * 255).astype(np.uint8)
    framed = Image.fromarray(_resize(pixels, tile))
    edge = (0, 0, tile - 1, tile - 1)
    ImageDraw.Draw(framed).rectangle(edge, outline=PALETTE[view % len(PALETTE)], width=3)
    return np.asarray(framed)


def _sheet(titles: list[str], rows: list[list[np.ndarray]], tile: int) -> np.ndarray:
    pitch = tile + GAP
    size = (len(titles) * pitch + GAP, len(rows) * pitch + HEADER + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        place = (GAP + column * pitch + tile // 2, HEADER // 2 + 2)
        draw.text(place, title, fill=INK, font=_font(13), anchor="mm")
    for r, row in enumerate(rows):
        for column, picture in enumerate(row):
            place = (GAP + column * pitch, HEADER + r * pitch)
            sheet.paste(Image.fromarray(picture), place)
    return np.asarray(sheet)


def _pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: the first and the last pixels of a box, kept on the picture."""
    (y0, x0, y1, x1), (w, h) = np.clip(box, 0.0, 1.0), size
    left, top = min(round(float(x0) * w), w - 1), min(round(float(y0) * h), h - 1)
    right, bottom = round(float(x1) * w) - 1, round(float(y1) * h) - 1
    return left, top, max(left, right), max(top, bottom)


def _outline(draw, pixels, colour: Colour, width: int) -> None:
    left, top, right, bottom = pixels
    for grow, line, fill in ((1, width + 2, SHADOW), (0, width, colour)):
        edge = (left - grow, top - grow, right + grow, bottom + grow)
        draw.rectangle(edge, outline=fill, width=line)


def _tag(draw, corner, text: str, colour: Colour, size: tuple[int, int]) -> None:
    """Text on a filled label whose upper left corner is `corner`, moved to lie on the picture."""
    font = _font(11)
    x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
    w, h = x1 - x0 + 5, y1 - y0 + 5
    left, top = min(corner[0], size[0] - w), min(corner[1], size[1] - h)
    left, top = max(left, 0), max(top, 0)
    draw.rectangle((left, top, left + w - 1, top + h - 1), fill=colour)
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 128
    draw.text((left + 2 - x0, top + 2 - y0), text, fill=SHADOW if bright else WHITE, font=font)


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    # Small crops are enlarged bilinearly: blur there is what the network sees, blocks are not.
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """The picture in its own proportions, its longer side `side` pixels."""
    scale = side / max(image.shape[:2])
    size = tuple(max(1, round(scale * n)) for n in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _font(size: int):
    return ImageFont.load_default(size)
