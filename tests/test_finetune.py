"""Fine-tuning against torch's SGD, numpy and counting by hand; the choice of a setting against leaks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import finetune, sharding
from salcl_jax.finetune import Recipe
from salcl_jax.models.network import Network
from salcl_jax.models.norm import ViewBatchNorm
from salcl_jax.ops.augment import IMAGENET_MEAN, IMAGENET_STD

SIDE, BATCH, CLASSES = 16, 8, 3
TINY = Recipe(
    lr=3.2, head_multiplier=2.0, weight_decay=1e-4, epochs=2, milestones=(1,), batch_size=BATCH, size=SIDE
)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


class Stub(nn.Module):
    """Two strided convolutions with BatchNorm in place of a ResNet."""

    @nn.compact
    def __call__(self, x, *, views, train):
        for layer, (width, side) in enumerate(((6, 4), (8, 2))):
            x = nn.Conv(width, (side, side), (side, side), use_bias=False, name=f"conv{layer}")(x)
            x = nn.relu(ViewBatchNorm(name=f"norm{layer}")(x, views, train))
        return {"pooled": x.mean((1, 2))}


NETWORK = Network(Stub(), Stub(), Stub())  # the heads are not used


@pytest.fixture(scope="module")
def trees():
    """(params, batch_stats) of an untrained branch, numpy."""
    image = jnp.zeros((1, SIDE, SIDE, 3))
    variables = jax.jit(lambda key: Stub().init(key, image, views=1, train=False))(jax.random.key(0))
    variables = jax.device_get(variables)
    return tuple({"encoder": variables[name], "projector": {}} for name in ("params", "batch_stats"))


def coloured(n, seed=0):
    """Photos of noise about the colour of their class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    noise = rng.integers(-50, 50, (n, SIDE, SIDE, 3))
    image = (COLOURS[label][:, None, None] + noise).astype(np.uint8)
    aspect = rng.uniform(0.7, 1.5, n).astype(np.float32)
    return {"image": image, "aspect": aspect, "label": label, "mask": np.ones(n, bool)}


