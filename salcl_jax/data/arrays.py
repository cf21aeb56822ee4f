"""Columns of numpy arrays: an .npz file or a folder of .npy files, memory-mapped when they can be.

`image` is uint8 [n, s, s, 3]; optional: `label` [n], `boxes` [n, k, 4] (zero rows = padding),
`classes` [n, k], `class_names` [c], `mask` uint8 [n, h, w] (0 background, 255 unknown, else a class
or the number of an object).
"""

import os
import struct
import zipfile

import numpy as np

from salcl_jax.data.files import stats


def load(path: str) -> dict[str, np.ndarray]:
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
    for name in ("label", "boxes", "classes", "mask"):
        if name in columns and len(columns[name]) != len(image):
            raise ValueError(f"{path}: {name} has {len(columns[name])} rows, image {len(image)}")
    mask = columns.get("mask")
    if mask is not None and (mask.dtype != np.uint8 or mask.ndim != 3):
        raise ValueError(f"{path}: mask is {mask.dtype} {list(mask.shape)}; store uint8 [n, h, w]")
    return columns


def identity(path: str) -> list:
    """Names, sizes and times of the files that hold the columns; the same after a move."""
    names = _names(path) if os.path.isdir(path) else [""]
    return [names, stats([os.path.join(path, name) if name else path for name in names])]


def _names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".npy"))


def _load_folder(path: str) -> dict[str, np.ndarray]:
    files = {name: os.path.join(path, name) for name in _names(path)}
    return {n[:-4]: np.load(file, mmap_mode="r", allow_pickle=False) for n, file in files.items()}


def _load_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError("not an .npz file") from error
    columns = {}
    with np.load(path, allow_pickle=False) as packed:
        for member in members:
            name = member.filename.removesuffix(".npy")
            mapped = _map_member(path, member)
            columns[name] = packed[name] if mapped is None else mapped
    return columns


def _map_member(path: str, member: zipfile.ZipInfo) -> np.ndarray | None:
    """Memory map of a stored (not compressed) member; None where it must be read instead."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)  # zip local header: name and extra lengths are its last two fields
        file.seek(sum(struct.unpack("<HH", local[26:30])), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0
        if version >= (2, 0):
            reader = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        if fortran or dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)
