"""ResNets: published parameter counts, stage shapes, and parity with a plain torch network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.models.resnet import RESNETS, STAGE_NAMES, BasicBlock, BottleneckBlock, ResNet


def _shapes(name: str, size: int, **options):
    blocks, block = RESNETS[name]
    net = ResNet(blocks, block, **options)
    x = jnp.zeros((2, size, size, 3))
    return jax.eval_shape(
        lambda key: net.init_with_output(key, x, views=2, train=True), jax.random.key(0)
    )


@pytest.mark.parametrize(
    "name, count, widths",
    [
        ("resnet18", 11_689_512 - 513_000, (64, 128, 256, 512)),  # torchvision less its classifier
        ("resnet34", 21_797_672 - 513_000, (64, 128, 256, 512)),
        ("resnet50", 25_557_032 - 2_049_000, (256, 512, 1024, 2048)),
        ("resnet101", 44_549_160 - 2_049_000, (256, 512, 1024, 2048)),
    ],
)
def test_parameter_count_and_stage_shapes_at_224(name, count, widths):
    outputs, variables = _shapes(name, 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    assert outputs["stem"].shape == (2, 56, 56, 64)
    for stage, width, side in zip(STAGE_NAMES, widths, (56, 28, 14, 7), strict=True):
        assert outputs[stage].shape == (2, side, side, width)
    assert outputs["pooled"].shape == (2, widths[-1])


@pytest.mark.parametrize(
    "stem, sides",
    [
        ("imagenet", (25, 25, 13, 7, 4)),
        ("stride16", (50, 50, 25, 13, 7)),
        ("cifar", (99, 99, 50, 25, 13)),
    ],
)
def test_stems_set_the_stride(stem, sides):
    outputs, _ = _shapes("resnet18", 99, stem=stem, width=12)
    assert tuple(outputs[k].shape[1] for k in ("stem", *STAGE_NAMES)) == sides
    assert outputs["stage4"].shape[-1] == 96


def test_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="unknown stem 'patchify'"):
        _shapes("resnet18", 64, stem="patchify")


def test_convolutions_start_with_the_kaiming_fan_out_deviation():
    block, x = BasicBlock(128, stride=2, zero_init=True), jnp.zeros((1, 4, 4, 64))
    params = jax.jit(lambda key: block.init(key, x, 1, False)["params"])(jax.random.key(0))
    kernel = np.asarray(params["conv1"]["kernel"])
    assert kernel.shape == (3, 3, 64, 128)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 128)), rtol=0.02)
    assert np.abs(kernel).max() > 3 * kernel.std()  # not truncated
    np.testing.assert_array_equal(params["norm2"]["scale"], np.zeros(128))
    np.testing.assert_array_equal(params["norm1"]["scale"], np.ones(128))


# ---------------------------------------------------------------- parity with torch


def _torch_resnet18(torch, width: int, stem: str):
    """ResNet-18 as in torchvision, written out; forward returns the five activations."""
    nn = torch.nn

    class Basic(nn.Module):
        def __init__(self, i, o, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(o)
            self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(o)
            if stride != 1 or i != o:
                self.shortcut_conv = nn.Conv2d(i, o, 1, stride, bias=False)
                self.shortcut_norm = nn.BatchNorm2d(o)

        def forward(self, x):
            y = torch.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            if hasattr(self, "shortcut_conv"):
                x = self.shortcut_norm(self.shortcut_conv(x))
            return torch.relu(x + y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            kernel = 7 if stem == "imagenet" else 3
            self.stem = nn.Module()
            self.stem.conv = nn.Conv2d(3, width, kernel, 2, kernel // 2, bias=False)
            self.stem.norm = nn.BatchNorm2d(width)
            i = width
            for stage in range(4):
                o = width * 2**stage
                setattr(self, f"stage{stage + 1}_block1", Basic(i, o, 2 if stage else 1))
                setattr(self, f"stage{stage + 1}_block2", Basic(o, o, 1))
                i = o

        def forward(self, x):
            x = torch.relu(self.stem.norm(self.stem.conv(x)))
            if stem == "imagenet":
                x = nn.functional.max_pool2d(x, 3, 2, 1)
            out = {"stem": x}
            for stage in STAGE_NAMES:
                x = getattr(self, f"{stage}_block2")(getattr(self, f"{stage}_block1")(x))
                out[stage] = x
            return out

    return Net()


def _torch_bottleneck(torch, i: int, width: int, stride: int):
    nn = torch.nn

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            o = 4 * width
            self.conv1, self.norm1 = nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv3, self.norm3 = nn.Conv2d(width, o, 1, bias=False), nn.BatchNorm2d(o)
            self.shortcut_conv = nn.Conv2d(i, o, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(o)

        def forward(self, x):
            y = torch.relu(self.norm1(self.conv1(x)))
            y = torch.relu(self.norm2(self.conv2(y)))
            y = self.norm3(self.conv3(y))
            return torch.relu(self.shortcut_norm(self.shortcut_conv(x)) + y)

    return Bottleneck()


def _randomise_norms(torch, module) -> None:
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)


def _from_torch(torch, module) -> dict:
    """Variables of the Flax twin, whose modules have the same names."""
    params, stats = {}, {}
    for name, m in module.named_modules():
        *parents, last = name.split(".")

        def put(tree, values, parents=tuple(parents), last=last):
            for parent in parents:
                tree = tree.setdefault(parent, {})
            tree[last] = {k: jnp.asarray(v.detach().numpy().copy()) for k, v in values.items()}

        if isinstance(m, torch.nn.Conv2d):
            put(params, {"kernel": m.weight.permute(2, 3, 1, 0)})
        elif isinstance(m, torch.nn.BatchNorm2d):
            put(params, {"scale": m.weight, "bias": m.bias})
            put(stats, {"mean": m.running_mean, "var": m.running_var})
    return {"params": params, "batch_stats": stats}


def _with_biased_variance(torch, module, run):
    """Run a torch module in training mode and turn its new running variances into biased ones."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = {m: m.running_var.clone() for m in norms}
    counts = {}
    for m in norms:
        m.register_forward_hook(lambda m, _, y: counts.update({m: y.numel() / y.shape[1]}))
    out = run()
    for m in norms:
        unbiased = m.running_var - 0.9 * before[m]
        m.running_var = 0.9 * before[m] + unbiased * (counts[m] - 1) / counts[m]
    return out