def noise(n, seed):
    """Photos whose labels have nothing to do with them."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
    return coloured(n, seed) | {"image": image, "label": rng.integers(0, CLASSES, n).astype(np.int32)}


def rows_of(data, rows):
    return {name: value[rows] for name, value in data.items()}


def draws(data):
    """Function step -> BATCH rows of the data, drawn with a seed of their own."""
    n = len(data["label"])
    return lambda step: rows_of(data, np.random.default_rng(step).permutation(n)[np.arange(BATCH) % n])


def batched(data, size=BATCH):
    """Function () -> batches of `size`, the last one padded with photos and labels that must not count."""

    def batches():
        n = len(data["label"])
        for start in range(0, n, size):
            rows = np.arange(start, start + size)
            yield rows_of(data, rows % n) | {"mask": data["mask"][rows % n] & (rows < n)}

    return batches


def run(trees, train, test, recipe=TINY, devices=1, **kwargs):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    kwargs = {"num_classes": CLASSES, "steps_per_epoch": 3} | kwargs
    draw = train if callable(train) else draws(train)
    test = test if callable(test) else batched(test)
    return finetune.run(NETWORK, *trees, draw, test, recipe, mesh=mesh, **kwargs)


# One step.


def compiled_step(recipe):
    return jax.jit(finetune.make_step(NETWORK, recipe), compiler_options=FAST)


def start(trees, recipe, num_classes=CLASSES):
    return finetune.make_init(NETWORK, recipe, num_classes)(*jax.tree.map(jnp.asarray, trees))


def leaves_of(batch):
    return {name: jnp.asarray(batch[name]) for name in ("image", "aspect", "label")}


def test_steps_are_those_of_torch_with_two_parameter_groups(trees):
    """Momentum without Nesterov, coupled decay of every parameter, lr x multiplier, falls at milestones."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    recipe = TINY._replace(
        lr=16.0, weight_decay=0.05, milestones=(1, 3), head_multiplier=5.0, area=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    batches = []
    for seed in range(4):  # mirror images of themselves, whole: neither flip nor crop matters
        batch = noise(BATCH, seed) | {"aspect": np.ones(BATCH, np.float32)}
        batches.append(batch | {"image": np.maximum(batch["image"], batch["image"][:, :, ::-1])})
    state, step = start(trees, recipe), compiled_step(recipe)

    def tensor(x):
        return torch.nn.Parameter(torch.tensor(np.array(x)))

    first = jax.device_get(state.params)
    encoder = {f"{m}/{n}": tensor(x) for m, part in first["encoder"].items() for n, x in part.items()}
    head = {name: tensor(x) for name, x in first["classifier"].items()}
    running = {i: (torch.zeros(width), torch.ones(width)) for i, width in ((0, 6), (1, 8))}
    rate = 16.0 * BATCH / 256
    optimizer = torch.optim.SGD(
        [{"params": encoder.values(), "lr": rate}, {"params": head.values(), "lr": 5.0 * rate}],
        momentum=0.9, weight_decay=0.05,
    )  # fmt: skip
    fall = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.2)
    for number, batch in enumerate(batches):
        state, measured = step(state, leaves_of(batch), finetune.learning_rates(recipe, number, 1))
        x = (batch["image"].astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        x = torch.tensor(x.astype(np.float32)).permute(0, 3, 1, 2)
        for i, stride in ((0, 4), (1, 2)):
            x = functional.conv2d(x, encoder[f"conv{i}/kernel"].permute(3, 2, 0, 1), stride=stride)
            scale, bias = encoder[f"norm{i}/scale"], encoder[f"norm{i}/bias"]
            x = functional.relu(functional.batch_norm(x, *running[i], scale, bias, training=True))
        logits = x.mean((2, 3)) @ head["kernel"] + head["bias"]
        label = torch.tensor(batch["label"]).long()
        loss = functional.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
        assert float(measured["loss"]) == pytest.approx(loss.item(), rel=1e-3)
        assert float(measured["top1"]) == float((logits.argmax(1) == label).float().mean())
    last = jax.device_get(state)
    for name, value in encoder.items():
        module, leaf = name.split("/")
        found = last.params["encoder"][module][leaf]
        np.testing.assert_allclose(found, value.detach(), atol=2e-5, rtol=1e-3)
        assert np.abs(found - first["encoder"][module][leaf]).max() > 1e-3
    for name, value in head.items():
        np.testing.assert_allclose(last.params["classifier"][name], value.detach(), atol=2e-5, rtol=1e-3)
    for i, (mean, _) in running.items():
        np.testing.assert_allclose(last.batch_stats[f"norm{i}"]["mean"], mean, atol=1e-4)
    assert last.step == 4


def test_learning_rates_fall_by_a_fifth_at_epochs_12_and_16_and_scale_with_the_batch():
    recipe, steps = Recipe(lr=0.01, head_multiplier=100.0), 50
    wanted = {0: 0.01, 599: 0.01, 600: 0.002, 799: 0.002, 800: 0.0004, 999: 0.0004}
    for step, rate in wanted.items():
        found = finetune.learning_rates(recipe, step, steps)
        assert found["encoder"] == pytest.approx(rate) and found["classifier"] == pytest.approx(100 * rate)
    half = finetune.learning_rates(recipe._replace(batch_size=128), 0, steps)
    assert half["encoder"] == pytest.approx(0.005)


def test_photos_are_cropped_and_flipped_by_seed_and_step_alone(trees, monkeypatch):
    def classify(network, params, stats, crops, *, train):
        return jnp.zeros((crops.shape[0], CLASSES)), crops  # the step hands the new statistics on

    monkeypatch.setattr(finetune, "_classify", classify)
    n = 64  # photos with a ramp of 8 grey levels a column
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8)[None, None, :, None] * 8, (n, SIDE, SIDE, 3))
    batch = leaves_of({"image": ramp, "aspect": np.ones(n, np.float32), "label": np.zeros(n, np.int32)})
    first, rates = start(trees, TINY), finetune.learning_rates(TINY, 0, 1)

    def columns(run_step, step):
        state, _ = run_step(first._replace(step=jnp.int32(step)), batch, rates)
        return np.asarray(state.batch_stats)[:, 0, SIDE // 2, :, 0] * IMAGENET_STD[0] * 255 / 8

    run_step = compiled_step(TINY)
    found = columns(run_step, 3)
    np.testing.assert_array_equal(found, columns(run_step, 3))
    assert np.any(found != columns(run_step, 4))
    assert np.any(found != columns(compiled_step(TINY._replace(seed=1)), 3))
    slope = (found[:, -3] - found[:, 2]) / (SIDE - 5)  # canvas pixels a crop pixel: the crop's width
    width = np.abs(slope)
    assert 16 <= (slope < 0).sum() <= 48
    assert width.min() > math.sqrt(0.08 * 3 / 4) - 0.02 and width.max() < 1.02
    assert width.std() > 0.1


def test_the_classifier_starts_small_and_the_encoder_as_it_was(trees):
    state = start(trees, TINY, num_classes=500)
    kernel = np.asarray(state.params["classifier"]["kernel"])
    assert kernel.shape == (8, 500)
    assert kernel.std() == pytest.approx(0.01, rel=0.05) and abs(kernel.mean()) < 6e-4
    assert not np.any(state.params["classifier"]["bias"])
    for name, found in (("params", state.params["encoder"]), ("stats", state.batch_stats)):
        wanted = trees[name == "stats"]["encoder"]
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


# The test.


def test_scores_by_hand(trees):
    """The central 14 of 16 pixels, running statistics, unknown labels left out."""
    classes, recipe = 7, TINY._replace(size=14)
    state = start(trees, recipe, classes)
    kernel = jnp.array(np.random.default_rng(0).normal(size=(8, classes)), jnp.float32)
    state = state._replace(params={**state.params, "classifier": {"kernel": kernel, "bias": kernel[0]}})
    rng = np.random.default_rng(1)
    batch = noise(24, 5) | {"aspect": np.ones(24, np.float32)}
    batch["label"] = rng.integers(-1, classes, 24).astype(np.int32)
    score = jax.jit(finetune.make_score(NETWORK, recipe), compiler_options=FAST)
    sums = score(state, leaves_of(batch))
    x = (batch["image"][:, 1:15, 1:15].astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    x = jnp.asarray(x, jnp.float32)[:, None]
    arrays = jax.tree.map(jnp.asarray, trees)
    pooled = np.asarray(NETWORK.encode(*arrays, x, train=False)[0]["pooled"])[:, 0]
    logits = pooled @ np.asarray(kernel) + np.asarray(kernel[0])
    known = batch["label"] >= 0
    logits, label = logits[known], batch["label"][known]
    order = np.argsort(-logits, axis=1)
    own = logits[np.arange(len(label)), label]
    assert 0 < len(label) < 24 and sums["count"] == len(label)
    assert sums["top1"] == (order[:, 0] == label).sum()
    assert sums["top5"] == (order[:, :5] == label[:, None]).sum()
    np.testing.assert_allclose(sums["loss"], (np.log(np.exp(logits).sum(1)) - own).sum(), rtol=1e-4)
    # A classifier that cannot tell has found the classes it names first, not all of them.
    blind = score(state._replace(params=jax.tree.map(jnp.zeros_like, state.params)), leaves_of(batch))
    assert blind["top1"] == (label == 0).sum() and blind["top5"] == (label < 5).sum()


def test_every_labelled_example_counts_exactly_once(trees):
    test = noise(20, seed=3)
    test["label"][[2, 19]] = -1
    test["mask"][[5, 6]] = False  # 16 are left
    test["label"][5] = 99  # of an example that does not count
    found = run(trees, coloured(24), test)
    assert found["top1"] * 16 == round(found["top1"] * 16)
    counts = test["mask"] & (test["label"] >= 0)
    alone = run(trees, coloured(24), batched(rows_of(test, counts)))  # two batches without padding
    assert found["top1"] == alone["top1"] and found["top5"] == 1.0
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


# Whole runs.


def test_one_device_equals_eight(trees):
    train, test, found = coloured(24), noise(13, 1), {}
    for devices in (1, 8):
        steps = []
        figures = run(trees, train, test, devices=devices, progress=lambda n, f, to=steps: to.append((n, f)))
        assert [n for n, _ in steps] == [1, 2, 3, 4, 5, 6]
        found[devices] = [f["loss"] for _, f in steps] + [figures["loss"]]
        assert figures["finite"] == 1
    np.testing.assert_allclose(found[1], found[8], rtol=2e-3)
    assert found[1][0] == pytest.approx(found[8][0], rel=1e-5)


def test_separable_photos_are_learnt_and_the_branch_stays_as_it_was(trees):
    before = jax.tree.map(np.copy, trees)
    found = run(trees, coloured(24), coloured(50, seed=1), TINY._replace(epochs=8, milestones=(6,)))
    assert found["top1"] == 1.0 and found["loss"] < 0.3
    jax.tree.map(np.testing.assert_array_equal, before, trees)


def test_labels_without_meaning_give_chance(trees):
    found = run(trees, noise(24, 0), noise(400, 1), TINY._replace(epochs=8, milestones=(6,)))
    # Four standard deviations of 400 throws of 1/3.
    assert abs(found["top1"] - 1 / 3) < 0.095


def test_a_diverged_run_is_guessing_and_no_error(trees):
    for epochs in (1, 3):  # after the last step, and on the way
        recipe = TINY._replace(lr=1e30, epochs=epochs)
        found = run(trees, coloured(24), coloured(16), recipe, steps_per_epoch=1)
        assert found["finite"] == 0 and math.isnan(found["loss"])
        assert found["top1"] == 1 / 3 and found["top5"] == 1.0


def test_a_diverged_run_ends_early(trees):
    steps = []
    run(trees, coloured(24), coloured(16), TINY._replace(lr=1e30, epochs=50),
        progress=lambda n, figures: steps.append(n))  # fmt: skip
    assert len(steps) < 10


def test_the_whole_grid_is_compiled_once(trees):
    train, test, compiled = coloured(24), coloured(16), []
    run(trees, train, test)

    def count(name, seconds, **_):
        compiled.extend([name] * (name == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        recipe = TINY._replace(lr=0.2, head_multiplier=30.0, epochs=3, milestones=(2,), factor=0.5)
        run(trees, train, test, recipe, steps_per_epoch=2)
        assert not compiled
        jax.jit(lambda x: x + 0.125)(1.0)
        assert compiled  # the listener does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize(
    "case, message",
    [("batch", "draw gave 4"), ("label", r"labels -1\.\.2"), ("beyond", r"labels 0\.\.3"),
     ("test", r"labels -?\d\.\.7"), ("nothing", "no labelled example")],
)  # fmt: skip
def test_refuses_in_one_line(trees, case, message):
    train, test = coloured(24), coloured(8)
    train["label"][:3] = 0, 1, 2
    if case == "batch":
        first = rows_of(train, slice(4))
        train = lambda step: first  # noqa: E731
    elif case in ("label", "beyond"):
        first = rows_of(train, slice(BATCH))
        first["label"] = np.array([0, 1, 2, 0, 1, 2, 0, -1 if case == "label" else 3], np.int32)
        train = lambda step: first  # noqa: E731
    else:
        test["label"][:] = 7 if case == "test" else -1
    with pytest.raises(ValueError, match=message) as caught:
        run(trees, train, test, TINY._replace(epochs=1), steps_per_epoch=1)
    assert "\n" not in str(caught.value)


# The choice of a setting.


def table(top1, diverged=()):
    """A run_fn with given held-out accuracies, test accuracies 1 - those, and a record of its calls."""
    calls = []

    def run_fn(lr, multiplier, on):
        calls.append((lr, multiplier, on))
        value = top1[lr, multiplier] if on == "held_out" else 1 - top1[lr, multiplier]
        return {"top1": value, "top5": value / 2, "finite": float((lr, multiplier) not in diverged)}

    return run_fn, calls


SCORES = {(0.1, 1.0): 0.3, (0.1, 10.0): 0.8, (1.0, 1.0): 0.8, (1.0, 10.0): 0.2}
GRID = {"lrs": (0.1, 1.0), "multipliers": (1.0, 10.0)}


def test_the_first_of_the_best_held_out_settings_alone_is_tested():
    run_fn, calls = table(SCORES)
    found = finetune.evaluate(run_fn, **GRID)
    assert calls == [(*setting, "held_out") for setting in SCORES] + [(0.1, 10.0, "test")]
    wanted = {"top1": 0.2, "top5": 0.1, "lr": 0.1, "head_multiplier": 10.0, "held_out": 0.8, "diverged": 0.0}
    assert found == pytest.approx({f"semi/{name}": value for name, value in wanted.items()})


def test_the_best_on_test_is_called_that():
    run_fn, calls = table(SCORES)
    found = finetune.evaluate(run_fn, **GRID, choose="test")
    assert calls == [(*setting, "test") for setting in SCORES]
    wanted = {"top1": 0.8, "top5": 0.4, "lr": 1.0, "head_multiplier": 10.0}
    cells = {"lr0.1_head1": 0.7, "lr0.1_head10": 0.2, "lr1_head1": 0.2, "lr1_head10": 0.8}
    wanted = {f"semi/{name}_best_on_test": value for name, value in wanted.items()}
    wanted |= {f"semi/grid/{name}": value for name, value in cells.items()} | {"semi/diverged": 0.0}
    assert found == pytest.approx(wanted)


def test_the_default_grid_is_that_of_orl():
    values = {(lr, m): 0.5 for lr in (0.001, 0.01, 0.1) for m in (1.0, 10.0, 100.0)}
    run_fn, calls = table(values)
    finetune.evaluate(run_fn)
    assert [call[:2] for call in calls[:-1]] == list(values)
    assert calls[-1] == (0.001, 1.0, "test")


@pytest.mark.parametrize("choose, chosen, tested", [("held_out", 1.0, 0.2), ("test", 0.1, 0.7)])
def test_a_diverged_run_is_never_the_best(choose, chosen, tested):
    run_fn, _ = table(SCORES, diverged=[(0.1, 10.0), (1.0, 10.0)])
    found = finetune.evaluate(run_fn, **GRID, choose=choose)
    end = "" if choose == "held_out" else "_best_on_test"
    assert found[f"semi/lr{end}"] == chosen and found[f"semi/top1{end}"] == pytest.approx(tested)
    assert found["semi/diverged"] == 2


@pytest.mark.parametrize("choose", ["held_out", "test"])
def test_a_grid_that_diverged_has_no_figures(choose):
    run_fn, calls = table(SCORES, diverged=SCORES)
    found = finetune.evaluate(run_fn, **GRID, choose=choose)
    assert len(calls) == 4 and found.pop("semi/diverged") == 4
    assert all(math.isnan(value) for name, value in found.items() if "grid" not in name)


def test_test_labels_do_not_change_the_choice(trees):
    """Real runs: the same setting wins, whatever the labels of the test are."""
    data, test = coloured(40), coloured(32, seed=1)
    fit_on, held_out = finetune.stratified(data["label"])
    permuted = test | {"label": np.random.default_rng(0).permutation(test["label"])}
    figures = []
    for of_test in (test, permuted):

        def run_fn(lr, multiplier, on, of_test=of_test):
            recipe = TINY._replace(lr=lr, head_multiplier=multiplier, epochs=6, milestones=(5,))
            parts = (data, of_test) if on == "test" else (rows_of(data, fit_on), rows_of(data, held_out))
            return run(trees, *parts, recipe)

        figures.append(finetune.evaluate(run_fn, lrs=(1e-4, 3.2, 1e30), multipliers=(1.0, 2.0)))
    for name in ("semi/lr", "semi/head_multiplier", "semi/held_out", "semi/diverged"):
        assert figures[0][name] == figures[1][name]
    assert figures[0]["semi/lr"] == 3.2 and figures[0]["semi/diverged"] == 2
    assert figures[0]["semi/top1"] > 0.9 > 0.6 > figures[1]["semi/top1"]


@pytest.mark.parametrize("arguments", [{"choose": "best"}, {"lrs": ()}, {"multipliers": ()}])
def test_refuses_a_choice_that_cannot_be_made(arguments):
    with pytest.raises(ValueError, match="finetune"):
        finetune.evaluate(table(SCORES)[0], **GRID | arguments)


# The held-out part.


def test_the_split_is_a_fixed_stratified_partition():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(6), [100, 50, 25, 10, 5, 5]))
    fit_on, held_out = finetune.stratified(labels)
    np.testing.assert_array_equal(np.sort(np.r_[fit_on, held_out]), np.arange(195))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), [20, 10, 5, 2, 1, 1])
    assert np.all(np.diff(fit_on) > 0) and np.all(np.diff(held_out) > 0)
    np.testing.assert_array_equal(finetune.stratified(labels)[1], held_out)
    assert not np.array_equal(finetune.stratified(labels, seed=1)[1], held_out)


