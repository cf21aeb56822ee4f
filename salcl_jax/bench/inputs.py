"""Images/s of the input pipeline against a bare loop of reading, decoding and resizing.

Both use the same decoder on the same files, which were read before, so that files lie in memory where the
system keeps them there. They take turns, and every figure compares neighbours in time: what else runs on
the machine slows both down.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from salcl_jax.bench import cores as cpus
from salcl_jax.data import decode, pipeline, workers
from salcl_jax.data.sources import Source, open_source

RATES = {"500/s": 500.0, "1000/s": 1000.0, "2000/s": 2000.0, "4000/s": 4000.0}  # of a chip, by name
TARGETS = {"ratio": 0.9, "scaling": 1.8}
_BATCH = 64  # images at most; larger ones take longer and tell no more
_WARM = 2  # batches before the clock starts
_QUIET = 0.95  # of its core that the bare loop has where nothing else runs
CACHES = ("encoded", "canvas")


class Timing(NamedTuple):
    """Images/s, CPU milliseconds an image, and how many cores the process really had."""

    rate: float
    cpu_ms: float
    had: float


def run(
    config: Any,
    *,
    seconds: float = 1.5,
    rounds: int = 5,
    cores: Sequence[int] = (1, 2),
    rates: Mapping[str, float] = RATES,
) -> dict[str, Any]:
    """Report on the training input of a configuration: figures as {median, min, max} over the rounds.

    seconds: of one measurement, about. cores: how many the pipeline gets, with as many workers; those
    that the machine lacks are left out. ratio: images/s per core over those of the bare loop on one
    core. cpu_ratio: likewise of images per CPU second. scaling: images/s over those on one core.
    lost_s: seconds that 1,000 images took longer than the bare loop on as many cores would take. had:
    cores that the process was really given. rates: images/s of a chip, for cores_per_chip.
    Raises ValueError or FileNotFoundError with one line.
    """
    available = cpus.available()
    source = open_source(config.data.train.to_dict())
    size = min(_BATCH, config.batch_size)
    with cpus.only(available[:1]):
        _bare(config, _part(source, size))  # libraries and files are loaded now
        rate = _bare(config, _part(source, size)).rate
    steps = max(_WARM, round(rate * seconds / size))
    part = _part(source, steps * size)
    counts = sorted({1, *(n for n in cores if 1 <= n <= len(available))})
    ways = [(backend, n) for backend in _backends(source) for n in counts]
    kept = CACHES if min(config.data.window_area) >= 1 else CACHES[:1]
    rows = [_round(config, part, size, available, ways, kept) for _ in range(rounds)]
    default = "tf.data" if pipeline.uses_tf(source) else "threads"
    report = {
        "source": source.name, "photos": len(source), "measured": len(part), "canvas": config.data.canvas,
        "window_area": list(config.data.window_area), "batch_size": size, "rounds": rounds,
        "host_cores": len(available), "load": os.getloadavg()[0], "default": default, "targets": TARGETS,
        "bare": _fields([row["bare"][0] for row in rows]),
        "backends": {name: _backend([row[name] for row in rows], counts) for name in _backends(source)},
        "cache": {name: _of([row["cache"][name] for row in rows]) for name in kept},
    }  # fmt: skip
    most = report["backends"][default][str(counts[-1])]
    each = most["images_per_s"]["median"] / counts[-1]
    report["cores_per_chip"] = {name: rate / each for name, rate in rates.items()}
    return report


def _backends(source: Source) -> list[str]:
    return ["threads"] + (["tf.data"] if workers.has_tensorflow() and source.kind != "arrays" else [])


def _part(source: Source, n: int) -> Source:
    """n photos spread evenly over the source; some several times where it has fewer."""
    whole = len(source)
    return dataclasses.replace(
        source, size=n,
        read=lambda i: source.read(i * whole // n), place=lambda i: source.place(i * whole // n),
    )  # fmt: skip


def _round(config, source, size, available, ways, kept) -> dict[str, Any]:
    """Every way once, each between two runs of the bare loop: (timing, mean of the two)."""
    found: dict[str, Any] = {"bare": [], "cache": {}}
    one = available[:1]

    def between(timing_of, n: int, *settings) -> tuple[Timing, Timing]:
        if not found["bare"]:
            with cpus.only(one):
                found["bare"].append(_bare(config, source))
        with cpus.only(available[:n]):
            timing = timing_of(config, source, size, n, *settings)
        with cpus.only(one):
            found["bare"].append(_bare(config, source))
        near = found["bare"][-2:]
        return timing, Timing(*(sum(pair) / 2 for pair in zip(*near, strict=True)))

    for backend, n in ways:
        found.setdefault(backend, {})[n] = between(_pipeline, n, backend == "tf.data")
    for cache in kept:
        timing, bare = between(_pipeline, 1, None, cache)
        found["cache"][cache] = timing.rate / bare.rate
    return found


def _bare(config: Any, source: Source) -> Timing:
    """One pass over the photos, in the order of the pipeline's second epoch."""
    c, n = config.data, len(source)
    clock = _Clock()
    for position in range(n, 2 * n):
        window = pipeline.draw_window(position, config.seed, c.window_area)
        record = source.read(pipeline.order(position, n, config.seed))
        try:
            if "encoded" in record:
                fine = math.ceil(c.canvas / (window[2] - window[0]))
                photo = decode.decode(record["encoded"], fine)
            else:
                photo = decode.from_array(record["image"])
        except decode.SkipImage:
            continue
        decode.to_canvas(photo, window, c.canvas)
    return clock.timing(n)


