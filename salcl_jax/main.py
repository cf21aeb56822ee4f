"""Train: `python -m salcl_jax.main --config=configs/coco.py --workdir=DIR [--config.field=value ...]`.

Exit codes: 0 done, 2 something to mend in the command, configuration or data, 70 the run failed (its last
good state is saved), 75 told to terminate (saved; the same command continues).
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from salcl_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; an interrupted run in it continues")
USER_ERROR = 2


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; anything wrong with it is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: options look like --config.batch_size=64")
        if not flags.FLAGS["config"].present:
            raise flags.Error("give --config=configs/NAME.py")
        if not _WORKDIR.value:
            raise flags.Error("give --workdir=DIR, the folder of the run")
        _check_file(flags.FLAGS["config"].config_filename)
        config_lib.validate(_CONFIG.value)
        return rest
    except Exception as error:  # absl, ml_collections and config files raise many kinds
        _leave(error)


def _check_file(name: str) -> None:
    path = name.split(":")[0]
    if not os.path.exists(path):
        raise config_lib.ConfigError(
            f"--config={path}: no such file from {os.getcwd()}; run in the root of the repository, "
            "or give the file's full path"
        )


def main(_: list[str]) -> None:
    """Run the training that the flags describe."""
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from salcl_jax import sharding, train

    try:
        sharding.initialize_distributed(_CONFIG.value.distributed)
        summary = train.train(_CONFIG.value, _WORKDIR.value)
    except train.Stopped as stop:
        _print(f"stopped: {stop}")
        sys.exit(stop.code)
    except (ValueError, FileNotFoundError) as error:
        _leave(error)
    print_table(summary, _WORKDIR.value)


def print_table(summary: dict, workdir: str) -> None:
    """The run's figures beside those of the untrained network, and where the pictures are."""
    final, untrained = summary["final"], summary["untrained"]
    width = max(len(name) for name in final)
    print(f"\n{'':{width}}  {'final':>9}  {'untrained':>9}")
    for name, value in final.items():
        print(f"{name:{width}}  {value:9.3f}  {untrained.get(name, float('nan')):9.3f}")
    print(
        f"\n{summary['steps']} steps, {summary['images']} images, {summary['images_per_second']:.0f} "
        f"images/s on {summary['devices']}, {summary['seconds']:.0f} s"
    )
    print(f"pictures: {os.path.join(workdir, 'panels')}", flush=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(error: Exception) -> None:
    """One line for the user, whatever was raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    _print(f"error: {text}")
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