def test_rare_classes_keep_an_example_to_fit_on():
    labels = np.repeat([0, 1, 2, 7], [10, 5, 1, 2])
    fit_on, held_out = finetune.stratified(labels)
    # 2, 1, 0 and 0 whole ones; of 18 * 0.2 = 3.6, rounded 4, the last goes to the pair.
    assert np.bincount(labels[held_out]).tolist() == [2, 1, 0, 0, 0, 0, 0, 1]
    assert set(labels[fit_on]) == {0, 1, 2, 7}
    for share in (0.2, 0.5, 0.9):
        pairs = np.repeat(np.arange(50), 2)
        fit_on, held_out = finetune.stratified(pairs, share)
        assert set(pairs[fit_on]) == set(range(50)) and len(held_out) == min(50, round(100 * share))
    assert len(finetune.stratified(np.arange(9))[1]) == 0


def test_of_equal_classes_any_may_be_the_one_with_a_held_out_example():
    labels, counts = np.repeat(np.arange(10), 2), np.zeros(10)
    for seed in range(100):
        counts += np.bincount(labels[finetune.stratified(labels, seed=seed)[1]], minlength=10)
    assert counts.sum() == 400 and counts.min() > 20 and counts.max() < 60  # 40 +- 4 deviations of 4.9


@pytest.mark.parametrize("labels, share", [([0, -1], 0.2), ([0, 0], 0.0), ([0, 0], 1.0)])
def test_refuses_a_split_that_cannot_be(labels, share):
    with pytest.raises(ValueError, match="finetune"):
        finetune.stratified(np.array(labels), share)
