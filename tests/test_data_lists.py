"""Which photos of a folder are kept: rows of a CSV file, and lists of names."""

import csv
import pathlib

import pytest
from PIL import Image

from salcl_jax.data import sources


def write(folder: pathlib.Path, *names: str) -> dict[str, bytes]:
    """Photos that differ from one another; name -> file."""
    found = {}
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (number, 7, 0)).save(path)
        found[name] = path.read_bytes()
    return found


def read(source: sources.Source) -> list[bytes]:
    return [source.read(i)["encoded"] for i in range(len(source))]


def labels_of(source: sources.Source) -> list[int]:
    return [source.read(i)["label"] for i in range(len(source))]


def test_where_and_split_choose_rows(tmp_path):
    photos = write(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = [
        ("0.png", "cat", "train", "0", "a b"),
        ("1.png", "dog", "train", "0", ""),
        ("2.png", "dog", "train", "1", "a b"),
        ("3.png", "cat", "val", "0", "a b"),
        ("4.png", "eel", "train", "", "a b"),
        ("5.png", "dog", "train", "0", "a b"),
    ]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "split", "fold_1pct", "by"), *rows])
    spec = {"kind": "folder", "roots": str(tmp_path), "labels": str(tmp_path / "labels.csv")}

    def names(**more) -> list[str]:
        found = read(sources.open_source(spec | more))
        return [next(name for name in photos if photos[name] == data) for data in found]

    assert names(where="") == [row[0] for row in rows]
    assert names(where="fold_1pct=0") == ["0.png", "1.png", "3.png", "5.png"]
    assert names(where="fold_1pct=0", split="train") == ["0.png", "1.png", "5.png"]
    assert names(where=" fold_1pct = 0 , by = a b", split="train") == ["0.png", "5.png"]
    assert names(where="fold_1pct=") == ["4.png"]
    part = sources.open_source(spec | {"where": "fold_1pct=1"})
    assert labels_of(part) == [1] and part.class_names == ("cat", "dog", "eel")  # as in the whole file
    faults = [
        ({"where": "fold=0"}, r"no column fold; it has file, label, split, fold_1pct, by"),
        ({"where": "fold_1pct=7"}, r"no row with fold_1pct=7; fold_1pct has '', 0, 1"),
        ({"where": "by=a b", "split": "test"}, r"by=a b, split=test; .*split has train, val"),
        ({"where": "fold_1pct"}, r"'fold_1pct' is not column=value"),
        ({"where": "by=x", "labels": "", "label_from_folder": True}, r"data.where .*set data.labels"),
    ]
    for more, message in faults:
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_source(spec | more)
        assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """Two roots of three photos in the folders n01 and n02; two files are called c.JPEG."""
    photos = write(tmp_path / "x", "n01/a.JPEG", "n02/b.JPEG", "n02/c.JPEG")
    photos |= write(tmp_path / "y", "n01/c.JPEG", "n02/d e.JPEG", "top.JPEG")
    return tmp_path, photos


def open_list(folder: pathlib.Path, text: str, **more) -> sources.Source:
    (folder / "list.txt").write_text(text)
    roots = (str(folder / "x"), str(folder / "y"))
    spec = {"kind": "folder", "roots": roots, "list": str(folder / "list.txt")}
    return sources.open_source(spec | more)


def test_lists_of_bare_names_and_of_paths(folder):
    folder, photos = folder
    source = open_list(folder, "d e.JPEG\n\nb.JPEG\r\n", label_from_folder=True)  # as SimCLR's
    assert read(source) == [photos["n02/d e.JPEG"], photos["n02/b.JPEG"]]
    assert labels_of(source) == [1, 1] and source.class_names == ("n01", "n02", "y")  # of all files
    source = open_list(folder, "n01/c.JPEG\ntop.JPEG\n./n02/c.JPEG\nn01/c.JPEG")
    assert read(source) == [photos["n01/c.JPEG"], photos["top.JPEG"], photos["n02/c.JPEG"]]
    assert not source.has_labels and source.class_names == ()


