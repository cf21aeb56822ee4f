"""Speed of the training step: whole and in parts, with guidance and without, and its wait for data."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from salcl_jax import config as config_lib
from salcl_jax import sharding, train
from salcl_jax.bench import programs, waiting
from salcl_jax.chips import chip_of

WORST_RATIO = 0.94  # of plain images/s that the guided step is meant to reach at least


def run(
    config: Any, *, batches: Sequence[int] = (), rounds: int = 5, parts: bool = True
) -> dict[str, Any]:
    """Measure the step of a validated configuration on all devices; a report of plain JSON values.

    batches: sizes over all devices of which the fastest is measured in full; none given, the configuration's.
    rounds: times everything is timed, in turns; figures are {median, min, max} over them. parts: also the
    parts of the step. Raises ConfigError where a size does not fit the devices or none fits the memory.
    """
    train.use_compilation_cache()
    mesh, notes = sharding.make_mesh(), []
    tried = []
    if batches:
        tried = [_images_per_second(_with(config, batch_size=size), mesh, rounds) for size in batches]
        fits = [row for row in tried if row["images_per_second"]]
        if not fits:
            raise config_lib.ConfigError(f"batches {list(batches)}: none fits the memory; try smaller ones")
        best = max(fits, key=lambda row: row["images_per_second"])["batch_size"]
        config = _with(config, batch_size=best)
    kind = mesh.devices.flat[0].device_kind
    if chip_of(kind) is None:
        notes.append(f"no published peak is known for '{kind}': shares of it (MFU) are left out")
    settings = {name: programs.Setting(c, mesh) for name, c in _modes(config).items()}
    timed = _time(settings, rounds, parts, notes)
    modes = {name: _figures(settings[name], *timed[name]) for name in settings}
    report = {
        "model": config.model.name, "crop": config.crops.size, "dtype": config.model.dtype,
        "batch_size": config.batch_size, "devices": mesh.size, "device": kind, "rounds": rounds,
        "batches": tried, "modes": modes,
    }  # fmt: skip
    if len(modes) > 1:
        pairs = zip(timed["plain"][1]["step"], timed["guided"][1]["step"], strict=True)
        report["guided_over_plain"] = spread([plain / guided for plain, guided in pairs])
    first = next(iter(settings.values()))
    report["data_wait"], note = waiting.measure(first)
    return report | {"notes": notes + ([note] if note else [])}


def _with(config: Any, **fields: Any) -> Any:
    config = config_lib.ConfigDict(config.to_dict())
    config.update(fields)
    return config


def _modes(config: Any) -> dict[str, Any]:
    """The configuration, and the same one with guidance off; only 'plain' where it is off already."""
    plain = _with(config)
    config_lib.plain_byol(plain)
    same = plain.to_dict() == config.to_dict()
    return {"plain": plain} if same else {"guided": config, "plain": plain}


def _images_per_second(config: Any, mesh: jax.sharding.Mesh, rounds: int) -> dict[str, Any]:
    """Rate of one batch size; None, with the reason, where it does not fit the memory."""
    row = {"batch_size": config.batch_size, "images_per_second": None}
    try:
        step = programs.whole_step(programs.Setting(config, mesh))
        took = programs.measure({"step": step}, min(rounds, 3))["step"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return row | {"why": "out of memory"}
    return row | {"images_per_second": config.batch_size / statistics.median(took)}


def _time(settings: dict, rounds: int, parts: bool, notes: list[str]) -> dict[str, tuple[dict, dict]]:
    """Of each mode the programs and the seconds of their rounds, all modes timed in turns."""
    found = {name: {"step": programs.whole_step(setting)} for name, setting in settings.items()}
    for name, setting in settings.items() if parts else ():
        found[name] |= programs.parts(setting)
        if setting.config.crops.gradient:
            notes.append("crops.gradient: the gradient through the windows is in the step, not in its parts")
    flat = {f"{mode} {name}": program for mode, own in found.items() for name, program in own.items()}
    seconds = programs.measure(flat, rounds)
    return {mode: (own, {name: seconds[f"{mode} {name}"] for name in own}) for mode, own in found.items()}


def _figures(setting: programs.Setting, own: dict[str, programs.Program], seconds: dict) -> dict[str, Any]:
    """Step, parts, and the sum of the parts; milliseconds are those of a whole optimizer step."""
    each = {name: [program.per_step * value for value in seconds[name]] for name, program in own.items()}
    if "gradient" in own:
        own, each = _with_backward(own, each)
    images, mesh = setting.config.batch_size, setting.mesh
    chip = chip_of(mesh.devices.flat[0].device_kind)
    rows = {name: _row(t, images) | _work(own[name], t, images, mesh.size, chip) for name, t in each.items()}
    step = rows.pop("step")
    if not rows:
        return {"step": step}
    total = sum(row["milliseconds"]["median"] for row in rows.values())
    share = total / step["milliseconds"]["median"]
    return {"step": step, "parts": rows, "sum_of_parts": {"milliseconds": total, "over_step": share}}


def _with_backward(own: dict, each: dict) -> tuple[dict, dict]:
    """'backward', what the gradient takes beyond the passes forward, in place of 'gradient'."""
    passes = [name for name in ("online", "target") if name in own]
    total, counts = own["gradient"], {}
    for field in ("flops", "bytes_accessed"):
        parts = [getattr(own[name], field) for name in passes]
        counts[field] = getattr(total, field) and getattr(total, field) - sum(part or 0 for part in parts)
    times = [t - sum(parts) for t, *parts in zip(each["gradient"], *(each[p] for p in passes), strict=True)]
    last = {"backward": total._replace(**counts), "update": own["update"]}
    first = {name: program for name, program in own.items() if name not in ("gradient", "update")}
    return first | last, {n: each.get(n, times) for n in (*first, *last)}


def _row(times: list[float], images: int) -> dict[str, Any]:
    milliseconds = spread([1e3 * value for value in times])
    return {"milliseconds": milliseconds, "images_per_second": 1e3 * images / milliseconds["median"]}


def _work(program: programs.Program, times: list[float], images: int, devices: int, peak: Any) -> dict:
    """Operations, bytes and memory by the compiler's count; shares of the chips' peaks where known."""
    found = {"memory": program.memory}
    counts = {"flops": program.flops, "bytes": program.bytes_accessed}
    for name, count in counts.items():
        if count:
            count *= program.per_step
            found[f"{name}_per_image"] = count / images
            best = peak and devices * (peak.flops if name == "flops" else peak.bandwidth)
            if best:
                share = count / statistics.median(times) / best
                found["mfu" if name == "flops" else "bandwidth_share"] = share
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(report: dict[str, Any]) -> str:
    """The report as tables for the terminal."""
    r = report
    head = (
        f"{r['model']}, {r['crop']} px, {r['dtype']}, batch {r['batch_size']} on {r['devices']} x "
        f"{r['device']}; median (min .. max) of {r['rounds']}"
    )
    rates = [f"  batch {row['batch_size']}: " + _rate(row) for row in r["batches"]]
    lines = ["", head, *rates]
    for name, mode in r["modes"].items():
        parts = mode.get("parts", {})
        lines += ["", f"{name:<14}{'ms':>26}{'images/s':>10}{'GFLOP/image':>13}{'MFU':>7}"]
        lines += [_line("step", mode["step"]), *(_line(f"  {part}", row) for part, row in parts.items())]
        if parts:
            total = "  sum of parts {milliseconds:9.2f}, {over_step:.2f} of the step"
            lines.append(total.format(**mode["sum_of_parts"]))
    lines.append("")
    if "guided_over_plain" in r:
        ratio = "{median:.3f} ({min:.3f} .. {max:.3f})".format(**r["guided_over_plain"])
        lines.append(f"guided images/s over plain: {ratio}; meant to be at least {WORST_RATIO}")
    if r["data_wait"]:
        wait = "waiting for data: {share:.1%} of {seconds:.1f} s in {steps} steps, {images_per_second:.0f}/s"
        lines.append(wait.format(**r["data_wait"]))
    for name, figures in r.get("restart", {}).items():
        start = "{name} compilation cache: first step after {seconds:.1f} s, {compiled} programs compiled"
        lines.append((start + ", {cached} read").format(name=name, **figures))
    return "\n".join(lines + [f"note: {note}" for note in r["notes"]])


def _rate(row: dict[str, Any]) -> str:
    return f"{row['images_per_second']:.0f} images/s" if row["images_per_second"] else row["why"]


def _line(name: str, row: dict[str, Any]) -> str:
    ms = "{median:.2f} ({min:.2f} .. {max:.2f})".format(**row["milliseconds"])
    flops = f"{row['flops_per_image'] / 1e9:.3f}" if "flops_per_image" in row else ""
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
    return f"{name:<14}{ms:>26}{row['images_per_second']:10.0f}{flops:>13}{mfu:>7}"
