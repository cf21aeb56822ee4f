"""What the loop saves and says when something fails or ends it between two steps.

The step, the evaluations and the pictures are stand-ins, so that the moment of a fault is exact; checkpoints,
metrics and signals are real.
"""

import contextlib
import os
import signal

import numpy as np
import pytest
from runs import metrics, newest, summary
from test_checkpoint import make_state
from test_faults_data import made
from test_faults_storage import full_disk

from configs import folder
from salcl_jax import checkpoint, loop, progress, sharding, train
from salcl_jax.evaluators import online
from salcl_jax.models.network import build

pytestmark = pytest.mark.fault
FIELDS = {
    "total_steps": 12, "batch_size": 8, "checkpoint.every": 5 / 12, "eval.every": 0.25, "log.panels": 0.25,
    "log.every": 1, "log.tensorboard": False,
}  # fmt: skip
SPOILT = 1000.0  # a batch of it had as many photos passed over as were used


def standing_in(state, batch):
    """A step: every parameter moves, the figures are those of a healthy one."""
    kernel = state.params["encoder"]["kernel"] + batch["image"].mean()
    params = state.params | {"encoder": state.params["encoder"] | {"kernel": kernel}}
    figures = {"finite": 1.0, "loss": kernel[1, 1], "grad_norm": 1.0, "spread": 1.0}
    figures |= {"skipped": batch["image"].max() // SPOILT * 8}
    return state._replace(step=state.step + 1, params=params), figures


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Function (events, workdir='run', **fields) that trains 12 steps: an evaluation every 3, a save every 5.

    events: what happens at a moment, {('batch' | 'pretext' | 'probe' | 'draw', step): function}; a
    step's 'batch' happens when it is asked for.
    """
    events = {}

    def happen(what, step):
        return events.get((what, int(step)), lambda: None)()

    def batches(config, source, start):
        for step in range(start + 1, 100):
            value = happen("batch", step) or step
            yield {"image": np.full((8, 2), value, np.float32)}

    def evaluations(*_):
        def part(name):
            return lambda state: happen(name, state.step) or {f"{name}/loss": float(state.step)}

        return [part("pretext"), part("probe")]

    def panel(*_):
        return lambda state: happen("draw", state.step) or np.zeros((2, 2, 3), np.uint8)

    def train_it(given, workdir="run", **fields):
        events.clear()
        events.update(given)
        config = folder.get_config("smoke")
        config.update_from_flattened_dict(FIELDS | {k.replace("__", "."): v for k, v in fields.items()})
        return train.train(config, str(tmp_path / workdir))

    monkeypatch.setattr(loop, "host_batches", batches)
    monkeypatch.setattr(loop.online, "make_evaluations", evaluations)
    monkeypatch.setattr(loop, "make_panel", panel)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: standing_in)
    monkeypatch.setattr(loop.sharding, "prefetch_to_device", lambda found, mesh: (one for one in found))
    for module in (loop, train):
        monkeypatch.setattr(module, "make_init", lambda *_: lambda: make_state(0))
    monkeypatch.setattr(train, "open_sources", lambda config: {"train": made(64), "pretext": made(64)})
    for name in ("validate", "use_compilation_cache"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    return train_it


class Killed(BaseException):
    """The end of the process, as far as the run can tell: nothing is saved."""


def kill():
    raise Killed


def tell():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def told():
    """SIGTERMs that reached what was there before the run: one ends a process."""
    found, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: found.append(1))
    yield found
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stopped(code, match):
    with pytest.raises(loop.Stopped, match=match) as caught:
        yield
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_told_between_two_evaluations(run, tmp_path, straight):
    with stopped(75, "saved step 7; start again"):
        run({("batch", 7): tell})
    assert newest(tmp_path / "run") == 7 and newest(straight) == 12
    assert run({})["final"] == summary(straight)["final"] == {"pretext/loss": 12.0, "probe/loss": 12.0}
    check_equal(tmp_path / "run", straight)


@pytest.fixture
def straight(run, tmp_path_factory):
    """Workdir of a run that nothing happened to; made once."""
    workdir = tmp_path_factory.getbasetemp() / "straight"
    if not workdir.exists():
        run({}, workdir)
    return workdir


def check_equal(one, other):
    """The last parameters, and each line once with the same figures."""
    np.testing.assert_equal(checkpoint.load_params(str(one)), checkpoint.load_params(str(other)))
    for kind, name in (("train", "train/loss"), ("eval", "eval/pretext/loss"), ("eval", "eval/probe/loss")):
        found, expected = ({s: row[name] for s, row in metrics(w, kind).items()} for w in (one, other))
        assert found == expected and found


def test_a_last_save_that_fails_is_not_told_as_saved(run, tmp_path, told):
    with contextlib.ExitStack() as stack:

        def tell_on_a_full_disk():
            stack.enter_context(full_disk(8000))
            tell()

        with stopped(70, "could not be written.*make room"):
            run({("batch", 7): tell_on_a_full_disk}, checkpoint__every=1.0)
    assert newest(tmp_path / "run") == 1 and not told


def test_sigterm_again_while_the_last_write_is_under_way(run, tmp_path, told, monkeypatch):
    """Slurm sends it from two places: whatever is being closed then is closed."""
    closing = checkpoint.Checkpointer.close

    def close(saved):
        tell()
        closing(saved)
        tell()

    monkeypatch.setattr(checkpoint.Checkpointer, "close", close)
    with stopped(75, "saved step 7"):
        run({("batch", 7): tell})
    assert newest(tmp_path / "run") == 7 and not told


def mean_loss(workdir):
    return np.mean([line["train/loss"] for line in metrics(workdir).values()])


def vanish():
    raise OSError("photos: [Errno 5] Input/output error:\n  nothing there")


@pytest.mark.parametrize("step", [1, 2, 8])
def test_photos_that_vanish_while_training(run, tmp_path, straight, fault_table, step):
    """The step before is saved, whose figures had not been read yet; with photos again the run goes on."""
    with stopped(70, "photos.*nothing there: mend that and start the same command"):
        run({("batch", step): vanish}, log__every=100)
    assert (tmp_path / "run" / "checkpoints" / str(step - 1)).exists() == (step > 1)
    run({}, log__every=12)
    assert metrics(tmp_path / "run")[12]["train/loss"] == pytest.approx(mean_loss(straight))
    fault_table("storage of the photos goes away", "the last step is saved; continues once it is back", 0, 70)


@pytest.mark.parametrize("step", [6, 12])
def test_too_many_broken_photos_where_the_run_is_evaluated(run, tmp_path, step):
    """What is due at that step is done before the run stops: the next start does not come back to it."""
    with stopped(70, "could not be read.*max_skipped"):
        run({("batch", step): lambda: SPOILT}, data__max_skipped=0.01)
    assert newest(tmp_path / "run") == step and list(metrics(tmp_path / "run", "eval"))[-1] == step
    figures = run({}, data__max_skipped=0.5)
    assert figures["final"] == {"pretext/loss": 12.0, "probe/loss": 12.0} and figures["skipped"] == 8
    assert list(metrics(tmp_path / "run", "eval")) == [0, 3, 6, 9, 12]


def test_a_table_without_figures(capsys):
    progress.print_table(dict.fromkeys(("final", "untrained"), {}) | dict.fromkeys(("steps", "images"), 1)
                     | {"images_per_second": 1.0, "seconds": 1.0, "devices": "1 x cpu"}, "run")  # fmt: skip
    assert "1 steps, 1 images" in capsys.readouterr().out


@pytest.mark.parametrize("what, step", [("pretext", 0), ("probe", 3), ("draw", 6), ("probe", 12)])
def test_photos_of_an_evaluation_that_vanish(run, tmp_path, straight, what, step, fault_table):
    """The step is saved before it is looked at; the next start looks at it, and once only, even if killed."""
    with stopped(70, "photos.*nothing there: mend that and start the same command"):
        run({(what, step): vanish})
    steps = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert max(steps, default=0) == step
    with pytest.raises(Killed):
        run({("batch", step + 2): kill, ("draw", 12): kill})
    assert run({})["final"] == {"pretext/loss": 12.0, "probe/loss": 12.0}
    check_equal(tmp_path / "run", straight)
    fault_table("photos of an evaluation go away", "that step is saved; evaluated by the next start", 0, 70)


@pytest.mark.parametrize(
    "what, step, saved",
    [("pretext", 0, 0), ("draw", 0, 1), ("batch", 3, 3), ("pretext", 6, 6), ("probe", 12, 12)],
)
def test_told_before_or_while_a_step_is_looked_at(run, tmp_path, straight, what, step, saved, told):
    """What has not begun is left to the next start."""
    seen = []
    after = {("probe", step): lambda: seen.append(1)} if what == "pretext" else {}
    with stopped(75, f"saved step {saved};" if saved else "no step to save yet"):
        run({(what, step): tell, **after})
    assert not seen and not told
    assert run({})["final"] == {"pretext/loss": 12.0, "probe/loss": 12.0}
    check_equal(tmp_path / "run", straight)


def test_the_held_out_loss_passes_over_batches_without_a_photo(monkeypatch):
    def batch(*good):
        return {"image": np.arange(8.0), "aspect": np.ones(8), "mask": np.isin(np.arange(8), good)}

    found = []
    config = folder.get_config("smoke")
    config.update_from_flattened_dict(FIELDS)
    monkeypatch.setattr(online, "make_eval_step", lambda *_: lambda state, x: dict.fromkeys(
        ("loss", "spread"), float(x["image"].mean())))  # fmt: skip
    monkeypatch.setattr(online.frozen, "on_devices", lambda function, mesh: function)
    monkeypatch.setattr(online.frozen, "batches", lambda *_, **__: found)
    evaluate = online._pretext(build(**config.model), config, sharding.make_mesh(), made(64))
    found[:] = batch(), batch(*range(8)), batch(2, 3, 4, 5), batch(7)
    assert evaluate(make_state())["pretext/loss"] == 3.5
    found[:] = batch(), batch()
    with pytest.raises(ValueError, match="eval.pretext: made: no photo can be used; check"):
        evaluate(make_state())
