"""Columns of numpy arrays: an .npz file or a folder of .npy files; images and masks are read row by row.

`image` is uint8 [n, s, s, 3]; optional: `label` integers [n] (-1 unknown), `boxes` numbers [n, k, 4] (zero
rows = padding), `classes` integers [n, k], `class_names` strings [c], `mask` uint8 [n, h, w] (0
background, 255 unknown, else a class or the number of an object).
"""

import dataclasses
import os
import struct
import zipfile

import numpy as np

from salcl_jax.data.files import stats

_LARGE = ("image", "mask")  # columns that may be larger than the memory
_INTEGER = np.typecodes["AllInteger"]
_COLUMNS = {  # characters of its dtypes, number of axes, what a message asks for
    "label": (_INTEGER, 1, "integers [n]"),
    "boxes": (_INTEGER + np.typecodes["Float"], 3, "numbers [n, k, 4]"),
    "classes": (_INTEGER, 2, "integers [n, k], one a box"),
    "class_names": ("U", 1, "strings [c]"),
    "mask": ("B", 3, "uint8 [n, h, w]"),
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array in a file. Rows are read, not mapped: a mapped file that shrinks kills the process."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # of the first row, in bytes

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, i: int) -> np.ndarray:
        """Row i. Raises IndexError, and OSError where the file ends before it."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: no row {i} of {len(self)}")
        size = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        with open(self.path, "rb") as file:
            file.seek(self.start + i * size)
            row = file.read(size)
        if len(row) < size:
            raise OSError(f"{self.path}: ends before row {i}")
        return np.frombuffer(row, self.dtype).reshape(self.shape[1:])


def load(path: str) -> dict[str, np.ndarray | Rows]:
    """Column name -> array. Raises FileNotFoundError, or ValueError with the column's fault."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path!r}: no .npz file or folder of .npy files; set data.path")
    try:
        columns = _load_folder(path) if os.path.isdir(path) else _load_npz(path)
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged files
        raise ValueError(f"{path}: cannot be read ({error}); write it with numpy.savez") from error
    image = columns.get("image")
    if image is None or image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"{path}: needs a column image, uint8 [n, h, w, 3]")
    for name in _COLUMNS:
        if name in columns:
            _check(path, name, columns)
    return columns


def _check(path: str, name: str, columns: dict[str, np.ndarray | Rows]) -> None:
    """Raise ValueError for a column that its readers could not use."""
    column, (chars, axes, wanted) = columns[name], _COLUMNS[name]
    fits = column.dtype.char in chars and column.ndim == axes
    if name == "boxes":
        fits = fits and column.shape[-1] == 4
    if name == "classes" and "boxes" in columns:  # which were checked before
        fits = fits and column.shape[1] == columns["boxes"].shape[1]
    if not fits:
        raise ValueError(f"{path}: {name} is {column.dtype} {list(column.shape)}; store {wanted}")
    if name != "class_names" and len(column) != len(columns["image"]):
        raise ValueError(f"{path}: {name} has {len(column)} rows, image {len(columns['image'])}")


def identity(path: str) -> list:
    """Names, sizes and times of the files that hold the columns; the same after a move."""
    names = _names(path) if os.path.isdir(path) else [""]
    return [names, stats([os.path.join(path, name) if name else path for name in names])]


def _names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".npy"))


def _load_folder(path: str) -> dict[str, np.ndarray | Rows]:
    columns = {}
    for name in _names(path):
        file = os.path.join(path, name)
        rows = _rows(file, 0) if name[:-4] in _LARGE else None
        columns[name[:-4]] = np.load(file, allow_pickle=False) if rows is None else rows
    return columns


def _load_npz(path: str) -> dict[str, np.ndarray | Rows]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError("not an .npz file") from error
    columns = {}
    with np.load(path, allow_pickle=False) as packed:
        for member in members:
            name = member.filename.removesuffix(".npy")
            rows = _stored(path, member) if name in _LARGE else None
            columns[name] = packed[name] if rows is None else rows
            if isinstance(columns[name], bytes):  # numpy hands on what is no array
                raise ValueError(f"{name} is no array")
    return columns


def _stored(path: str, member: zipfile.ZipInfo) -> Rows | None:
    """Rows of a stored (not compressed) member; None where it must be read whole."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)  # zip local header: name and extra lengths are its last two fields
    return _rows(path, member.header_offset + 30 + sum(struct.unpack("<HH", local[26:30])))


def _rows(path: str, start: int) -> Rows | None:
    """Rows of the array that begins at this byte of a file; None where they do not lie in order."""
    with open(path, "rb") as file:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0
        if version >= (2, 0):
            reader = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        if fortran or dtype.hasobject or 0 in shape or not shape:
            return None
        rows = Rows(path, dtype, shape, file.tell())
    rows[len(rows) - 1]  # a file that is too short is told now
    return rows
