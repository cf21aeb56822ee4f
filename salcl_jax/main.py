"""Train: `python -m salcl_jax.main --config=configs/coco.py --workdir=DIR [--config.field=value ...]`.

Exit codes: 0 done, 2 something to mend in the command, configuration or data, 70 the run failed (its last
good state is saved), 75 told to terminate (saved; the same command continues).
"""

import os
import re
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from salcl_jax import config as config_lib
from salcl_jax import validation
from salcl_jax.evaluators import HEADLINES

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; an interrupted run in it continues")
USER_ERROR = 2


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; anything wrong with it is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: options look like --config.batch_size=64")
        validation.validate(_CONFIG.value)
        _check_workdir(_WORKDIR.value)
        return rest
    except Exception as error:  # absl, ml_collections and config files raise many kinds
        _leave(_explain(error, argv))


def _check_workdir(path: str | None) -> None:
    if not path:
        raise flags.Error("give --workdir=DIR, the folder of the run")
    above = os.path.abspath(path)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if "://" not in path and not (os.path.isdir(above) and os.access(above, os.W_OK)):
        raise flags.Error(f"--workdir={path}: {above} is not a folder that can be written to")


def _explain(error: Exception, argv: list[str]) -> str:
    """What is wrong, without what absl and ml_collections wrap around it."""
    text = str(error).replace("\\n", " ").replace("\\", "")  # a KeyError quotes its words
    given = [arg.lstrip("-").partition("=")[::2] for arg in argv]
    follows = dict(zip((name for name, _ in given), [*argv[1:], ""], strict=True))
    file = (dict(given).get("config") or follows.get("config", "")).split(":")[0]
    if not file:
        return "give --config=configs/NAME.py, before its fields"
    if not os.path.isfile(file):
        return (
            f"--config={file}: no such file from {os.getcwd()}; run in the root of the repository, or "
            "give the file's full path"
        )
    if "Traceback (most recent call last)" in text:  # raised by the config file; the last line says what
        cause = text.strip().splitlines()[-1]
        return f"--config={file}: {cause.removeprefix('salcl_jax.config.ConfigError: ')}"
    if isinstance(error, (flags.Error, config_lib.ConfigError)):
        return text
    field = re.search(r"\.(\w+) does not exist", text) or re.search(r"'(\w+)'", text)
    for name, _ in given:
        if field and name.startswith("config.") and field[1] in name.split("."):
            close = re.search(r'Did you mean "(\w+)"', text)
            return f"--{name}: no such field" + (f"; did you mean {close[1]}?" if close else "")
    return f"--config={file}: {type(error).__name__}: {text}"


def main(_: list[str]) -> None:
    """Run the training that the flags describe."""
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # decoding needs it not, and it prints
    from salcl_jax import sharding, train

    try:
        sharding.initialize_distributed(_CONFIG.value.distributed)
    except (RuntimeError, ValueError) as error:  # no such platform, or the others did not come
        _leave(str(error))
    try:
        summary = train.train(_CONFIG.value, _WORKDIR.value)
    except train.Stopped as stop:
        _print(f"stopped: {stop}")
        sys.exit(stop.code)
    except config_lib.ConfigError as error:
        _leave(str(error))
    if summary:
        print_table(summary, _WORKDIR.value)


def print_table(summary: dict, workdir: str) -> None:
    """The run's main figures beside those of the untrained network, and where the pictures are."""
    final, untrained = summary["final"], summary["untrained"]
    names = [name for name in HEADLINES if name in final]
    width = max(len(name) for name in names)
    print(f"\n{'':{width}}  {'final':>9}  {'untrained':>9}")
    for name in names:
        print(f"{name:{width}}  {final[name]:9.3f}  {untrained.get(name, float('nan')):9.3f}")
    print(
        f"\n{summary['steps']} steps, {summary['images']} images, {summary['images_per_second']:.0f} "
        f"images/s on {summary['devices']}, {summary['seconds']:.0f} s"
    )
    print(f"pictures: {os.path.join(workdir, 'panels')}", flush=True)
    print(f"all figures: {os.path.join(workdir, 'summary.json')}", flush=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(text: str) -> NoReturn:
    """One line for the user, whatever was raised."""
    _print(f"error: {' '.join(text.split())}")
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
