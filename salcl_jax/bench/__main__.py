"""Measure: `python -m salcl_jax.bench --what=input|step --config=configs/coco.py [--out=FILE.json]`.

input: images/s of the real pipeline against bare decoding. step: images/s, milliseconds and share of the
chip's peak of the training step and of its parts, with and without guidance, on random canvases. Prints a
table; the file has all figures. Exit codes: 0 done, 2 something to mend in the command, configuration or
data.
"""

import os
import sys
from datetime import datetime
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from salcl_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_WHAT = flags.DEFINE_string("what", None, "input, step, or first: a fresh process up to its first step")
_OUT = flags.DEFINE_string("out", None, "JSON file with the figures; '' writes none")
_BATCHES = flags.DEFINE_list("batches", [], "step: batch sizes (over all devices) to choose the fastest of")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "step: times that everything is measured, in turns")
_PARTS = flags.DEFINE_bool("parts", True, "step: also the parts; each is one more program to compile")
_CACHE = flags.DEFINE_bool("cache", False, "step: also the first step after a restart")
KINDS = ("input", "step", "first")


def _check() -> None:
    if _WHAT.value not in KINDS:
        raise flags.Error(f"--what={_WHAT.value or ''}: give one of {', '.join(KINDS)}")
    for size in _BATCHES.value:
        if not size.strip().isdigit() or int(size) < 2:
            raise flags.Error(f"--batches={','.join(_BATCHES.value)}: give sizes from 2, such as 64,128")
    if _ROUNDS.value < 1:
        raise flags.Error(f"--rounds={_ROUNDS.value}: must be at least 1")
    if _OUT.value:
        cli.writable("out", os.path.dirname(os.path.abspath(_OUT.value)))


def main(_: list[str]) -> None:
    """Measure what the flags ask for."""
    config = _CONFIG.value
    restart = None
    if _WHAT.value == "step" and _CACHE.value:  # first: later the devices are this process's own
        from salcl_jax.bench import restart as restarts

        try:
            restart = restarts.run(sys.argv[1:])
        except RuntimeError as error:
            cli.leave(str(error))
    cli.start(config.distributed)
    try:
        report, text = _measure(config, restart)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        cli.leave(str(error))
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)
        if _OUT.value:
            _write(report)


def _measure(config: Any, restart: dict | None) -> tuple[dict, str]:
    """The report and how it is printed."""
    if _WHAT.value == "input":
        from salcl_jax.bench import inputs

        report = inputs.run(config)
        return report, inputs.text(report)
    if _WHAT.value == "first":
        from salcl_jax.bench import restart as restarts

        report = restarts.first_step(config)
        return report, restarts.line(report)
    from salcl_jax.bench import steps

    sizes = [int(size) for size in _BATCHES.value]
    report = steps.run(config, batches=sizes, rounds=_ROUNDS.value, parts=_PARTS.value)
    if restart:
        report["restart"] = restart
    return report, steps.text(report)


def _write(report: dict) -> None:
    import jax

    from salcl_jax import writer

    meta = {
        "what": _WHAT.value,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} host cores",
        "versions": writer.versions(),
        "command": " ".join(["python -m salcl_jax.bench", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    writer.write_json(_OUT.value, meta | report)
    print(f"all figures: {_OUT.value}", flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parser(_CONFIG, _check))
