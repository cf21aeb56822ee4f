"""Networks in plain torch under the names of other packages, and runs of ours with random weights."""

import os
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: tests load local folders only

import jax
import jax.numpy as jnp
import numpy as np

from salcl_jax import checkpoint, config, config_record
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init
from salcl_jax.weights import outgoing

STAGES = ("stage1", "stage2", "stage3", "stage4")
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
SMALL = {"model.projector_hidden": 12, "model.projector_out": 8, "model.predictor_hidden": 10}


def small_config(**model):
    """A resolved configuration with small heads; model: fields of `model`."""
    c = config.base()
    config.small(c)
    c.update_from_flattened_dict({"model.stem": "imagenet", "model.width": 8, **SMALL})
    c.update_from_flattened_dict({f"model.{name}": value for name, value in model.items()})
    c.seed = 5
    return config.finish(c, devices=1, images=100)


def random_state(c, seed: int = 0):
    """A state whose every weight and statistic is a random number, of sizes that keep features moderate."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key if hasattr(path[-1], "key") else ""
        x = rng.standard_normal(leaf.shape)
        if name == "kernel":
            x *= np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
        elif name in ("var", "scale"):
            x = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            x *= 0.2
        return jnp.asarray(x.astype(leaf.dtype))

    shapes = jax.eval_shape(make_init(build(**c.model), c))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.opt_state)
    return jax.tree_util.tree_map_with_path(fill, shapes._replace(opt_state=()))._replace(opt_state=zeros)


def run_of(c, state, step: int = 7) -> outgoing.Run:
    """As read from a checkpoint."""
    fields = checkpoint.MODEL_FIELDS
    trees = {field: jax.tree.map(np.asarray, dict(getattr(state, field))) for field in fields}
    return outgoing.Run(trees, config_record.learnt_fields(c), step)


def save(folder, c, state, step: int = 7) -> None:
    """A workdir with one checkpoint."""
    with checkpoint.Checkpointer(str(folder / "checkpoints"), every_steps=0, keep=1) as saved:
        saved.save(step, state, {"fields": config_record.learnt_fields(c), "history": {}}, force=True)


def features(c, params, stats, images):
    """Our activations [n, h, w, d] of images [n, h, w, 3], and 'pooled' [n, d], numpy."""
    network = build(**{**c.model.to_dict(), "dtype": "float32"})
    run = jax.jit(lambda p, s, x: network.encode(p, s, x, train=False)[0])
    found = run({"encoder": params}, {"encoder": stats}, jnp.asarray(images)[:, None])
    return {name: np.asarray(x)[:, 0] for name, x in found.items()}


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).normal(size=(1, height, width, 3)).astype(np.float32)


def assert_close(theirs, ours) -> None:
    """Each stage equal to 1e-4 of its largest activation; theirs are torch's [n, d, h, w] or [n, d]."""
    for name, x in theirs.items():
        x = x.detach().numpy()
        x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        assert x.shape == ours[name].shape, name
        assert np.abs(x).max() > 1e-2, name
        np.testing.assert_allclose(ours[name], x, atol=1e-4 * np.abs(x).max(), rtol=0, err_msg=name)


def run_torch(model, pictures: np.ndarray):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))


@cache
def classes():
    """The torch modules, made when torch is there: a name space of functions."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        """torchvision's BasicBlock and Bottleneck."""

        def __init__(self, inside, width, stride, deep):
            super().__init__()
            out = width * (4 if deep else 1)
            sizes = [(inside, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
            sizes = sizes if deep else [(inside, width, 3, stride), (width, out, 3, 1)]
            self.count = len(sizes)
            for i, (a, b, kernel, step) in enumerate(sizes, start=1):
                setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            self.downsample = None
            if stride != 1 or inside != out:
                conv = nn.Conv2d(inside, out, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = F.relu(y) if i < self.count else y
            return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        """torchvision's ResNet without its classifier."""

        def __init__(self, name, width):
            super().__init__()
            deep = name == "resnet50"
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            inside = width
            for stage, count in enumerate(BLOCKS[name]):
                blocks = []
                for i in range(count):
                    blocks.append(Block(inside, width * 2**stage, 2 if stage and not i else 1, deep))
                    inside = width * 2**stage * (4 if deep else 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            found = {"conv1": x}
            found["stem"] = x = F.max_pool2d(x, 3, 2, 1)
            for i, name in enumerate(STAGES, start=1):
                found[name] = x = getattr(self, f"layer{i}")(x)
            return found | {"pooled": x.mean((2, 3))}

    class ConvNorm(nn.Conv2d):
        """Detectron2's convolution, which owns its norm."""

        def __init__(self, a, b, kernel, step):
            super().__init__(a, b, kernel, step, kernel // 2, bias=False)
            self.norm = nn.BatchNorm2d(b)

        def forward(self, x):
            return self.norm(super().forward(x))

    class Detectron2Block(nn.Module):
        """BottleneckBlock with stride_in_1x1=False."""

        def __init__(self, inside, width, stride):
            super().__init__()
            out = 4 * width
            self.shortcut = ConvNorm(inside, out, 1, stride) if stride != 1 or inside != out else None
            self.conv1, self.conv2 = ConvNorm(inside, width, 1, 1), ConvNorm(width, width, 3, stride)
            self.conv3 = ConvNorm(width, out, 1, 1)

        def forward(self, x):
            y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
            return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    class Detectron2(nn.Module):
        """build_resnet_backbone of depth 50."""

        def __init__(self, width):
            super().__init__()
            self.stem = nn.Module()
            self.stem.conv1 = ConvNorm(3, width, 7, 2)
            inside = width
            for stage, count in enumerate(BLOCKS["resnet50"]):
                blocks = []
                for i in range(count):
                    blocks.append(Detectron2Block(inside, width * 2**stage, 2 if stage and not i else 1))
                    inside = 4 * width * 2**stage
                setattr(self, f"res{stage + 2}", nn.Sequential(*blocks))

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
            found = {}
            for i, name in enumerate(STAGES, start=2):
                found[name] = x = getattr(self, f"res{i}")(x)
            return found

    class ViTBlock(nn.Module):
        """timm's Block."""

        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            n, t, d = x.shape
            qkv = self.attn.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads)
            mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            x = x + self.attn.proj(mixed.transpose(1, 2).reshape(n, t, d))
            return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

    class ViT(nn.Module):
        """timm's VisionTransformer without its classifier."""

        def __init__(self, width, depth, heads, tokens):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, width))
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, width, 16, 16)
            self.blocks = nn.ModuleList([ViTBlock(width, heads) for _ in range(depth)])
            self.norm = nn.LayerNorm(width, eps=1e-6)

        def forward(self, x):
            x = self.patch_embed.proj(x)
            n, d, h, w = x.shape
            x = torch.cat([self.cls_token, x.flatten(2).transpose(1, 2)], 1) + self.pos_embed
            found, quarter = {}, len(self.blocks) // 4
            for i, block in enumerate(self.blocks, start=1):
                x = block(x)
                x = self.norm(x) if i == len(self.blocks) else x
                if i % quarter == 0:
                    found[f"stage{i // quarter}"] = x[:, 1:].transpose(1, 2).reshape(n, d, h, w)
            return found | {"pooled": x[:, 0]}

    return {"ResNet": ResNet, "Detectron2": Detectron2, "ViT": ViT}


def torch_resnet(name: str, width: int, seed: int = 0):
    """torchvision's ResNet with random weights and statistics."""
    import torch

    torch.manual_seed(seed)
    model = classes()["ResNet"](name, width)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model
