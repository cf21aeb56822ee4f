"""Files of weights: reading and writing .npz, .safetensors, .pth and Detectron2's .pkl.

The only importer of safetensors, and of torch beside the benchmark: both late, a file may need neither.
Nothing that is read is ever run: pickles are opened by PyTorch's reader of plain weights only.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from salcl_jax.weights.names import Arrays

KEY = "salcl_jax"  # under it our own files say what they hold
FOLDER_FILE = "model.safetensors"  # of a Hugging Face folder
_TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt")
SUFFIXES = (".npz", ".safetensors", *_TORCH)


def weights_file(path: str) -> str | None:
    """The file of weights that `path` is, or is the folder of; None for the workdir of a run.

    Raises FileNotFoundError for a file's name without a file.
    """
    place = epath.Path(path) if "://" in path else epath.Path(path).expanduser()
    if place.is_dir():
        inside = place / FOLDER_FILE
        return str(inside) if inside.exists() and not (place / "checkpoints").exists() else None
    if place.exists():
        return str(place)
    if place.suffix in SUFFIXES:
        raise FileNotFoundError(f"no file {path}: give a file of weights, or the workdir of a run")
    return None


def read(path: str) -> tuple[Arrays, dict]:
    """(arrays by name, what one of our own files says of itself); names of nested dictionaries join by dots.

    Raises ValueError with one line for what is not a file of arrays, ImportError for a missing package.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: no file of weights; known are {', '.join(SUFFIXES)}")
    data = epath.Path(path).read_bytes()
    try:
        if suffix == ".npz":
            return _read_npz(data)
        return _read_safetensors(data) if suffix == ".safetensors" else (_read_torch(path, data), {})
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # numpy, zipfile, zlib and torch raise a dozen types on damaged files
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _read_npz(data: bytes) -> tuple[Arrays, dict]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    other = next((name for name, x in arrays.items() if not isinstance(x, np.ndarray)), None)
    if other is not None:
        raise ValueError(f"{other} is no array")
    return arrays, _record(str(arrays.pop(KEY, "{}")))


def _record(text: str) -> dict:
    """What a file says of itself."""
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError(f"its record is no dictionary but {text[:40]!r}")
    return about


def _read_safetensors(data: bytes) -> tuple[Arrays, dict]:
    load = _safetensors_numpy("reading").load
    try:
        arrays = load(data)
    except KeyError as error:
        raise ValueError(f"numpy has no arrays of type {error}; save them as float32") from error
    except Exception as error:  # an error class of its own
        raise ValueError(f"no safetensors file: {_first_line(error)}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(arrays), _record(header.get("__metadata__", {}).get(KEY, "{}"))


def _read_torch(path: str, data: bytes) -> Arrays:
    """Arrays of a PyTorch file; an argument parser's record, which many carry, is let through and dropped."""
    import argparse

    torch = _torch("reading a .pth file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "not plain arrays, and loading anything else would run code; save the state dict alone, or as "
            f".safetensors ({_first_line(error)})"
        ) from error
    arrays: Arrays = {}
    _collect(content, "", arrays, torch)
    return arrays


def _collect(tree: Any, prefix: str, arrays: Arrays, torch: Any) -> None:
    if isinstance(tree, torch.Tensor):
        tree = tree.detach()
        tree = tree.float() if tree.is_floating_point() else tree  # numpy has no bfloat16
        arrays[prefix] = tree.numpy()
    elif isinstance(tree, Mapping):
        for name, below in tree.items():
            _collect(below, f"{prefix}.{name}" if prefix else str(name), arrays, torch)


def write(path: Path, arrays: Arrays, about: Mapping) -> None:
    """Write the file that the name's end asks for, replacing it whole; `about` goes where it has a place."""
    kinds = {".npz": _npz, ".safetensors": _safetensors, ".pkl": _detectron2}
    content = io.BytesIO()
    kinds.get(path.suffix, _pth)(content, arrays, about)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.getvalue())
    part.replace(path)


def _npz(file: Any, arrays: Arrays, about: Mapping) -> None:
    np.savez(file, **arrays, **{KEY: np.array(json.dumps(about))})


def _safetensors(file: Any, arrays: Arrays, about: Mapping) -> None:
    save = _safetensors_numpy("writing").save
    file.write(save(arrays, metadata={"format": "pt", KEY: json.dumps(about)}))


def _detectron2(file: Any, arrays: Arrays, about: Mapping) -> None:
    pickle.dump({"model": arrays, "__author__": KEY, "matching_heuristics": True}, file)


def _pth(file: Any, arrays: Arrays, about: Mapping) -> None:
    torch = _torch("writing a .pth file")
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}, file)


def _torch(doing: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{doing} needs PyTorch: pip install torch, or use .safetensors") from error
    return torch


def _safetensors_numpy(doing: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{doing} .safetensors needs a package: pip install safetensors") from error
    return safetensors.numpy


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