def test_labels_in_the_list(folder):
    folder, photos = folder
    text = "n02/b.JPEG 4\nn01/a.JPEG\t0\nn02/d e.JPEG 4\n"
    source = open_list(folder, text)
    assert labels_of(source) == [4, 0, 4] and source.has_labels
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert read(source)[2] == photos["n02/d e.JPEG"]
    same = open_list(folder, text.replace(" 4", " 1"), label_from_folder=True)
    assert labels_of(same) == [1, 0, 1] and same.class_names == ("n01", "n02", "y")
    other = open_list(folder, text, label_from_folder=True)  # the list decides
    assert labels_of(other) == [4, 0, 4] and other.class_names == ("0", "1", "2", "3", "4")


def test_a_list_restricts_a_csv_file(folder):
    folder, photos = folder
    (folder / "labels.csv").write_text("file,label\nx/n01/a.JPEG,2\nx/n02/b.JPEG,0\ny/top.JPEG,1\n")
    source = open_list(folder, "top.JPEG\na.JPEG\n", labels=str(folder / "labels.csv"))
    assert labels_of(source) == [1, 2] and read(source) == [photos["top.JPEG"], photos["n01/a.JPEG"]]
    with pytest.raises(ValueError, match="n02/c.JPEG is not among the 3 photos"):
        open_list(folder, "n02/c.JPEG\n", labels=str(folder / "labels.csv"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("b.JPEG\nnone.JPEG\n", "none.JPEG is not among the 6 photos"),
        ("n03/b.JPEG\n", "n03/b.JPEG is not among"),
        ("c.JPEG\n", r"c.JPEG may be .*x/n02/c.JPEG or .*y/n01/c.JPEG"),
        ("a.JPEG 1\nb.JPEG\n", r"some lines have a label, some not \(b.JPEG\)"),
        ("a.JPEG 1\nn01/a.JPEG 2\n", "n01/a.JPEG is listed with two labels"),
        ("\n \n", "lists no photo"),
    ],
)
def test_faults_of_lists_are_told_in_one_line(folder, text, error):
    with pytest.raises(ValueError, match=error) as caught:
        open_list(folder[0], text)
    assert "\n" not in str(caught.value) and "list.txt" in str(caught.value)


@pytest.mark.parametrize("kind", ["list", "labels"])
def test_a_number_too_large_for_a_class_is_told(folder, kind):
    """The names of all classes up to it would fill the memory."""
    folder, _ = folder
    table = folder / "table"
    spec = {"kind": "folder", "roots": str(folder / "x"), kind: str(table)}
    for number in (999_999, 1_000_000, 10**30, "9" * 5000):
        table.write_text(f"a.JPEG {number}\n" if kind == "list" else f"file,label\nn01/a.JPEG,{number}\n")
        if number == 999_999:
            assert sources.open_source(spec).class_names[-1] == "999999"
            continue
        with pytest.raises(ValueError, match=f"{table}: label {str(number)[:12]}.* is no class") as caught:
            sources.open_source(spec)
        assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there_and_labels_beside_boxes(folder):
    folder, _ = folder
    with pytest.raises(FileNotFoundError, match="no.txt: cannot be read"):
        sources.open_source({"kind": "folder", "roots": str(folder / "x"), "list": str(folder / "no.txt")})
    (folder / "notes.json").write_text(
        '{"images": [{"id": 1, "file_name": "n01/a.JPEG", "width": 12, "height": 8}], '
        '"annotations": [], "categories": [{"id": 1, "name": "thing"}]}'
    )
    with pytest.raises(ValueError, match="drop one of the two"):
        open_list(folder, "a.JPEG 3", annotations=str(folder / "notes.json"))
    assert len(open_list(folder, "a.JPEG", annotations=str(folder / "notes.json"))) == 1


def test_folds_of_real_photos(photos):
    folder = photos / "imagenette"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    spec = {"kind": "folder", "roots": str(folder / "images"), "labels": str(folder / "labels.csv")}
    source = sources.open_source(spec | {"split": "train", "where": "fold_1pct=2"})
    labels = labels_of(source)
    assert len(labels) == 90 and all(labels.count(k) == 9 for k in range(10))
