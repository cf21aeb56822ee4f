"""Hand weights on: `python -m salcl_jax.export --checkpoint=DIR --to=torchvision --out=resnet50.pth`.

Destinations: torchvision, huggingface (a folder), detectron2 and mmdet (with the fields that belong to the
weights), timm, npz. A model card is written beside the weights. Exit codes: 0 done, 2 something to mend in
the command or the checkpoint.
"""

import os

from absl import app, flags, logging

from salcl_jax import cli

DESTINATIONS = ("torchvision", "huggingface", "detectron2", "mmdet", "timm", "npz")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run, or one STEP of its checkpoints")
_TO = flags.DEFINE_enum("to", None, DESTINATIONS, "whose names and files")
_OUT = flags.DEFINE_string("out", None, "file to write, or folder with --to=huggingface")
_BRANCH = flags.DEFINE_enum("branch", "online", ("online", "target"), "which of the two networks")
_HEADS = flags.DEFINE_bool("heads", False, "also write projector and (online) predictor")
_SIZE = flags.DEFINE_integer("size", 0, "side of images in pixels that settings and a ViT's positions are "
                             "for; 0: that of the training crops", lower_bound=0)  # fmt: skip


def main(_: list[str]) -> None:
    """Export what the flags describe."""
    logging.set_verbosity(logging.ERROR)
    _leave_the_accelerator()
    from salcl_jax.weights import outgoing

    try:
        run = outgoing.open_run(_CHECKPOINT.value)
        written = outgoing.export(
            run, _TO.value, _OUT.value, branch=_BRANCH.value, heads=_HEADS.value,
            size=_SIZE.value, figures=os.path.join(cli.eval_folder(_CHECKPOINT.value), "eval.json"),
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        cli.leave(str(error))
    print("\n".join(map(str, written)), flush=True)


def _leave_the_accelerator() -> None:
    """Nothing is computed: a run that goes on keeps its device to itself."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _check(rest: list[str]) -> None:
    cli.nothing_else(rest)
    folder = os.path.expanduser(_CHECKPOINT.value)
    if "://" not in folder and not os.path.isdir(folder):
        raise flags.Error(f"--checkpoint={folder}: no such folder; give the workdir of a run")
    cli.writable("out", os.path.dirname(os.path.abspath(os.path.expanduser(_OUT.value))))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.plain_parser(("checkpoint", "to", "out"), _check))
