"""The report of an evaluation: every number is where it belongs, and nothing is lost or mixed up."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from salcl_jax import report, visualize
from salcl_jax.evaluators import TASKS
from salcl_jax.types import Rois

NAN = float("nan")
META = {
    "checkpoint": "runs/one", "step": 400, "branch": "online", "network": "resnet18", "size": 64, "seed": 3,
    "weights": "3c",
    "versions": {"jax": "0.10.2", "numpy": "2.0"}, "command": "python -m salcl_jax.evaluate --task=knn",
    "seconds": 12.6, "date": "2026-01-02",
}  # fmt: skip
ABOUT = {"knn": {"protocol": "weighted k-NN", "test": "50 of photos"}}


def results(seed=0):
    """Figures of which no two are printed alike."""
    values = iter(np.random.default_rng(seed).permutation(999) / 1000 + 5e-4)
    names = {
        "knn": ("top1", "top1_k200", "top1_k20"),
        "linear": ("top1", "top5", "top1/stage3", "fold_1pct/top1"),
        "semi": ("top1", "top5_best_on_test"),
        "voc_svm": ("map", "map_11_point", "stage3/map", "low_shot/16", "low_shot/2",
                    "low_shot_best_on_test/2", "ap/cat", "ap/dog"),
        "multilabel": ("map", "map_chance"),
        "localization": ("pointing", "corloc", "mask_ap", "inside_ratio", "recall@0.5", "recall@0.5/r1",
                         "chance/corloc_random", "chance/corloc_center", "chance/corloc_whole",
                         "chance/pointing_random", "chance/mask_ap_center"),
        "crops": ("shared", "touched", "share", "chance/share_random", "chance/share_boxes"),
        "segmentation": ("miou", "accuracy", "iou/cat"),
    }  # fmt: skip
    rows = {task: ("trained", "untrained", "pixels") for task in names} | {
        "localization": ("trained", "untrained"), "crops": ("trained", "untrained"),
        "semi": ("trained",)}  # fmt: skip
    return {
        task: {row: {f"{task}/{name}": float(next(values)) for name in names[task]} for row in rows[task]}
        for task in names
    }


def text_cells(text):
    """{task: {caption: {column: cell}}} of the terminal's tables."""
    tables = {}
    for block in text.strip().split("\n\n"):
        title, head, *lines = block.split("\n")
        columns = re.split(r"\s{2,}", head)[1:]
        split = [re.split(r"\s{2,}", line) for line in lines]
        task = re.search(r"\((\w+)\)$", title)[1]
        tables[task] = {cells[0]: dict(zip(columns, cells[1:], strict=True)) for cells in split}
    return tables