def _assert_close(got, expected, what: str) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=what
    )


@pytest.mark.parametrize("stem, size", [("imagenet", 64), ("imagenet", 75), ("stride16", 75)])
def test_resnet18_equals_torch_in_every_stage(stem, size):
    torch = pytest.importorskip("torch")
    torch.manual_seed(size)
    reference = _torch_resnet18(torch, 8, stem)
    _randomise_norms(torch, reference)
    variables = _from_torch(torch, reference)
    images = np.random.default_rng(0).normal(size=(6, size, size, 3)).astype(np.float32)
    net = ResNet(*RESNETS["resnet18"], width=8, stem=stem)

    @jax.jit
    def both(variables, x):
        train = net.apply(variables, x, views=1, train=True, mutable=["batch_stats"])
        return net.apply(variables, x, views=1, train=False), *train

    evaluated, trained, new = both(variables, jnp.asarray(images))
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected_eval = reference.eval()(x)
        reference.train()
        expected_train = _with_biased_variance(torch, reference, lambda: reference(x))
    for got, expected in ((evaluated, expected_eval), (trained, expected_train)):
        for stage, value in expected.items():
            _assert_close(got[stage], value.permute(0, 2, 3, 1).numpy(), stage)
        _assert_close(got["pooled"], expected["stage4"].mean((2, 3)).numpy(), "pooled")
    expected_stats = _from_torch(torch, reference)["batch_stats"]
    jax.tree.map_with_path(
        lambda path, a, b: _assert_close(a, b, jax.tree_util.keystr(path)),
        new["batch_stats"],
        expected_stats,
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck_block_equals_torch(stride):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    reference = _torch_bottleneck(torch, 12, 8, stride).eval()
    _randomise_norms(torch, reference)
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 12)).astype(np.float32)
    block = BottleneckBlock(8, stride, zero_init=False)
    got = jax.jit(lambda v, x: block.apply(v, x, 1, False))(_from_torch(torch, reference), images)
    with torch.no_grad():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    _assert_close(got, expected.numpy(), "block")
