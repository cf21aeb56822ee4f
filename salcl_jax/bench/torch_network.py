"""ResNet-50 and BYOL in plain PyTorch: the same operations as the package's own network and step."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ARCHITECTURES = {  # blocks of each stage, base width, hidden and output channels of the heads
    "resnet50": ((3, 4, 6, 3), 64, 4096, 256),
    "tiny": ((1, 1, 1, 1), 8, 32, 16),
}
MOMENTUM, WEIGHT_DECAY, DECAY = 0.9, 1e-4, 0.99


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride: v1.5) and 1x1 convolutions and a shortcut."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if inside != out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def encoder(blocks: tuple[int, ...], width: int) -> nn.Sequential:
    """ResNet v1.5 without its classifier: [n, 3, p, p] -> [n, 32 * width]."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            layers.append(Bottleneck(inside, width * 2**stage, 2 if stage and not i else 1))
            inside = 4 * width * 2**stage
    found = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in found.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return found


def head(inside: int, hidden: int, out: int) -> nn.Sequential:
    """BYOL's projector or predictor."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
    )


class Byol(nn.Module):
    """Online and target branch; the target has no gradient and statistics of its own."""

    def __init__(self, arch: str):
        super().__init__()
        blocks, width, hidden, out = ARCHITECTURES[arch]
        self.online = nn.Sequential(encoder(blocks, width), head(32 * width, hidden, out))
        self.predictor = head(out, hidden, out)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The loss, 2 - 2 cos of both directions; batch norm sees one view at a time."""
        predictions = [self.predictor(self.online(view)) for view in (first, second)]
        with torch.no_grad():
            targets = [self.target(view) for view in (second, first)]
        cosines = [
            F.cosine_similarity(p.float(), t.float(), dim=1)
            for p, t in zip(predictions, targets, strict=True)
        ]
        return sum((2 - 2 * cosine).mean() for cosine in cosines)

    @torch.no_grad()
    def follow(self, rate: float = DECAY) -> None:
        """target <- rate * target + (1 - rate) * online, for the weights."""
        torch._foreach_lerp_([*self.target.parameters()], [*self.online.parameters()], 1 - rate)


def make_optimizer(model: Byol, batch: int) -> torch.optim.SGD:
    """ORL's SGD: momentum, weight decay on everything, rate linear in the batch; fused on GPUs."""
    trained = [*model.online.parameters(), *model.predictor.parameters()]
    how: dict[str, Any] = {"fused": True} if trained[0].is_cuda else {"foreach": True}
    return torch.optim.SGD(trained, lr=0.2 * batch / 256, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **how)


def flops_per_image(arch: str, size: int) -> float:
    """Operations of convolutions and matrix products of one step, counted without running it."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = Byol(arch)
        views = [torch.empty(2, 3, size, size) for _ in range(2)]
    counter = FlopCounterMode(display=False)
    with counter:
        model(*views).backward()
    return counter.get_total_flops() / 2
