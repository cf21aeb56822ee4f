"""What a run records of its configuration: the fields that decide what is learnt, compared and recalled."""

import json
from collections.abc import Mapping

from salcl_jax.config import ConfigDict, ConfigError

# Fields that may change between a run and its continuation: they do not decide what is learnt.
_PASSIVE = ("eval", "tasks", "log", "checkpoint", "collapse", "distributed", "distributed_timeout",
            "sharding", "data.workers", "data.prefetch", "data.cache", "data.cache_gb", "data.max_skipped",
            "data.train.data_dir", "data.train.roots", "data.train.path", "data.train.annotations",
            "data.train.labels", "data.train.list", "data.train.where", "data.train.masks",
            "data.train.regions", "resolved.devices", "resolved.eval_every", "resolved.panels_every",
            "resolved.checkpoint_every", "resolved.keep_every")  # fmt: skip


def learnt_fields(c: ConfigDict) -> dict:
    """Fields that decide what is learnt, as flat JSON values; a resumed run must have the same.

    Photos may move to another folder, but their number (resolved.images) must stay.
    """
    flat = flatten(c.to_dict())
    kept = {n: v for n, v in flat.items() if not any(n == p or n.startswith(p + ".") for p in _PASSIVE)}
    return json.loads(json.dumps(kept, sort_keys=True))


def recall(c: ConfigDict, fields: Mapping, sections: tuple[str, ...], keep: Mapping = {}) -> None:
    """Set the fields of `sections` to those recorded by `learnt_fields`, but for the names in `keep`.

    Raises `ConfigError` for a value of another type: the record may come from anywhere.
    """
    known = flatten(c.to_dict())
    for name, value in fields.items():
        if name in known and name not in keep and name.split(".")[0] in sections:
            if not _fits(value, known[name]):
                raise ConfigError(f"the checkpoint records {name} = {value!r}, no value of that field")
            c.update_from_flattened_dict({name: _tuples(value)})


def _fits(value, like) -> bool:
    """Whether a value out of JSON has the type of a field."""
    if isinstance(like, tuple):
        return isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value)
    if isinstance(like, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(like)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Names and values of flat fields that differ, as 'name: old -> new'."""
    names = sorted(set(old) | set(new))
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def flatten(fields: Mapping, prefix: str = "") -> dict:
    """Nested fields as {dotted name: value}."""
    flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