def markdown_cells(text):
    """[{caption: {column: cell}}] of a document's tables, in order."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        head, dashes, *lines = rows
        assert dashes == ["---"] + ["---:"] * (len(head) - 1)
        tables.append({cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in lines})
    return tables


LOCATED = {  # caption of a line, its figure and scale
    "knn": {"top-1 accuracy, %": ("top1", 100), "top-1 accuracy, k = 20, %": ("top1_k20", 100),
            "top-1 accuracy, k = 200, %": ("top1_k200", 100)},
    "linear": {"top-1 accuracy, %": ("top1", 100), "top-5 accuracy, %": ("top5", 100),
               "top-1 accuracy, stage3, %": ("top1/stage3", 100),
               "top-1 accuracy, fold_1pct, %": ("fold_1pct/top1", 100)},
    "semi": {"top-1 accuracy, %": ("top1", 100),
             "top-5, rates chosen on test, %": ("top5_best_on_test", 100)},
    "voc_svm": {"mean average precision, %": ("map", 100),
                "mean average precision, 11-point, %": ("map_11_point", 100),
                "mean average precision, stage3, %": ("stage3/map", 100),
                "positives per class: 2, %": ("low_shot/2", 100),
                "positives per class: 16, %": ("low_shot/16", 100),
                "cost chosen on test, positives: 2, %": ("low_shot_best_on_test/2", 100)},
    "multilabel": {"mean average precision, %": ("map", 100)},
    "localization": {"pointing game, %": ("pointing", 100), "CorLoc, %": ("corloc", 100),
                     "objects found, IoU >= 0.5, %": ("recall@0.5", 100),
                     "average precision, masks, %": ("mask_ap", 100),
                     "saliency inside / outside": ("inside_ratio", 1)},
    "crops": {"pairs that share half of an object, %": ("shared", 100),
              "pairs that share a tenth of an object, %": ("touched", 100),
              "what one object takes of both crops, %": ("share", 100)},
    "segmentation": {"mean IoU, %": ("miou", 100), "pixel accuracy, %": ("accuracy", 100)},
}  # fmt: skip


def check_cells(task, table, rows):
    assert list(table) == list(LOCATED[task])  # the order, and nothing else
    for caption, (figure, scale) in LOCATED[task].items():
        for row in ("trained", "untrained", "pixels"):
            assert (row in table[caption]) == (row in rows)
            if row in rows:
                cell = table[caption][row]
                assert float(cell) == pytest.approx(scale * rows[row][f"{task}/{figure}"], abs=0.0501), cell
                assert len(cell.partition(".")[2]) == (1 if scale == 100 else 2)


def test_every_task_has_a_title_and_headlines():
    assert set(report.TITLES) == set(TASKS)
    for task in TASKS:
        assert all(name.startswith(f"{task}/") and kind in ("share", "ratio")
                   for name, _, kind in report.headline(task))  # fmt: skip
        assert report.headline(task)
    assert report.headline("other") == ()


def test_numbers_of_the_terminal_are_those_given():
    given = results()
    tables = text_cells(report.text_table(given))
    assert list(tables) == list(TASKS)
    for task, table in tables.items():
        check_cells(task, table, given[task])


def test_columns_of_the_terminal_are_aligned():
    for block in report.text_table(results()).strip().split("\n\n"):
        lines = block.split("\n")[1:]
        ends = [[m.end() for m in re.finditer(r"\S+(?: \S+)*(?=\s{2}|$)", line)][1:] for line in lines]
        assert all(end == ends[0] for end in ends)


def test_numbers_of_the_document_are_those_given():
    given = results()
    text = report.markdown(given, ABOUT, META)
    tables = markdown_cells(text)
    order = re.findall(r"^## (.*)$", text, re.M)
    assert order == [report.TITLES[task] for task in report.TITLES]
    for task, table in zip(report.TITLES, tables, strict=True):
        check_cells(task, table, given[task])


def test_chance_stands_beside_what_it_belongs_to():
    given = results()
    figures = given["localization"]["trained"]
    table = text_cells(report.text_table(given))["localization"]
    for caption, column, name in (
        ("CorLoc, %", "random", "corloc_random"), ("CorLoc, %", "centre", "corloc_center"),
        ("CorLoc, %", "whole image", "corloc_whole"), ("pointing game, %", "random", "pointing_random"),
        ("average precision, masks, %", "centre", "mask_ap_center"),
    ):  # fmt: skip
        expected = 100 * figures[f"localization/chance/{name}"]
        assert float(table[caption][column]) == pytest.approx(expected, abs=0.0501)
    assert table["pointing game, %"]["whole image"] == table["saliency inside / outside"]["random"] == "-"
    multi = text_cells(report.text_table(given))["multilabel"]["mean average precision, %"]
    expected = 100 * given["multilabel"]["trained"]["multilabel/map_chance"]
    assert float(multi["random"]) == pytest.approx(expected, abs=0.0501)
    assert set(multi) == {"trained", "untrained", "pixels", "random"}
    linear = text_cells(report.text_table(given))["linear"]["top-1 accuracy, %"]
    assert set(linear) == {"trained", "untrained", "pixels"}


def test_what_is_not_known_is_a_dash():
    given = {
        "linear": {
            "trained": {"linear/top1": NAN, "linear/top5": 0.5},
            "pixels": {"linear/top1": 0.25, "linear/top5": float("inf")},
        },
        "knn": {"trained": {"knn/top1": 1.0}, "untrained": {}},
    }
    tables = text_cells(report.text_table(given))
    assert tables["linear"]["top-1 accuracy, %"] == {"trained": "-", "pixels": "25.0"}
    assert tables["linear"]["top-5 accuracy, %"] == {"trained": "50.0", "pixels": "-"}
    assert tables["knn"]["top-1 accuracy, %"] == {"trained": "100.0", "untrained": "-"}


def test_a_task_without_headlines_shows_everything():
    tables = text_cells(report.text_table({"speed": {"trained": {"speed/images": 12.25, "speed/rows": 3.0}}}))
    assert tables == {"speed": {"speed/images": {"trained": "12.25"}, "speed/rows": {"trained": "3.00"}}}


def test_document_names_protocol_command_and_pictures():
    text = report.markdown(results(), ABOUT, META, ["plots/a.png"])
    assert text.startswith("# Evaluation of resnet18 at step 400\n")
    assert f"\n```\n{META['command']}\n```\n" in text
    section = text[text.index("## Nearest") : text.index("## Fine-tuning")]
    assert "\nprotocol: weighted k-NN; test: 50 of photos\n" in section
    assert "- versions: jax 0.10.2, numpy 2.0\n" in text and "- seconds: 13\n" in text
    assert text.endswith("`plots/a.png`\n\n![a](plots/a.png)\n")
    odd = report.markdown({"voc_svm": {"trained": {"voc_svm/a|b/map": 0.5}}}, {}, {})
    assert r"| mean average precision, a\|b, % | 50.0 |" in odd


def strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def write(folder, given, meta=META, about=ABOUT, galleries=None):
    return report.write(folder, given, about, meta, galleries or {})


def test_json_is_strict_and_complete(tmp_path):
    given = results()
    given["linear"]["trained"] |= {"linear/top5": NAN, "linear/rate": float("inf")}
    meta = META | {"step": np.int64(400), "seconds": np.float32(1.5), "folder": tmp_path, "size": (64, 64)}
    write(tmp_path / "new" / "eval", given, meta)
    found = strict(tmp_path / "new" / "eval" / "eval.json")
    assert set(found) == {"meta", "about", "results"}
    for task, rows in given.items():
        for row, figures in rows.items():
            expected = {k: v if np.isfinite(v) else None for k, v in figures.items()}
            assert found["results"][task][row] == expected
    assert found["meta"]["step"] == 400 and found["meta"]["seconds"] == 1.5
    assert found["meta"]["size"] == [64, 64] and found["meta"]["folder"] == str(tmp_path)
    assert found["about"]["knn"] == ABOUT["knn"] | {"command": META["command"], "date": META["date"]}


def test_tasks_evaluated_before_stay(tmp_path):
    first, second = results(1), results(2)
    first["linear"]["trained"]["linear/top5"] = NAN
    write(tmp_path, {task: first[task] for task in ("linear", "knn")})
    later = META | {"command": "python -m salcl_jax.evaluate --task=voc_svm", "date": "2026-03-04"}
    about = {"voc_svm": {"protocol": "SVMs"}, "knn": {"protocol": "other k"}}
    write(tmp_path, {task: second[task] for task in ("voc_svm", "knn")}, later, about)
    found = strict(tmp_path / "eval.json")
    assert list(found["results"]) == ["linear", "knn", "voc_svm"]
    assert found["results"]["knn"] == second["knn"] and found["results"]["voc_svm"] == second["voc_svm"]
    assert found["results"]["linear"]["trained"]["linear/top5"] is None
    assert found["results"]["linear"]["untrained"] == first["linear"]["untrained"]
    assert found["meta"] == later and found["about"]["knn"]["protocol"] == "other k"
    text = (tmp_path / "eval.md").read_text()
    table = markdown_cells(text)[0]
    assert table["top-5 accuracy, %"]["trained"] == "-"
    # A task of an earlier call says so.
    section = text[text.index("## Linear probe") : text.index("## Nearest")]
    assert f"command: {META['command']}; date: {META['date']}" in section
    assert text.count("date:") == 2


def test_figures_that_are_null_are_undefined_again(tmp_path):
    given = results()
    given["voc_svm"]["trained"] |= {"voc_svm/ap/cat": NAN, "voc_svm/low_shot/2": NAN}
    write(tmp_path, {"voc_svm": given["voc_svm"]})
    before = np.asarray(Image.open(tmp_path / "plots" / "voc_svm_classes.png"))
    os.remove(tmp_path / "plots" / "voc_svm_classes.png")
    write(tmp_path, {"knn": given["knn"]})
    assert strict(tmp_path / "eval.json")["results"]["voc_svm"]["trained"]["voc_svm/ap/cat"] is None
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "plots" / "voc_svm_classes.png")), before)


@pytest.mark.parametrize("other", [
    {"step": 401}, {"checkpoint": "runs/two"}, {"branch": "target"}, {"size": 96}, {"seed": 4},
    {"weights": "0f"},
])  # fmt: skip
def test_another_checkpoint_replaces_the_report(tmp_path, other):
    given = results()
    picture = np.zeros((4, 4, 3), np.uint8)
    write(tmp_path, {"voc_svm": given["voc_svm"]}, galleries={"localization": picture})
    assert sorted(os.listdir(tmp_path / "plots")) == [
        "localization.png", "voc_svm_classes.png", "voc_svm_low_shot.png"]  # fmt: skip
    files = write(tmp_path, {"knn": given["knn"]}, META | other)
    found = strict(tmp_path / "eval.json")
    assert found["results"] == {"knn": given["knn"]} and set(found["about"]) == {"knn"}
    assert os.listdir(tmp_path / "plots") == []
    assert files == [str(tmp_path / "eval.json"), str(tmp_path / "eval.md")]


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"meta": {}}', '{"meta": 1, "about": {}, "results": {}}'])
def test_a_report_that_cannot_be_read_is_replaced(tmp_path, broken):
    (tmp_path / "eval.json").write_text(broken)
    write(tmp_path, {"knn": results()["knn"]})
    assert strict(tmp_path / "eval.json")["results"] == {"knn": results()["knn"]}


def test_pictures_are_written_and_shown(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    given = results()
    given["localization"]["trained"]["localization/coverage/r1"] = 0.5
    files = write(tmp_path, given, galleries={"localization": picture})
    names = ["localization", "localization_regions", "segmentation_classes", "voc_svm_classes",
             "voc_svm_low_shot"]  # fmt: skip
    assert files[2:] == [str(tmp_path / "plots" / f"{name}.png") for name in names]
    np.testing.assert_array_equal(np.asarray(Image.open(files[2])), picture)
    text = (tmp_path / "eval.md").read_text()
    for name in names:
        assert f"`plots/{name}.png`\n\n![{name}](plots/{name}.png)\n" in text
    for file in files[3:]:
        image = np.asarray(Image.open(file))
        assert np.any(np.all(image == (0x00, 0x72, 0xB2), axis=-1))  # the colour of 'trained'
    assert sorted(os.listdir(tmp_path)) == ["eval.json", "eval.md", "plots"]  # no temporary file


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path, {"knn": results()["knn"]})
    before = (tmp_path / "eval.json").read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, {"linear": results()["linear"]})
    assert (tmp_path / "eval.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["eval.json", "eval.md", "plots"]


def test_a_bucket_is_refused():
    with pytest.raises(ValueError, match="gs://bucket/eval is not a local folder"):
        write("gs://bucket/eval", results())
    assert not os.path.exists("gs:")


def test_matplotlib_is_loaded_late_and_without_windows():
    code = (
        "import sys; from salcl_jax import report, report_figures; assert 'matplotlib' not in sys.modules;"
        "rows = {'trained': {'voc_svm/ap/cat': .5}};"
        "report_figures.pixels(report_figures.class_bars('voc_svm', rows, 'net'));"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_picks_are_best_middle_and_worst():
    scores = np.array([0.5, NAN, 0.9, 0.1, 0.7, 0.3, 0.2, 0.8, NAN, 0.6, 0.4])
    found = report.picks(scores, 2)
    # Of nine scores 0.5 is the middle; of an even count's two middles the better one is taken.
    expected = {"best": [2, 7], "median": [9, 0], "worst": [3, 6]}
    assert {name: index.tolist() for name, index in found.items()} == expected
    few = report.picks(np.array([0.1, 0.3, 0.2, NAN]), 4)
    assert {name: index.tolist() for name, index in few.items()} == {"best": [1], "median": [2], "worst": [0]}
    assert report.picks(np.array([0.5]), 4)["median"].tolist() == [0]
    with pytest.raises(ValueError, match="no image has a score"):
        report.picks(np.array([NAN]), 4)


def test_gallery_shows_the_images_it_picks():
    n = 9
    scores = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6]) / 10
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[..., 0] = 20 * np.arange(n, dtype=np.uint8)[:, None, None]
    maps = np.repeat(np.linspace(0, 1, n, dtype=np.float32), 16).reshape(n, 4, 4)
    boxes = np.zeros((n, 2, 4), np.float32)
    boxes[:, 0] = (0.25, 0.25, 0.75, 0.75)
    rois = Rois(boxes, np.tile([True, False], (n, 1)), np.full((n, 2), 0.5, np.float32))
    found = report.gallery(images, maps, rois, boxes, scores, count=2)
    pitch, block = 144 + visualize.GAP, 3 * (144 + visualize.GAP) + visualize.HEADER + visualize.GAP
    assert found.shape == (3 * block, 2 * pitch + visualize.GAP, 3)
    rank = np.argsort(-scores)
    expected = [rank[:2], rank[3:5], rank[::-1][:2]]
    for group in range(3):
        for column in range(2):
            i = expected[group][column]
            top, left = group * block + visualize.HEADER, visualize.GAP + column * pitch
            tiles = [found[top + row * pitch :][:144, left : left + 144] for row in range(3)]
            assert tuple(tiles[0][72, 72]) == (20 * i, 0, 0) and tuple(tiles[2][72, 72]) == (20 * i, 0, 0)
            assert np.any(np.all(tiles[0] == visualize.WHITE, axis=-1))  # ground truth
            heat = visualize.heat(maps[i], images[i])[16, 16]
            np.testing.assert_array_equal(tiles[1][72, 72], heat)
            assert np.any(np.all(tiles[2] == visualize.PALETTE[0], axis=-1))
            assert not np.any(np.all(tiles[2] == visualize.PALETTE[1], axis=-1))  # an invalid region
            title = found[group * block :][: visualize.HEADER - 2, left : left + 144]
            assert np.any(title < 100)
