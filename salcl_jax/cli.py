"""What the programs share on the command line: flags with one-line errors, exit codes, a quiet start."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags, logging

from salcl_jax import config as config_lib
from salcl_jax import memory
from salcl_jax.peers import AGAIN
from salcl_jax.validation import validate

USER_ERROR = 2  # exit code: something to mend in the command, configuration or data
Parser = Callable[[list[str]], list[str]]  # `flags_parser` of `absl.app.run`


def parser(config: flags.FlagHolder, check: Callable[[], None]) -> Parser:
    """Flags parser: anything wrong with the command is one line and exit code 2.

    `check` looks at the other flags, after the configuration was validated, and raises `flags.Error`.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if len(rest) > 1:
                hint = "options look like --config.batch_size=64"
                raise flags.Error(f"unexpected argument {rest[1]!r}: {hint}")
            validate(config.value)
            check()
            return rest
        except Exception as error:  # absl, ml_collections and config files raise many kinds
            leave(_explain(error, argv))

    return parse


def plain_parser(needed: tuple[str, ...], check: Callable[[list[str]], None]) -> Parser:
    """The same for programs without a configuration: flags that must be given, then a look at the rest.

    `check` gets the arguments that are no flags and raises `flags.Error`.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            for name in needed:
                if not flags.FLAGS[name].value:
                    raise flags.Error(f"give --{name}")
            check(rest[1:])
            return rest
        except flags.Error as error:
            leave(str(error))

    return parse


def nothing_else(rest: list[str]) -> None:
    """Raise `flags.Error` where there are arguments that are no flags."""
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")


def writable(flag: str, path: str) -> None:
    """Raise `flags.Error` where a folder cannot be made at `path`; buckets are not looked at."""
    if path.startswith("~"):  # shells leave it alone behind `--flag=`
        raise flags.Error(f"--{flag}={path}: write the folder in full, such as {os.path.expanduser(path)}")
    above = os.path.abspath(path)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if "://" not in path and not (os.path.isdir(above) and os.access(above, os.W_OK)):
        raise flags.Error(f"--{flag}={path}: {above} is not a folder that can be written to")


def eval_folder(checkpoint: str) -> str:
    """Where the figures of a checkpoint go.

    'eval' in its workdir; FILE-eval beside a file of weights; on a bucket ./eval/BUCKET_NAME, as plots
    are written to disks only.
    """
    if "://" in checkpoint:
        return os.path.abspath(os.path.join("eval", checkpoint.split("://")[1].strip("/").replace("/", "_")))
    workdir = os.path.abspath(os.path.expanduser(checkpoint))
    if os.path.isfile(workdir):
        return f"{os.path.splitext(workdir)[0]}-eval"
    workdir = os.path.dirname(workdir) if os.path.basename(workdir).isdigit() else workdir
    workdir = os.path.dirname(workdir) if os.path.basename(workdir) == "checkpoints" else workdir
    return os.path.join(workdir, "eval")


def start(distributed: str, patience: int = 60) -> None:
    """Connect the processes and keep the libraries quiet; call it before anything else touches jax.

    patience: seconds of silence after which another process counts as gone.
    """
    memory.share_arenas()
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # decoding needs it not, and it prints
    from salcl_jax import sharding

    try:
        sharding.initialize_distributed(distributed, patience=patience)
    except ConnectionError as error:  # the others did not come; they may, the next time
        say(f"stopped: {' '.join(str(error).split())}")
        sys.exit(AGAIN)
    except (RuntimeError, ValueError) as error:  # no such platform, no such mode
        leave(str(error))


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def leave(text: str) -> NoReturn:
    """One line for the user, whatever was raised."""
    say(f"error: {' '.join(text.split())}")
    sys.exit(USER_ERROR)


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
