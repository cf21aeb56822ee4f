"""Judge a checkpoint: `python -m salcl_jax.evaluate --config=CONFIG --checkpoint=DIR --task=knn,linear`.

The network and its map are those recorded in the checkpoint; photos and protocols are the fields
`config.tasks` and `config.eval`. A file of weights (.pth, .safetensors, .npz) records nothing: its network is
`config.model`. Writes eval.json, eval.md and plots. Exit codes: 0 done, 2 something to mend in the command,
configuration or data, 75 another process is gone (start again).
"""

import os
import sys
import time
import traceback
from datetime import datetime
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from salcl_jax import cli, config_record, peers
from salcl_jax import config as config_lib
from salcl_jax.evaluators import TASKS
from salcl_jax.validation import validate, validate_task

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file[:variants]", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run, a STEP in it, or a file of weights")
_TASK = flags.DEFINE_list("task", "summary", f"summary (config.tasks.summary), or some of {', '.join(TASKS)}")
_OUT = flags.DEFINE_string("out", None, "folder of the results; WORKDIR/eval, or FILE-eval, if not given")
# Decided by the checkpoint, but for the command line; all that says how crops were chosen goes together.
RECORDED = ("seed", "model", "saliency", "roi", "pairs", "local", "weights", "crops")


def chosen_tasks(names: list[str], summary: tuple[str, ...]) -> list[str]:
    """The tasks to run, each once; raises `flags.Error` for one that does not exist."""
    found = [task for name in names for task in (summary if name == "summary" else (name,))]
    for name in found:
        if name not in TASKS:
            raise flags.Error(f"--task={name}: no such task; there are summary, {', '.join(TASKS)}")
    return list(dict.fromkeys(found))


def _check() -> None:
    if not _CHECKPOINT.value:
        raise flags.Error("give --checkpoint=DIR, the workdir of a run, or a file of weights")
    for task in chosen_tasks(_TASK.value, _CONFIG.value.tasks.summary):
        validate_task(_CONFIG.value, task)
    remote = "://" in _CHECKPOINT.value
    if remote and not _OUT.value:
        raise flags.Error(f"--checkpoint={_CHECKPOINT.value}: give --out=DIR, a local folder for the results")
    if not remote and not os.path.exists(os.path.expanduser(_CHECKPOINT.value)):
        raise flags.Error(f"--checkpoint={_CHECKPOINT.value}: no such folder or file")
    cli.writable("out", _OUT.value or cli.eval_folder(_CHECKPOINT.value))


def main(_: list[str]) -> None:
    """Run the tasks that the flags describe."""
    config = _CONFIG.value
    cli.start(config.distributed, config.distributed_timeout)
    overridden = config_flags.get_override_values(flags.FLAGS["config"])
    out = _OUT.value or cli.eval_folder(_CHECKPOINT.value)
    names = chosen_tasks(_TASK.value, config.tasks.summary)
    with peers.together():
        try:
            evaluate(config, _CHECKPOINT.value, names, out, overridden)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            peers.end_if_gone(error)
            cli.leave(f"{error} (traceback: {_keep_traceback(out)})")


def _keep_traceback(out: str) -> str:
    """Most errors are the data's or the command's and say what to do; for the others there is a file."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "traceback.txt")
    with open(path, "w", encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return path


def evaluate(
    config: Any, checkpoint: str, names: list[str], out: str, overridden: dict | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures {task: {trained, untrained, pixels: {name: value}}}, also written to the folder `out`.

    overridden: fields given explicitly, which the checkpoint's record does not replace. Raises ValueError
    and OSError with one line for what the user has to mend; nothing is computed before all data is open.
    """
    from salcl_jax import report, tasks

    began = time.monotonic()
    judge, subjects, step = _open(config, checkpoint, overridden or {})
    for name in names:
        tasks.about(name, judge)  # opens all photos: what lacks, lacks now
    meta = _meta(judge, subjects[0], checkpoint, step)
    files: list[str] = []
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        results[name] = {
            subject.name: tasks.run(name, judge, subject)
            for subject in subjects
            if subject.state is not None or name in tasks.PIXELS
        }
        if _is_main():
            print(f"\n{report.text_table({name: results[name]})}", flush=True)
        galleries = {}
        if name == "localization" and judge.config.tasks.localization.gallery:
            galleries["localization_gallery"] = tasks.gallery(judge, subjects[0])
        if _is_main():  # now: an error in a later task must not lose this one
            about = {name: tasks.about(name, judge)}
            seconds = {"seconds": round(time.monotonic() - began, 1)}
            files = report.write(out, {name: results[name]}, about, meta | seconds, galleries)
    if files:
        print("\n" + "\n".join(files), flush=True)
    return results


def _open(config: Any, checkpoint: str, overridden: dict) -> tuple:
    """The judge, what it judges, and the step of the checkpoint (None of a file of weights)."""
    import jax

    from salcl_jax import checkpoint as checkpoint_lib
    from salcl_jax import feature_cache, progress, sharding, train
    from salcl_jax.judge import Judge
    from salcl_jax.models.network import build
    from salcl_jax.train_step import make_init
    from salcl_jax.weights import files, incoming

    train.use_compilation_cache()
    mesh = sharding.make_mesh()
    config = config_lib.ConfigDict(config.to_dict())
    file = files.weights_file(checkpoint)
    recorded = {} if file else checkpoint_lib.load_extra(checkpoint).get("fields", {})
    config_record.recall(config, recorded, RECORDED, overridden)
    validate(config)
    network = build(**config.model)
    init = make_init(network, config_lib.finish(config, devices=1, images=1))
    whole = sharding.replicated(mesh)
    untrained = jax.jit(lambda: init()._replace(opt_state=()), out_shardings=whole)()
    shapes = checkpoint_lib.abstract_like(untrained, whole)
    if file:
        (trees, line), step = incoming.load(file, shapes, config.model), None
        if _is_main():
            print(line, flush=True)
    else:
        trees, step = checkpoint_lib.load_networks(checkpoint, shapes)
    trained = incoming.put(untrained, trees, jax.tree.map(lambda _: whole, untrained))
    cache = {"": feature_cache.user_folder("features"), "none": None}
    folder = cache.get(config.tasks.cache, config.tasks.cache)
    judge = Judge(network, config, mesh, folder, **({"watch": progress.watch} if _is_main() else {}))
    states = {"trained": trained, "untrained": untrained, "pixels": None}
    names = ("trained", *(name for name in states if name in config.tasks.baselines))
    return judge, [judge.subject(name, states[name]) for name in names], step


def _is_main() -> bool:
    import jax

    return jax.process_index() == 0


def _meta(judge: Any, subject: Any, checkpoint: str, step: int | None) -> dict[str, Any]:
    """What holds for all tasks; `subject` is the network that was trained."""
    import jax

    from salcl_jax import writer

    c = judge.config
    return {
        "checkpoint": checkpoint, "step": step, "branch": c.eval.branch,
        "network": f"{c.model.name}, width {c.model.width}, stem {c.model.stem}",
        "size": c.eval.size, "seed": c.seed, "weights": subject.digest[:16],
        "hardware": f"{judge.mesh.size} x {jax.devices()[0].device_kind}", "versions": writer.versions(),
        "command": " ".join(["python -m", _program(), *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def _program() -> str:
    """The module that was started: this one, or one that judges what it trained."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec and spec.name.startswith("salcl_jax.") else "salcl_jax.evaluate"


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parser(_CONFIG, _check))
