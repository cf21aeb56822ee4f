"""A run from its start to its end: sources, state, workdir, and the loop between (`loop.py`)."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from salcl_jax import checkpoint, config_record, peers, sharding
from salcl_jax import config as config_lib
from salcl_jax.data.sources import Source, open_source
from salcl_jax.feature_cache import user_folder
from salcl_jax.loop import FAILED, Run, Stopped, new_history
from salcl_jax.models.network import Network, build, parameter_table
from salcl_jax.skipped import Skipped
from salcl_jax.termination import watch_for_termination
from salcl_jax.train_step import make_init
from salcl_jax.types import TrainState
from salcl_jax.validation import validate
from salcl_jax.weights import files, incoming
from salcl_jax.workdir import alone, check_nothing_lost
from salcl_jax.writer import Writer

PROBE_NEEDS = {"image": "labels", "object": "boxes"}


def train(config: Any, workdir: str) -> dict:
    """Run, or continue, the training that a validated configuration describes; returns the summary.

    Only the main process gets the summary, the others an empty one. Raises `ConfigError` for what the user
    has to mend, and `Stopped` when told to terminate (after saving), when the loss is not finite, when too
    many images cannot be read and when the workdir cannot be written to.
    """
    mesh = sharding.make_mesh()
    validate(config, devices=mesh.size)
    with _user_errors():
        sources = open_sources(config)
    config = config_lib.finish(config, devices=mesh.size, images=len(sources["train"]))
    network = build(**config.model)
    main = jax.process_index() == 0
    use_compilation_cache()
    # Told until all is closed: neither the last write nor a tracker's is cut short.
    with watch_for_termination() as told, _alone(workdir, main), _checkpointer(config, workdir) as saved:
        with _user_errors():
            state, history, start = _restore_or_init(config, network, mesh, saved)
            again = start == 0 and check_nothing_lost(workdir, config.resolved.checkpoint_every)
        if main and again:
            print(f"{workdir}: ended before its first checkpoint was complete; begins again", flush=True)
        if main and start == 0:
            print(_describe(config, state), flush=True)
        with (
            Skipped(workdir, process=jax.process_index(), resume=start > 0) as skipped,
            _writer(config, workdir, main, start, history["owed"]) as writer,
        ):
            sources = {name: skipped.watch(source) for name, source in sources.items()}
            writer.config(config.to_dict())
            with _user_errors():
                run = Run(config, network, mesh, sources, saved, writer, skipped, history, start, told)
            summary = run.loop(state)
            writer.summary(summary)
    return summary if main else {}


@contextlib.contextmanager
def _alone(workdir: str, main: bool) -> Iterator[None]:
    """Inside, no other run is in the workdir, and what cannot be written there ends this one with a line."""
    with contextlib.ExitStack() as stack:
        if main:
            with _user_errors():
                stack.enter_context(alone(workdir))
        try:
            yield
        except OSError as error:
            raise Stopped(
                f"{' '.join(str(error).split())}: make room or mend {workdir}, then start the same "
                "command again; it continues from the last complete checkpoint there", FAILED,
            ) from error  # fmt: skip


def open_sources(config: Any) -> dict[str, Source]:
    """Training source and those evaluation sources that the configuration names.

    The pretext evaluation falls back on the training images, and a data_dir that is not given on that of
    the training source.
    """
    sources = {"train": open_source(config.data.train.to_dict())}
    for name in ("pretext", "localization", "probe_train", "probe_test"):
        spec = config.eval[name].to_dict()
        if spec["kind"] != "none":
            spec["data_dir"] = spec["data_dir"] or config.data.train.data_dir
            sources[name] = open_source(spec)
    sources.setdefault("pretext", sources["train"])
    _check_annotations(config, sources)
    return sources


def _check_annotations(config: Any, sources: dict[str, Source]) -> None:
    """Raise ValueError where a source lacks the boxes or labels that it is asked for."""
    wanted = {"localization": "boxes"}
    wanted |= dict.fromkeys(("probe_train", "probe_test"), PROBE_NEEDS[config.eval.probe_on])
    if config.roi.source == "ground_truth":
        wanted |= dict.fromkeys(("train", "pretext"), "boxes")
    for name, what in wanted.items():
        if name in sources and not getattr(sources[name], f"has_{what}"):
            raise ValueError(f"{name}: {sources[name].name} has no {what}; name a source that has")
    if "probe_train" in sources:
        first, second = sources["probe_train"].class_names, sources["probe_test"].class_names
        if any(a != b for a, b in zip(first, second, strict=False)):
            raise ValueError("eval.probe_train and eval.probe_test number their classes differently")


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Inside, what is wrong lies with files and settings: a line for the user instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        peers.end_if_gone(error)
        raise config_lib.ConfigError(str(error)) from error


def _restore_or_init(
    config: Any, network: Network, mesh: jax.sharding.Mesh, saved: checkpoint.Checkpointer
) -> tuple[TrainState, dict, int]:
    """State, history and step to start from: own checkpoint, else the weights of `init_from`, else scratch.

    An own checkpoint whose configuration would learn something else is refused.
    """
    init = make_init(network, config)
    shapes = jax.eval_shape(init)
    places = sharding.state_sharding(shapes, mesh, **config.sharding)
    restored = saved.restore(checkpoint.abstract_like(shapes, places))
    fields = config_record.learnt_fields(config)
    if restored:
        state, extra, step = restored
        changed = config_record.differences(extra.get("fields", {}), fields)
        if changed:
            raise config_lib.ConfigError(
                f"{saved.directory} holds a run with other settings ({'; '.join(changed[:4])}): use "
                "another --workdir, or start from its weights with --config.init_from"
            )
        return state, new_history() | extra["history"], step
    state = jax.jit(init, out_shardings=places)()
    if config.init_from:
        state = incoming.put(state, _weights(config, shapes), places)
    return state, new_history(), 0


def _weights(config: Any, shapes: TrainState) -> dict:
    """Networks of `init_from`: another run's, or those of a file."""
    file = files.weights_file(config.init_from)
    if file is None:
        return checkpoint.load_params(config.init_from, shapes)
    found = incoming.load(file, shapes, config.model)
    if jax.process_index() == 0:
        print(found.line, flush=True)
    return found.trees


def _checkpointer(config: Any, workdir: str) -> checkpoint.Checkpointer:
    c, r = config.checkpoint, config.resolved
    return checkpoint.Checkpointer(
        os.path.join(workdir, "checkpoints"), every_steps=r.checkpoint_every, keep=c.keep,
        keep_every=r.keep_every, asynchronous=c.asynchronous,
    )  # fmt: skip


def _writer(config: Any, workdir: str, main: bool, start: int, again: bool) -> Writer:
    c = config.log
    return Writer(
        workdir, tensorboard=c.tensorboard, trackers=c.trackers, is_main=main, resume_step=start, again=again
    )


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, where JAX_COMPILATION_CACHE_DIR or the user's cache says."""
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_folder("compiled")
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones add up


def _describe(config: Any, state: TrainState) -> str:
    return f"{config}\n{parameter_table(state.params)}"
