"""Pictures, checked pixel by pixel where it matters."""

import os

import numpy as np
import pytest
from PIL import Image

from salcl_jax import visualize
from salcl_jax.types import Rois

RED, BLUE = (255, 0, 0), (0, 0, 255)


def canvas(side=64, value=100):
    return np.full((side, side, 3), value, np.uint8)


def where(image, colour):
    """Rows and columns of the pixels of exactly this colour."""
    return np.nonzero(np.all(image == np.array(colour, np.uint8), axis=-1))


def test_colour_map_runs_from_dark_to_bright():
    values = np.array([-1.0, 0.0, np.nan, 1.0, 2.0])
    colours = visualize.colour_map(values)
    assert [tuple(c) for c in colours] == [(0, 0, 4)] * 3 + [(252, 255, 164)] * 2
    luminance = visualize.colour_map(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert np.all(np.diff(luminance) > 0)


def test_heat_is_hottest_where_the_map_is_one():
    saliency = np.zeros((4, 4), np.float32)
    saliency[0, 3] = 1.0
    image = visualize.heat(saliency, canvas(), alpha=1.0)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    rows, columns = where(image, (252, 255, 164))
    # Cell (0, 3) is rows 0..15 and columns 48..63; beyond its centre the edge value continues.
    assert len(rows) > 0 and rows.max() < 9 and columns.min() > 54
    assert tuple(image[50, 10]) == (0, 0, 4)


def test_heat_enlarges_bilinearly():
    row = np.array([[0.0, 1.0]], np.float32)
    image = visualize.heat(row, canvas(8), alpha=1.0)
    # Cell centres at 0.25 and 0.75; pixel centres at 1/16, 3/16, ...: linear between, flat beyond.
    values = np.clip((np.arange(8) + 0.5) / 8 * 2 - 0.5, 0, 1)
    np.testing.assert_array_equal(image[0], visualize.colour_map(values))


def test_heat_blends_with_the_grey_canvas():
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200
    blended = visualize.heat(np.ones((2, 2), np.float32), image, alpha=0.75)
    grey = 0.299 * 200
    expected = 0.75 * np.array([252, 255, 164]) + 0.25 * grey
    np.testing.assert_allclose(blended[4, 4], expected, atol=0.51)


def test_heat_of_a_broken_map_is_dark():
    broken = np.full((2, 2), np.nan, np.float32)
    np.testing.assert_array_equal(
        visualize.heat(broken, canvas()), visualize.heat(np.zeros_like(broken), canvas())
    )


def test_boxes_are_drawn_where_they_are():
    boxes = np.array([(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.125, 0.25)], np.float32)
    before = canvas()
    image = visualize.draw_boxes(before, boxes, np.array([True, True]), (RED, BLUE))
    expected = np.zeros((64, 64), bool)
    expected[16:48, 32:64] = True
    expected[18:46, 34:62] = False
    np.testing.assert_array_equal(np.all(image == RED, axis=-1), expected)
    rows, columns = where(image, BLUE)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 7, 0, 15)
    assert tuple(image[32, 48]) == (100, 100, 100)
    assert np.all(before == 100)


def test_invalid_boxes_are_not_drawn():
    boxes = np.tile(np.array([0.2, 0.2, 0.8, 0.8], np.float32), (2, 1))
    image = visualize.draw_boxes(canvas(), boxes, np.array([False, False]), (RED, BLUE), ["a", "b"])
    np.testing.assert_array_equal(image, canvas())
    both = visualize.draw_boxes(canvas(), boxes, np.array([True, False]), (RED, BLUE))
    assert len(where(both, RED)[0]) and not len(where(both, BLUE)[0])


def test_the_first_box_lies_on_top():
    boxes = np.tile(np.array([0.2, 0.2, 0.8, 0.8], np.float32), (2, 1))
    image = visualize.draw_boxes(canvas(), boxes, np.ones(2, bool), (RED, BLUE))
    assert not len(where(image, BLUE)[0])


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 1, 1, 1), (-1, -1, 2, 2), (0.5, 0.5, 0.5, 0.9)])
def test_odd_boxes_stay_on_the_picture(box):
    boxes = np.array([box], np.float32)
    image = visualize.draw_boxes(canvas(), boxes, np.ones(1, bool), (RED,), ["9: 0.99"])
    assert image.shape == (64, 64, 3) and len(where(image, RED)[0])


def test_label_is_in_the_corner_of_its_box():
    boxes = np.array([(0.25, 0.25, 1.0, 1.0)], np.float32)
    image = visualize.draw_boxes(canvas(), boxes, np.ones(1, bool), (RED,), ["1"])
    plain = visualize.draw_boxes(canvas(), boxes, np.ones(1, bool), (RED,))
    rows, columns = np.nonzero(np.any(image != plain, axis=-1))
    assert 16 <= rows.min() and rows.max() < 32 and 16 <= columns.min() and columns.max() < 32
    assert image[16:32, 16:32, 2].max() > 150  # the digit, white on red


def test_label_of_a_low_box_stands_above_it():
    boxes = np.array([(0.5, 0.25, 0.65, 1.0)], np.float32)
    image = visualize.draw_boxes(canvas(), boxes, np.ones(1, bool), (RED,), ["1"])
    plain = visualize.draw_boxes(canvas(), boxes, np.ones(1, bool), (RED,))
    rows, _ = np.nonzero(np.any(image != plain, axis=-1))
    assert rows.max() < 32