def _pipeline(config, source, size: int, n: int, use_tf: bool | None, cache: str = "none") -> Timing:
    """n passes over the photos on n cores, after some batches to get going.

    With a cache these are one pass and what is then under way: the next photos all come from the cache.
    """
    c, epoch = config.data, len(source) // size
    warm, first = (_WARM, epoch - _WARM) if cache == "none" else (epoch + c.prefetch + 1, 0)
    batches = pipeline.train_batches(
        source, batch_size=size, canvas=c.canvas, seed=config.seed, start_step=first,
        window_area=c.window_area, max_boxes=c.max_boxes, with_boxes=config.roi.source == "ground_truth",
        min_side=c.min_side, max_pixels=c.max_pixels, workers=n, prefetch=c.prefetch, use_tf=use_tf,
        cache=cache, cache_gb=math.inf,
    )  # fmt: skip
    try:
        for _ in range(warm):
            next(batches)
        clock = _Clock()
        for _ in range(n * epoch):
            next(batches)
        return clock.timing(n * len(source))
    finally:
        batches.close()
        cpus.wait_until_idle()


class _Clock:
    def __init__(self):
        self._cpu, self._start = time.process_time(), time.perf_counter()

    def timing(self, images: int) -> Timing:
        wall, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        return Timing(images / wall, 1e3 * cpu / images, cpu / wall)


def _backend(rows: list[dict[int, tuple[Timing, Timing]]], counts: list[int]) -> dict[str, Any]:
    """Figures of one backend, by number of cores; rows: the rounds."""
    found = {}
    for n in counts:
        pairs = [row[n] for row in rows]
        found[str(n)] = _fields([timing for timing, _ in pairs]) | {
            "ratio": _of([timing.rate / bare.rate / n for timing, bare in pairs]),
            "cpu_ratio": _of([bare.cpu_ms / timing.cpu_ms for timing, bare in pairs]),
            "scaling": _of([row[n][0].rate / row[1][0].rate for row in rows]),
            "lost_s": _of([1000 / timing.rate - 1000 / bare.rate / n for timing, bare in pairs]),
        }
    return found


def _fields(timings: list[Timing]) -> dict[str, dict[str, float]]:
    names = ("images_per_s", "cpu_ms", "had")
    return {name: _of(column) for name, column in zip(names, zip(*timings, strict=True), strict=True)}


def _of(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(report: dict[str, Any]) -> str:
    """The report as a table, and what of the targets is met."""
    r, bare = report, report["bare"]["images_per_s"]
    lines = [
        f"{r['source']}: {r['measured']} of {r['photos']} photos, canvas {r['canvas']}, window_area "
        f"{tuple(r['window_area'])}, batches of {r['batch_size']}, {r['rounds']} rounds",
        f"bare loop on one core: {bare['median']:.0f} images/s ({bare['min']:.0f} to {bare['max']:.0f})",
        "",
        f"{'pipeline':<10}{'cores':>6}{'images/s':>10}{'of bare per core':>22}{'per CPU s':>11}"
        f"{'scaling':>22}{'s lost':>8}{'cores had':>11}",
    ]
    for name, counts in r["backends"].items():
        lines += [_line(name, n, row) for n, row in counts.items()]
    shown = ", ".join(f"{name} {_span(value)}" for name, value in r["cache"].items())
    lines += ["", f"data.cache, second pass on one core, of the bare loop: {shown}"]
    lines += ["s lost: seconds more for 1,000 images than the bare loop on as many cores would take"]
    needs = ", ".join(f"{value:.1f} at {name}" for name, value in r["cores_per_chip"].items())
    lines += [f"host cores per chip ({r['default']}, used by default): {needs}"]
    return "\n".join([*lines, *_targets(r)])


def _line(name: str, n: str, row: dict[str, Any]) -> str:
    scaling = "" if n == "1" else _span(row["scaling"])
    return (
        f"{name:<10}{n:>6}{row['images_per_s']['median']:>10.0f}{_span(row['ratio']):>22}"
        f"{row['cpu_ratio']['median']:>11.2f}{scaling:>22}{row['lost_s']['median']:>8.2f}"
        f"{row['had']['median']:>11.2f}"
    )


def _span(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _targets(r: dict[str, Any]) -> list[str]:
    rows = r["backends"][r["default"]]
    found = [("of the bare loop per core", rows["1"]["ratio"], r["targets"]["ratio"], True)]
    if "2" in rows:
        found.append(("from one core to two", rows["2"]["scaling"], r["targets"]["scaling"], False))
    quiet = r["bare"]["had"]["median"] >= _QUIET
    lines = [
        f"target {least} {what}: {_verdict(value['median'], least, quiet or ratio)} ({value['median']:.2f})"
        for what, value, least, ratio in found
    ]
    if not quiet:
        had = r["bare"]["had"]["median"]
        lines += [
            f"other programs ran too: the bare loop had {had:.2f} of its core",
            "only what is measured per core holds; run again on a quiet machine",
        ]
    return lines


def _verdict(value: float, least: float, certain: bool) -> str:
    return "met" if value >= least else "missed" if certain else "open"
