"""What files say about photos: CSV labels, segmentations, lists of photos to keep."""

import csv
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from salcl_jax.data.files import escapes, locate, read_text, stats

REGION = "region"  # the one class of objects of human segmentations
_SHOWN = 12  # values a message lists
_CLASSES = 1_000_000  # a larger number is no class, and the names up to it would fill the memory


_NOTHING: dict[str, Any] = {  # what a photo without objects has in each column of them
    "boxes": np.zeros((0, 4), np.float32),
    "classes": np.zeros(0, np.int32),
    "difficult": np.zeros(0, bool),
    "segments": (),
}


class Table(NamedTuple):
    """Paths of n photos, columns of n entries each, and the names of the classes."""

    files: list[str]
    columns: dict[str, list]
    class_names: tuple[str, ...] = ()


def join(tables: Sequence[Table], origin: str) -> Table:
    """The photos of several tables of objects; classes with the same name are one.

    A photo has nothing in a column that its own table lacks. origin: begins the line of the ValueError
    that is raised for a photo of two tables.
    """
    names = tuple(dict.fromkeys(name for table in tables for name in table.class_names))
    found: list[str] = []
    columns: dict[str, list] = {key: [] for table in tables for key in table.columns}
    for table in tables:
        if twice := set(found) & set(table.files):
            raise ValueError(f"{origin}: {min(twice)} is in more than one of these files")
        found += table.files
        new = np.array([names.index(name) for name in table.class_names], np.int32)
        own = dict(table.columns)
        if "classes" in own:
            own["classes"] = [new[kinds] for kinds in own["classes"]]
        for key, column in columns.items():
            column += own.get(key, [_NOTHING[key]] * len(table.files))
    return Table(found, columns, names)


def numbered_names(numbers: Sequence[int], where: str) -> tuple[str, ...]:
    """Names '0', '1', ... of the classes with these numbers, of which -1 is an unknown one.

    where: begins the line of the ValueError that is raised for other numbers.
    """
    low, high = min(numbers), max(numbers)
    if low < -1 or high >= _CLASSES:
        odd = low if low < -1 else high
        raise ValueError(f"{where}: label {odd} is no class; use numbers from 0 to {_CLASSES - 1}")
    return tuple(str(number) for number in range(high + 1))


def _integer(digits: str, where: str) -> int:
    if len(digits) > 1000:  # Python reads no number of several thousand
        raise ValueError(f"{where}: label {digits[:_SHOWN]}... is no class; use one below {_CLASSES}")
    return int(digits)


def folder_labels(files: list[str]) -> Table:
    """The parent folder's name is the class; classes are numbered by name."""
    parents = [os.path.basename(os.path.dirname(path)) for path in files]
    names = tuple(sorted(set(parents)))
    number = {name: i for i, name in enumerate(names)}
    return Table(files, {"label": [number[parent] for parent in parents]}, names)


def labels(path: str, roots: tuple[str, ...], files: list[str], where: Sequence[tuple[str, str]]) -> Table:
    """Rows of a CSV file with columns file and label, those that `where` keeps."""
    rows = _rows(path, ("file", "label"), where)
    numbers, names = _numbers(rows, path)  # before the choice of rows: all splits share one numbering
    chosen = _choose(rows, where, path)
    bases = (os.path.dirname(path), *roots)
    found = locate([rows[i]["file"] for i in chosen], bases, files, path)
    return Table(found, {"label": [numbers[i] for i in chosen]}, names)


def segmentations(
    path: str, roots: tuple[str, ...], files: list[str], where: Sequence[tuple[str, str]]
) -> Table:
    """Rows of a CSV file with columns file and segment_files (blank-separated, below its folder)."""
    rows = _rows(path, ("file", "segment_files"), where)
    rows = [rows[i] for i in _choose(rows, where, path)]
    home = os.path.dirname(path)
    found = locate([row["file"] for row in rows], (home, *roots), files, path)
    maps = [tuple(os.path.join(home, m) for m in row["segment_files"].split()) for row in rows]
    bare = next((row["file"] for row, m in zip(rows, maps, strict=True) if not m), None)
    if bare is not None:
        raise ValueError(f"{path}: {bare} has no segment_files; name one at least or drop the row")
    out = next((m for row in rows for m in row["segment_files"].split() if escapes(m)), None)
    if out is not None:
        raise ValueError(f"{path}: segment file {out} is not below {home or '.'}; name files below it")
    if stats(maps[0][:1]) == [(-1, -1)]:  # of the others, files that are missing are passed over
        raise FileNotFoundError(f"{path}: {maps[0][0]} of {rows[0]['file']}: no such file; check its folder")
    return Table(found, {"segments": maps}, (REGION,))