def example(n=2, views=3, p=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    maps = rng.random((n, 5, 5), dtype=np.float32)
    boxes = np.tile(np.array([0.1, 0.1, 0.6, 0.6], np.float32), (n, 2, 1))
    rois = Rois(boxes, np.ones((n, 2), bool), rng.random((n, 2), dtype=np.float32))
    value = np.linspace(0, 1, views, dtype=np.float32).reshape(1, views, 1, 1, 1)
    crops = np.tile(value, (n, 1, p, p, 3))
    start = 0.05 * np.arange(views, dtype=np.float32)[None, :, None]
    crop_boxes = np.tile(start + np.array([0.2, 0.2, 0.6, 0.6], np.float32), (n, 1, 1))
    return images, maps, rois, crops, crop_boxes


@pytest.mark.parametrize(("n", "views", "tile"), [(1, 2, 128), (3, 6, 144)])
def test_panel_has_a_row_an_image_and_a_column_a_picture(n, views, tile):
    image = visualize.panel(*example(n, views), tile=tile)
    pitch = tile + visualize.GAP
    assert image.dtype == np.uint8
    assert image.shape == (visualize.HEADER + n * pitch + visualize.GAP,
                           (4 + views) * pitch + visualize.GAP, 3)


def tile_at(image, row, column, side=144):
    top = visualize.HEADER + row * (side + visualize.GAP)
    left = visualize.GAP + column * (side + visualize.GAP)
    return image[top : top + side, left : left + side]


def test_panel_shows_canvas_crops_and_frames():
    arguments = example()
    image = visualize.panel(*arguments)
    large = Image.fromarray(arguments[0][1]).resize((144, 144), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(tile_at(image, 1, 0), np.asarray(large))
    for view, value in enumerate((0, 128, 255)):
        crop = tile_at(image, 1, 4 + view)
        np.testing.assert_array_equal(crop[3:-3, 3:-3], value)
        np.testing.assert_array_equal(crop[0], np.tile(visualize.PALETTE[view], (144, 1)))
        assert len(where(tile_at(image, 1, 3), visualize.PALETTE[view])[0])
    assert np.any(image[: visualize.HEADER] < 100)  # titles


def test_panel_without_saliency_and_with_truth():
    images, _, _, crops, crop_boxes = example()
    truth = np.zeros((2, 4, 4), np.float32)
    truth[0, 1] = (0.25, 0.25, 0.75, 0.75)
    image = visualize.panel(images * 0, None, None, crops, crop_boxes, truth)
    assert image.shape[1] == 5 * 150 + visualize.GAP
    rows, columns = where(tile_at(image, 0, 0), visualize.WHITE)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 107, 36, 107)
    assert len(rows) == 4 * 71  # one pixel thin
    assert not tile_at(image, 1, 0).any()  # padding is not drawn


def test_columns_show_truth_heat_and_regions_of_each_image():
    images, maps, rois, _, _ = example()
    truth = np.zeros((2, 3, 4), np.float32)
    truth[1, 0] = (0.25, 0.25, 0.75, 0.75)
    rois = rois._replace(valid=np.array([[False, True], [False, False]]))
    image = visualize.columns(images, maps, rois, truth, ["a", "b"])
    pitch = 144 + visualize.GAP
    assert image.shape == (visualize.HEADER + 3 * pitch + visualize.GAP, 2 * pitch + visualize.GAP, 3)
    for column in range(2):
        large = np.asarray(Image.fromarray(images[column]).resize((144, 144), Image.Resampling.BILINEAR))
        boxed = visualize.draw_boxes(
            large, truth[column], np.array([column == 1, False, False]), ((255, 255, 255),), width=1
        )
        np.testing.assert_array_equal(tile_at(image, 0, column), boxed)
        heat = visualize.heat(maps[column], large)
        np.testing.assert_array_equal(tile_at(image, 1, column)[:120], heat[:120])  # the rest is a label
        assert bool(len(where(tile_at(image, 2, column), visualize.PALETTE[1])[0])) == (column == 0)
        assert not len(where(tile_at(image, 2, column), visualize.PALETTE[0])[0])


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "panels" / "step.png"
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    visualize.save_png(path, image)
    visualize.save_png(path, image[::-1])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image[::-1])
    assert os.listdir(path.parent) == ["step.png"]

    def half(self, file, format):
        open(file, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        visualize.save_png(path, image)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image[::-1])
    assert os.listdir(path.parent) == ["step.png"]


def test_a_grid_keeps_proportions_and_centres_pictures():
    wide, high = np.zeros((20, 40, 3), np.uint8), np.zeros((60, 30, 3), np.uint8)
    wide[:], high[:] = RED, BLUE
    sheet = visualize.grid([[wide, high], [wide]], [["a", "b"], ["c"]], tile=80)
    gap, header = visualize.GAP, visualize.HEADER
    assert sheet.shape == (2 * header + 80 + 40 + gap, 2 * (80 + gap) + gap, 3)
    rows, columns = where(sheet, BLUE)  # 80 x 40 in the second cell, below its caption
    assert (rows.min(), rows.max()) == (header, header + 79)
    assert (columns.min(), columns.max()) == (2 * gap + 80 + 20, 2 * gap + 80 + 59)
    rows, columns = where(sheet, RED)  # 40 x 80, in the middle of its row's height, and a row of its own
    assert sorted(set(rows)) == [*range(header + 20, header + 60), *range(2 * header + 80, 2 * header + 120)]
    assert (columns.min(), columns.max()) == (gap, gap + 79)
    dark = np.argwhere(sheet[:header].max(-1) < 120)[:, 1]
    assert dark.size and dark.min() > gap and dark.max() < 2 * (80 + gap)
