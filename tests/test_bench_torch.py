"""The PyTorch benchmark does the work of our step: same network, draws, crops, augmentation and update."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # small arrays: threads would wait for each other

from salcl_jax.bench import torch_byol
from salcl_jax.bench import torch_network as net
from salcl_jax.bench import torch_views as views
from salcl_jax.models.network import build
from salcl_jax.ops import augment
from salcl_jax.ops import crop as crop_ops

ROOT = Path(__file__).parents[1]
TINY = ["--arch=tiny", "--batch=4", "--size=32", "--canvas=48", "--steps=1", "--rounds=2", "--device=cpu"]
HEADS = dict(projector_hidden=4096, projector_out=256, predictor_hidden=4096)


def crops(n=5, p=24):
    return np.random.default_rng(3).random((n, p, p, 3), np.float32)


def torch_of(x):
    return torch.tensor(np.asarray(x)).movedim(-1, 1)


def numpy_of(x):
    return x.movedim(1, -1).numpy()


def test_resnet50_and_heads_have_the_parameters_of_our_network():
    how = dict(name="resnet50", width=64, stem="imagenet", dtype="bfloat16", remat=False)
    ours = build(**how, zero_init_residual=False, **HEADS)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), 224))[0]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    with torch.device("meta"):
        model = net.Byol("resnet50")
    of = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert of["online"] == of["target"] == count["encoder"] + count["projector"]
    assert of["predictor"] == count["predictor"]
    kernels = sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if len(leaf.shape) > 1)
    theirs = [*model.online.parameters(), *model.predictor.parameters()]
    assert kernels == sorted(p.numel() for p in theirs if p.ndim > 1)


def test_operations_of_a_step_by_hand():
    """ResNet-50 at 224 px: 4.089 G multiply-adds; three passes online without the gradient of the pixels, one
    of the target, two views."""
    layers = [(7 * 7 * 3, 64, 112)]  # inputs of an output value, channels, side of the output
    inside, side = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for i in range(blocks):
            out = side // 2 if stage and not i else side
            layers += [(inside, width, side), (9 * width, width, out), (width, 4 * width, out)]
            layers += [(inside, 4 * width, out)] if not i else []
            inside, side = 4 * width, out
    convolutions = [taps * channels * side * side for taps, channels, side in layers]
    head = 2048 * 4096 + 4096 * 256
    predictor = 2 * 4096 * 256
    macs = 4 * (sum(convolutions) + head) + 3 * predictor - convolutions[0]
    assert net.flops_per_image("resnet50", 224) == pytest.approx(2 * 2 * macs, rel=1e-6)
    assert 4 * macs == pytest.approx(65.1e9, rel=2e-3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_color_jitter_is_ours(order):
    x = crops()
    rng = np.random.default_rng(1)
    amount = np.stack([*rng.uniform(0.6, 1.4, (3, 5)), rng.uniform(-0.1, 0.1, 5)], 1).astype(np.float32)
    names = ("brightness", "contrast", "saturation", "hue")
    expected = jnp.array(x)
    for what in order:
        change = getattr(augment, f"adjust_{names[what]}")
        expected = jnp.stack([change(crop, float(a[what])) for crop, a in zip(expected, amount, strict=True)])
    found = views.color_jitter(torch_of(x), torch.tensor([order] * 5), torch.tensor(amount))
    np.testing.assert_allclose(numpy_of(found), expected, atol=2e-5)


def test_blur_is_ours():
    x, sigma = crops(3, 64), np.array([0.2, 0.9, 1.9], np.float32)
    pairs = zip(jnp.array(x), sigma, strict=True)
    expected = np.stack([augment.gaussian_blur(crop, float(one)) for crop, one in pairs])
    found = views.blur(torch_of(x), torch.tensor(sigma))
    np.testing.assert_allclose(numpy_of(found), expected, atol=1e-5)
    assert np.abs(expected - x)[2].mean() > 0.1


def test_crop_is_ours_without_antialiasing():
    x = crops(3, 40)
    boxes = np.array([[0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], [0.3, 0.05, 0.55, 0.4]], np.float32)
    expected = crop_ops.crop_and_resize(jnp.array(x), jnp.array(boxes)[:, None], 16, antialias=False)[:, 0]
    flip = torch.tensor([False, True, False])
    found = numpy_of(views.crop(torch_of(x), torch.tensor(boxes), flip, 16))
    found[1] = found[1, :, ::-1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_boxes_are_drawn_as_ours():
    """Same shares, proportions and places: the means of many boxes agree."""
    n = 4000
    torch.manual_seed(0)
    for aspect in (0.7, 1.5):
        found = views.random_boxes(torch.rand(4, n), torch.full((n,), aspect)).numpy()
        ours = crop_ops.random_resized_crop_boxes(
            jax.random.key(0), jnp.full(n, aspect), 1, views.AREA, views.RATIO
        )[:, 0]
        np.testing.assert_allclose(found.mean(0), np.mean(ours, 0), atol=0.02)
        np.testing.assert_allclose(found.std(0), np.std(ours, 0), atol=0.02)


def test_views_are_normalised_random_crops_of_their_canvas():
    torch.manual_seed(0)
    canvas = torch.randint(256, (6, 3, 48, 48), dtype=torch.uint8)
    first, second = (views.make_view(canvas, torch.ones(6), view, 32) for view in (0, 1))
    low = [(0 - m) / s for m, s in zip(views.MEAN, views.STD, strict=True)]
    high = [(1 - m) / s for m, s in zip(views.MEAN, views.STD, strict=True)]
    for view in (first, second):
        assert view.shape == (6, 3, 32, 32) and torch.isfinite(view).all()
        assert all(view[:, i].min() >= low[i] - 1e-5 and view[:, i].max() <= high[i] + 1e-5 for i in range(3))
    assert (first - second).abs().mean() > 0.1 and len({float(v.mean()) for v in first}) == 6


def test_constant_canvases_tell_the_augmentation_apart():
    """White stays white but for brightness (jitter), and inverted (solarize), of the second view only."""
    torch.manual_seed(0)
    white = torch.full((400, 3, 40, 40), 255, dtype=torch.uint8)
    mean = torch.tensor(views.MEAN)[:, None, None]
    std = torch.tensor(views.STD)[:, None, None]
    for view, share in ((0, 0.0), (1, 0.2)):
        light = (views.make_view(white, torch.ones(400), view, 32) * std + mean).mean((1, 2, 3))
        assert float((light < 0.5).float().mean()) == pytest.approx(share, abs=0.06)
        changed = ((light - 1).abs() > 1e-3) & (light > 0.5)
        assert float(changed.float().mean()) == pytest.approx((1 - share) * 0.4, abs=0.08)


def test_a_step_learns_and_the_target_follows():
    torch.manual_seed(0)
    model = net.Byol("tiny")
    before = [p.clone() for p in model.target.parameters()]
    optimizer = net.make_optimizer(model, 64)
    pair = torch.randn(2, 8, 3, 32, 32)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(*pair)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert 0 < losses[-1] < losses[0] <= 8
    assert all(p.grad is None for p in model.target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.target.parameters(), strict=True))
    model.follow(0.75)
    trained, followed = next(model.online.parameters()), next(model.target.parameters())
    assert torch.allclose(followed, 0.75 * before[0] + 0.25 * trained, atol=1e-6)
    assert not torch.equal(followed, before[0])


def test_everything_compiles_into_one_graph():
    """A break would send every step back to Python."""
    canvas, aspect = torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8), torch.ones(4)
    how = dict(backend="eager", fullgraph=True)
    view = torch.compile(views.make_view, **how)(canvas, aspect, 1, 32)
    assert torch.isfinite(torch.compile(net.Byol("tiny").forward, **how)(view, view))


def test_the_program_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "torch.json"
    report = torch_byol.main([*TINY, "--compile=off", f"--out={out}"])
    assert json.loads(out.read_text()) == report
    step = report["milliseconds"]["step"]
    assert step["min"] <= step["median"] <= step["max"] and report["milliseconds"]["views"]["min"] > 0
    assert report["images_per_second"] == pytest.approx(4e3 / step["median"])
    assert 0 < report["loss"] <= 8 and report["mfu"] is None and report["dtype"] == "float32"
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--batch=1", "--canvas=16", "--device=cuda", "--steps=0"])
def test_a_wrong_option_is_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        torch_byol.main([*TINY, wrong])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and "Traceback" not in capsys.readouterr().err


def test_it_starts_without_jax_tensorflow_or_torch(tmp_path):
    for name in ("jax", "tensorflow", "torch", "absl"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('absent')\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "salcl_jax.bench.torch_byol", *TINY]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: PyTorch is not installed: pip install -e .[torch]\n"
