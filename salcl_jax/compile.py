"""Compile the training step for a TPU slice that is not there, and report what it would take.

`python -m salcl_jax.compile --config=configs/coco.py --topology=v5e:4x4 [--against=configs/coco_byol.py]
[--per_chip=128] [--fit] [--out=FILE.json]` needs the TPU compiler (`pip install -e .[tpu]`) and no TPU.
Exit codes: 0 done, 1 a step does not fit into a chip's memory, 2 something to mend in the command or
configuration.
"""

import os
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from salcl_jax import cli
from salcl_jax.validation import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_AGAINST = config_flags.DEFINE_config_file(
    "against", None, "second configuration; the ratios of the first to it are reported", lock_config=True
)
_TOPOLOGY = flags.DEFINE_list("topology", "v5e:4x4", "slices: v5e:4x4, v6e:8x16, v4:2x2x4, v5p:4x4x4, ...")
_PER_CHIP = flags.DEFINE_integer(
    "per_chip", 0, "images per chip and step, of both configurations; 0: batch_size over the chips",
    lower_bound=0,
)
_FIT = flags.DEFINE_bool("fit", False, "search the largest batch per chip that fits")
_OUT = flags.DEFINE_string("out", None, "JSON file for the report")
NO_FIT = 1


def _check() -> None:
    if _AGAINST.value is not None:
        validate(_AGAINST.value)
    if _OUT.value:
        cli.writable("out", os.path.dirname(os.path.abspath(_OUT.value)))


def main(_: list[str]) -> None:
    """Compile and report what the flags describe."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # only the compiler is used: a TPU of this machine is left alone
    from salcl_jax import aot, writer

    configs = {_typed("config"): _CONFIG.value}
    if _AGAINST.value is not None:
        configs[_typed("against")] = _AGAINST.value
    reports = []
    try:
        for topology in _TOPOLOGY.value:
            mesh = aot.slice_mesh(topology)
            for name, config in configs.items():
                cli.say(f"compiling {name} for {topology}, which takes minutes")
                found = _report(config.copy_and_resolve_references(), mesh)
                reports.append({"config": name, "topology": topology} | found)
                print(text(reports[-1]), flush=True)
    except (ValueError, ImportError) as error:
        cli.leave(str(error))
    print("".join(comparisons(reports)), end="", flush=True)
    if _OUT.value:
        about = {"command": " ".join(["python -m salcl_jax.compile", *sys.argv[1:]])}
        writer.write_json(_OUT.value, about | {"versions": writer.versions(), "reports": reports})
    sys.exit(0 if all(found["fits"] for found in reports) else NO_FIT)


def _typed(flag: str) -> str:
    """The file and variants that a configuration flag was given."""
    words = " ".join(sys.argv[1:]).replace(f"--{flag} ", f"--{flag}=").split()
    return next(word.split("=", 1)[1] for word in words if word.lstrip("-").startswith(f"{flag}="))


def _report(config: Any, mesh: Any) -> dict[str, Any]:
    """Figures of one configuration on one slice, with the largest batch that fits where asked for."""
    from salcl_jax import aot
    from salcl_jax.chips import chip_of

    found: dict[int, dict[str, Any]] = {}

    def attempt(per_chip: int) -> tuple[bool, float | None]:
        with config.unlocked():
            config.batch_size = per_chip * mesh.size
        try:
            found[per_chip] = {"fits": True} | aot.measure(aot.compile_step(config, mesh), config, mesh)
            return True, found[per_chip]["memory"]["total"]
        except aot.TooLarge as error:
            memory = {"total": error.used, "limit": error.limit}
            found[per_chip] = {"fits": False, "per_chip": per_chip, "chips": mesh.size, "memory": memory}
            return False, error.used

    first = _PER_CHIP.value or max(1, config.batch_size // mesh.size)
    attempt(first)
    if not _FIT.value:
        return found[first]
    chip = chip_of(mesh.devices.flat[0].device_kind)
    largest = aot.largest_batch(attempt, chip.memory, first)
    return found[first] | {"largest_per_chip": largest, "at_largest": found.get(largest)}


def text(report: dict[str, Any]) -> str:
    """A report for people."""
    r, memory = report, report["memory"]
    head = f"\n{r['config']} on {r['topology']}: {r['chips']} chips, {r['per_chip']} images each"
    if r["fits"]:
        rows = _rows(r)
    else:
        needed = f": needs {_gib(memory['total'])} of {_gib(memory['limit'])} GiB" if memory["total"] else ""
        rows = [("memory", f"does not fit{needed}")]
    if "largest_per_chip" in r:
        rows.append(("largest batch", f"{r['largest_per_chip']} images per chip"))
    return "\n".join([head, *(f"  {name:<15} {value}" for name, value in rows)])


def _rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    memory, work = r["memory"], (r["flops_per_image"] / 1e9, r["bytes_per_image"] / 1e6)
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in memory.items() if kind != "total")
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in r["milliseconds"].items())
    return [
        ("memory", f"{_gib(memory['total'])} of {_gib(r['memory_of_chip'])} GiB: {kinds}"),
        ("work", "{:.2f} GFLOP and {:.0f} MB per image".format(*work)),
        ("least time", times),
        ("at most", f"{r['images_per_second']:.0f} images/s per chip, bound by {r['bound']}"),
        *((kind, _counted(total)) for kind, total in r["collectives"].items()),
        *((f"- {what}", _counted(total)) for what, total in r["collectives_of"].items()),
        ("not reused", ", ".join(r["not_donated"]) or "nothing: the new state takes the old one's memory"),
        ("compiles again", ", ".join(r["recompiles"]) or "never: the state comes out as it goes in"),
    ]


def comparisons(reports: list[dict[str, Any]]) -> list[str]:
    """Ratios of the first configuration to the second on each slice, and of the last slice to the first."""
    good = {(r["topology"], r["config"]): r for r in reports if r["fits"]}
    slices, names = (list(dict.fromkeys(key[i] for key in good)) for i in (0, 1))
    pairs = [((t, names[0]), (t, names[1])) for t in slices] if len(names) > 1 else []
    pairs += [((slices[-1], name), (slices[0], name)) for name in names] if len(slices) > 1 else []
    return [_ratios(good[a], good[b]) for a, b in pairs if a in good and b in good]


def _ratios(one: dict[str, Any], other: dict[str, Any]) -> str:
    """A line for each quantity of the first report over the second's."""
    title = "\n{config} on {topology} / ".format(**one) + "{config} on {topology}\n".format(**other)
    rows = zip(_quantities(one).items(), _quantities(other).values(), strict=True)
    return title + "".join(f"  {name:<15} {a / b:.4f}\n" for (name, a), b in rows if b)


def _quantities(r: dict[str, Any]) -> dict[str, float]:
    return {
        "FLOPs per image": r["flops_per_image"],
        "bytes per image": r["bytes_per_image"],
        "memory per chip": r["memory"]["total"],
        "collectives": sum(kind["count"] for kind in r["collectives"].values()),
        "their bytes": sum(kind["bytes"] for kind in r["collectives"].values()),
        "least time": r["per_chip"] / r["images_per_second"],
    }


def _counted(total: dict[str, int]) -> str:
    return f"{total['count']} of {total['bytes'] / 1e6:.2f} MB together"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parser(_CONFIG, _check))
