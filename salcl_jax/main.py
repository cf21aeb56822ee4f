"""Train: `python -m salcl_jax.main --config=configs/coco.py --workdir=DIR [--config.field=value ...]`.

Exit codes: 0 done, 2 something to mend in the command, configuration or data, 70 the run failed (its last
good state is saved), 75 told to terminate (saved) or another process of the run is gone; after 75 the same
command continues from the last checkpoint.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from salcl_jax import cli, peers, progress, trackers
from salcl_jax.config import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; an interrupted run in it continues")


def _check() -> None:
    if not _WORKDIR.value:
        raise flags.Error("give --workdir=DIR, the folder of the run")
    cli.writable("workdir", _WORKDIR.value)
    try:
        trackers.check(_CONFIG.value.log.trackers)
    except ValueError as error:
        raise flags.Error(str(error)) from error


def main(_: list[str]) -> None:
    """Run the training that the flags describe."""
    cli.start(_CONFIG.value.distributed, _CONFIG.value.distributed_timeout)
    from salcl_jax import train

    with peers.together():
        try:
            summary = train.train(_CONFIG.value, _WORKDIR.value)
        except train.Stopped as stop:
            cli.say(f"stopped: {stop}")
            sys.exit(stop.code)
        except ConfigError as error:
            cli.leave(str(error))
    if summary:
        progress.print_table(summary, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parser(_CONFIG, _check))
