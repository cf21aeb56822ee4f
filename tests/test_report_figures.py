"""Plots of an evaluation, read back from matplotlib's objects."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from salcl_jax import report_figures

NAN = float("nan")
LONG = "resnet50, width 64, stem imagenet, and what else one may want to know"
CLASSES = [f"class number {i}" for i in range(20)]


def per_class(kind="voc_svm/ap", n=20):
    rng = np.random.default_rng(0)
    return {row: {f"{kind}/{name}": float(x) for name, x in zip(CLASSES[:n], rng.random(n), strict=True)}
            for row in ("trained", "untrained", "pixels")}  # fmt: skip


def low_shot():
    return {
        row: {f"voc_svm/{name}/{k}": scale * np.log2(2 * k) / 8 * factor
              for name, factor in (("low_shot", 1.0), ("low_shot_best_on_test", 1.1)) for k in (1, 16, 2, 96)}
        for row, scale in (("trained", 0.9), ("untrained", 0.5), ("pixels", 0.3))
    }  # fmt: skip


def regions(count=4):
    rows = {}
    for row, scale in (("trained", 0.8), ("untrained", 0.4)):
        rows[row] = {f"localization/{name}/r{r}": scale * r / count * part
                     for name, part in (("recall@0.5", 1.0), ("coverage", 0.7)) for r in range(1, count + 1)}
        for name, level in (("recall@0.5", 0.2), ("coverage", 0.3)):
            rows[row] |= {f"localization/chance/{name}_random/r{r}": level * r / count
                          for r in range(1, count + 1)}
            rows[row] |= {f"localization/chance/{name}_center": level / 2,
                          f"localization/chance/{name}_whole": level / 4}
    return rows


def bars(figure):
    """{row: {class: (width, label)}} from top to bottom."""
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    labels = iter(axes.texts)
    found = {}
    for container in axes.containers:
        order = sorted(range(len(names)), key=lambda i: axes.get_yticks()[i])
        pairs = [(bar.get_width(), next(labels).get_text()) for bar in container]
        middles = [bar.get_y() + bar.get_height() / 2 for bar in container]
        assert all(abs(middle - tick) < 0.5 for middle, tick in zip(middles, axes.get_yticks(), strict=True))
        found[container.get_label()] = {names[i]: pairs[i] for i in order}
    return found


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_bars_are_as_long_as_their_figures():
    rows = per_class()
    figure = report_figures.class_bars("voc_svm", rows, "resnet50")
    found = bars(figure)
    assert list(found) == ["trained", "untrained"]
    for row, classes in found.items():
        for name, (width, label) in classes.items():
            value = 100 * rows[row][f"voc_svm/ap/{name}"]
            assert width == pytest.approx(value) and float(label) == pytest.approx(value, abs=0.0501)
    (axes,) = figure.axes
    order = list(found["trained"])
    assert order == sorted(CLASSES, key=lambda name: -rows["trained"][f"voc_svm/ap/{name}"])
    assert axes.yaxis_inverted()  # the first, and best, on top
    assert axes.get_xlim()[0] == 0 and axes.get_xlabel() == "average precision, %"
    assert "Linear SVM" in figure.get_suptitle() and "resnet50" in figure.get_suptitle()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["trained", "untrained"]
    assert to_rgb(axes.containers[0][0].get_facecolor()) == to_rgb("#0072B2")


def test_bars_without_a_value_say_so():
    rows = {
        "trained": {"segmentation/iou/cat": NAN, "segmentation/iou/dog": 0.2, "segmentation/iou/cow": NAN},
        "untrained": {"segmentation/iou/cat": 0.1, "segmentation/iou/dog": NAN, "segmentation/iou/cow": NAN},
    }
    found = bars(report_figures.class_bars("segmentation", rows, "net"))
    assert found == {
        "trained": {"dog": (pytest.approx(20), "20.0"), "cat": (0, "-")},
        "untrained": {"dog": (0, "-"), "cat": (pytest.approx(10), "10.0")},
    }
    del rows["trained"]
    assert list(bars(report_figures.class_bars("segmentation", rows, "net"))) == ["untrained"]


def test_low_shot_lines_hold_the_figures():
    rows = low_shot()
    figure = report_figures.low_shot_curve("voc_svm", rows, "resnet50")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "16", "96"]
    drawn = [line for line in axes.lines if len(line.get_xdata())]
    assert len(drawn) == 6
    for i, row in enumerate(rows):
        for best in range(2):
            line = drawn[2 * i + best]
            name = ("low_shot", "low_shot_best_on_test")[best]
            assert list(line.get_xdata()) == [1, 2, 16, 96]
            expected = [100 * rows[row][f"voc_svm/{name}/{k}"] for k in (1, 2, 16, 96)]
            np.testing.assert_allclose(line.get_ydata(), expected)
            assert line.get_linestyle() == ("-", "--")[best]
        assert drawn[2 * i].get_color() == drawn[2 * i + 1].get_color()
    assert list(lines(axes)) == ["trained", "untrained", "pixels", "cost chosen on the test set"]
    assert len({line.get_color() for line in drawn}) == 3
    assert "resnet50" in figure.get_suptitle()
    plain = {row: {k: v for k, v in found.items() if "best" not in k} for row, found in rows.items()}
    axes = report_figures.low_shot_curve("voc_svm", plain, "net").axes[0]
    assert list(lines(axes)) == ["trained", "untrained", "pixels"]


def test_region_lines_hold_the_figures_and_chance():
    rows = regions()
    figure = report_figures.region_curves(rows, "resnet50")
    for axes, name in zip(figure.axes, ("recall@0.5", "coverage"), strict=True):
        found = lines(axes)
        labels = ["trained", "untrained", "random boxes", "one central box", "whole image"]
        assert list(found) == labels and axes.get_ylim()[0] == 0
        assert list(axes.get_xticks()) == [1, 2, 3, 4] and "%" in axes.get_ylabel()
        for row in rows:
            expected = [100 * rows[row][f"localization/{name}/r{r}"] for r in range(1, 5)]
            np.testing.assert_allclose(found[row].get_ydata(), expected)
        chance = {k: v for k, v in rows["trained"].items() if f"chance/{name}" in k}
        start = f"localization/chance/{name}"
        expected = [100 * chance[f"{start}_random/r{r}"] for r in range(1, 5)]
        np.testing.assert_allclose(found["random boxes"].get_ydata(), expected)
        for label, kind in (("one central box", "center"), ("whole image", "whole")):
            np.testing.assert_allclose(found[label].get_ydata(), [100 * chance[f"{start}_{kind}"]] * 2)
            assert found[label].get_xdata()[0] < 1 and found[label].get_xdata()[-1] > 4


def test_chance_of_a_single_region_is_a_line():
    for axes in report_figures.region_curves(regions(1), "net").axes:
        found = lines(axes)
        assert list(found["trained"].get_xdata()) == [1]
        for label in ("random boxes", "one central box", "whole image"):
            assert len(found[label].get_xdata()) == 2


def test_what_has_no_figures_has_no_plot():
    nothing = {"trained": {"voc_svm/map": 0.5, "voc_svm/ap/cat": NAN, "voc_svm/low_shot/2": NAN}}
    assert report_figures.class_bars("voc_svm", nothing, "net") is None
    assert report_figures.low_shot_curve("voc_svm", nothing, "net") is None
    assert report_figures.region_curves(nothing, "net") is None
    results = {"voc_svm": nothing, "knn": {"trained": {"knn/top1": 0.5}}}
    assert report_figures.figures(results, "net") == {}


def test_all_plots_of_an_evaluation():
    both = {row: per_class()[row] | low_shot()[row] for row in low_shot()}
    results = {"voc_svm": both, "multilabel": per_class("multilabel/ap"), "localization": regions()}
    found = report_figures.figures(results, "net")
    assert set(found) == {
        "voc_svm_classes", "voc_svm_low_shot", "multilabel_classes", "localization_regions"}  # fmt: skip


def shown_texts(figure):
    """Texts on the picture; matplotlib keeps labels of ticks beyond an axis, which it does not draw."""
    beyond = set()
    for axes in figure.axes:
        for ticks, labels, (low, high) in (
            (axes.get_xticks(), axes.get_xticklabels(), sorted(axes.get_xlim())),
            (axes.get_yticks(), axes.get_yticklabels(), sorted(axes.get_ylim())),
        ):
            beyond |= {label for tick, label in zip(ticks, labels, strict=True) if not low <= tick <= high}
    return [text for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and text not in beyond]  # fmt: skip


@pytest.mark.parametrize("make", [
    lambda: report_figures.class_bars("segmentation", per_class("segmentation/iou"), LONG),
    lambda: report_figures.class_bars("multilabel", per_class("multilabel/ap", 1), LONG),
    lambda: report_figures.low_shot_curve("voc_svm", low_shot(), LONG),
    lambda: report_figures.region_curves(regions(), LONG),
    lambda: report_figures.region_curves(regions(1), LONG),
    lambda: report_figures.run_curves([{"step": i, "train/loss": 9e3 / (i + 1), "train/spread": 1.0,
                                        "eval/pretext/loss": 9e3, "eval/pretext/spread": 0.0}
                                       for i in range(0, 123_456, 1000)], 123_456),
])  # fmt: skip
def test_nothing_is_cut_off_and_no_text_covers_another(make):
    figure = make()
    image = report_figures.pixels(figure)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    height, width = image.shape[:2]
    # The outermost pixels are paper: whatever is cut off would reach the edge.
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert np.all(edge == 255)
    boxes = [text.get_window_extent() for text in shown_texts(figure)]
    assert len(boxes) > 5
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for other in boxes[:i]:
            wide = min(box.x1, other.x1) - max(box.x0, other.x0)
            high = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(wide, high) <= 0.5


def test_run_curves_show_training_and_fixed_crops():
    steps = [{"step": 0, "eval/pretext/loss": 3.5, "eval/pretext/spread": 0.8},
             {"step": 10, "train/loss": 3.0, "train/spread": 0.7, "train/other": 9.0},
             {"step": 20, "train/loss": None, "train/spread": 0.6},
             {"step": 20, "eval/pretext/loss": 2.5, "eval/pretext/spread": 0.9}]  # fmt: skip
    figure = report_figures.run_curves(steps, 50)
    loss, spread = figure.axes
    for axes, train, fixed in ((loss, [3.0, NAN], [3.5, 2.5]), (spread, [0.7, 0.6], [0.8, 0.9])):
        found = lines(axes)
        assert list(found["training crops"].get_xdata()) == [10, 20]
        np.testing.assert_array_equal(found["training crops"].get_ydata(), train)
        assert list(found["fixed crops"].get_xdata()) == [0, 20]
        np.testing.assert_array_equal(found["fixed crops"].get_ydata(), fixed)
        assert axes.get_xlim() == (0, 50)
    assert spread.get_ylim()[0] == 0 and figure.get_suptitle() == "step 20 of 50"
    assert report_figures.run_curves(steps[:1]).get_suptitle() == "step 0"
    assert report_figures.pixels(figure).std() > 10