def parse_where(text: str) -> list[tuple[str, str]]:
    """'column=value[,column=value]' -> pairs. Raises ValueError."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        column, sign, value = part.partition("=")
        if not sign or not column.strip():
            raise ValueError(f"data.where {text!r}: {part!r} is not column=value")
        pairs.append((column.strip(), value.strip()))
    return pairs


def _rows(path: str, needed: Sequence[str], where: Sequence[tuple[str, str]]) -> list[dict]:
    """The rows, each with the columns that are needed; ValueError names the line of one that is cut short."""
    reader = csv.DictReader(read_text(path).splitlines(), strict=True)
    needed = {*needed, *(column for column, _ in where)}
    rows = []
    try:
        header = reader.fieldnames or ()
        if missing := needed - set(header):
            has = ", ".join(header) or "no header"
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; it has {has}")
        for row in reader:
            if missing := [column for column in sorted(needed) if row[column] is None]:
                what = f"line {reader.line_num} has no {', '.join(missing)}"
                raise ValueError(f"{path}: {what}; complete the row or drop it")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.reader.line_num}: {error}; mend or drop it") from error
    return rows


def _choose(rows: list[dict], where: Sequence[tuple[str, str]], path: str) -> list[int]:
    if not rows:
        raise ValueError(f"{path}: has a header but no rows; add them")
    chosen = [i for i, row in enumerate(rows) if all(row[column] == v for column, v in where)]
    if not chosen:
        asked = ", ".join(f"{column}={value}" for column, value in where)
        has = "; ".join(f"{column} has {_values(rows, column)}" for column, _ in where)
        raise ValueError(f"{path}: no row with {asked}; {has}")
    return chosen


def _values(rows: list[dict], column: str) -> str:
    values = sorted({row[column] or "''" for row in rows})
    return ", ".join(values[:_SHOWN]) + (" ..." if len(values) > _SHOWN else "")


def _numbers(rows: list[dict], path: str) -> tuple[list[int], tuple[str, ...]]:
    """Integer labels are kept, with `name` as class names if given; words are numbered."""
    words = [row["label"] for row in rows]
    if words and all(word.isdecimal() for word in words):
        numbers = [_integer(word, path) for word in words]
        known = {label: row.get("name") for label, row in zip(numbers, rows, strict=True)}
        return numbers, tuple(known.get(i) or name for i, name in enumerate(numbered_names(numbers, path)))
    names = tuple(sorted(set(words)))
    number = {name: i for i, name in enumerate(names)}
    return [number[word] for word in words], names


def restrict(table: Table, path: str, roots: tuple[str, ...]) -> Table:
    """The photos that a text file lists, in its order: a relative path or a bare file name a line.

    An integer after the last blank is the photo's label. Raises ValueError naming a line that is
    no photo of the table, or that could be several.
    """
    listed = _parse_list(path)
    places = {os.path.normpath(file): i for i, file in enumerate(table.files)}
    bare: dict[str, list[int]] = {}
    for i, file in enumerate(table.files):
        bare.setdefault(os.path.basename(file), []).append(i)
    kept: dict[int, int] = {}
    for name, label in listed:
        if os.path.basename(name) == name:
            found = bare.get(name, [])
        else:
            paths = (os.path.normpath(os.path.join(root, name)) for root in roots)
            found = sorted({places[p] for p in paths if p in places})
        if not found:
            few = f"the {len(table.files)} photos below {' or '.join(roots)}"
            raise ValueError(f"{path}: {name} is not among {few}; fix the list or data.roots")
        if len(found) > 1:
            pair = " or ".join(table.files[i] for i in found[:2])
            raise ValueError(f"{path}: {name} may be {pair}; list paths that tell them apart")
        if kept.setdefault(found[0], label) != label:
            raise ValueError(f"{path}: {name} is listed with two labels; drop one")
    columns = {key: [column[i] for i in kept] for key, column in table.columns.items()}
    short = Table([table.files[i] for i in kept], columns, table.class_names)
    return short if listed[0][1] < 0 else _relabel(short, list(kept.values()), path)


def _parse_list(path: str) -> list[tuple[str, int]]:
    """(name, label) a line; label -1 throughout where the file gives none."""
    found = []
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        name, *last = line.rsplit(maxsplit=1)
        found.append((name, _integer(last[0], path)) if last and last[0].isdecimal() else (line, -1))
    if not found:
        raise ValueError(f"{path}: lists no photo; write one name a line")
    odd = next((name for name, label in found if (label < 0) != (found[0][1] < 0)), None)
    if odd is not None:
        raise ValueError(f"{path}: some lines have a label, some not ({odd}); give all or none one")
    return found


def _relabel(table: Table, numbers: list[int], path: str) -> Table:
    if table.class_names and "label" not in table.columns:
        raise ValueError(f"{path}: has labels, and the photos have boxes with classes; drop one of the two")
    names = numbered_names(numbers, path)
    if table.columns.get("label") == numbers:
        names = table.class_names  # the same numbering, so its names hold
    return Table(table.files, {**table.columns, "label": numbers}, names)
