"""BYOL in plain PyTorch, to compare speeds with: `python -m salcl_jax.bench.torch_byol --batch=256`.

ResNet-50, two views, moving-average target, SGD; channels last, autocast to bfloat16 and torch.compile; uint8
canvases on the GPU, crops and augmentation there too, vectorised over the batch. It needs PyTorch and nothing
else: no jax, no TensorFlow. On a CPU it computes in float32.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead", "off")
CANVASES = 2  # batches that the steps take in turn: one alone would stay in the caches


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser("python -m salcl_jax.bench.torch_byol", description=__doc__.split("\n")[0])
    p.add_argument("--batch", type=int, default=256, help="images per step")
    p.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    p.add_argument("--canvas", type=int, default=384, help="side of the canvases in pixels")
    p.add_argument("--steps", type=int, default=20, help="steps that are timed at a time")
    p.add_argument("--rounds", type=int, default=5, help="times that this is done")
    p.add_argument("--device", choices=("cuda", "cpu"), default=None, help="cuda where there is one")
    p.add_argument("--arch", choices=("resnet50", "tiny"), default="resnet50", help="tiny: for tests")
    p.add_argument("--compile", choices=MODES, default="default", help="mode of torch.compile")
    p.add_argument("--out", default="", help="JSON file for the figures")
    return p


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a line and return the figures; exit code 2 with one line where that is impossible."""
    args = parser().parse_args(arguments)
    try:
        import torch
    except ImportError:
        leave("PyTorch is not installed: pip install -e .[torch]")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        leave("--device=cuda: this PyTorch sees no GPU; give --device=cpu")
    if args.batch < 2 or args.size < 32 or args.canvas < args.size or min(args.steps, args.rounds) < 1:
        leave("give --batch from 2, --size from 32, --canvas from --size, and --steps and --rounds from 1")
    try:
        report = measure(args)
    except torch.cuda.OutOfMemoryError:
        leave(f"--batch={args.batch}: out of memory")
    print(text(report), flush=True)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    return report


def leave(line: str) -> None:
    """End with one line on stderr."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the step and the views alone; figures are {median, min, max} over the rounds."""
    import torch

    from salcl_jax.bench.torch_network import flops_per_image
    from salcl_jax.chips import chip_of

    step, views = make_step(args)
    began = time.perf_counter()
    loss = float(step())
    first = time.perf_counter() - began
    seconds = {"step": [], "views": []}
    for _ in range(3):
        step(), views()
    for _ in range(args.rounds):
        for name, call in (("step", step), ("views", views)):
            seconds[name].append(_seconds(call, args.steps, args.device))
    kind = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    flops, chip = flops_per_image(args.arch, args.size), chip_of(kind)
    rate = args.batch / statistics.median(seconds["step"])
    report = {
        "arch": args.arch, "batch_size": args.batch, "crop": args.size, "canvas": args.canvas,
        "device": kind, "compile": args.compile, "dtype": _dtype(args.device),
        "milliseconds": {name: _spread([1e3 * value for value in found]) for name, found in seconds.items()},
        "images_per_second": rate, "flops_per_image": flops, "mfu": chip and rate * flops / chip.flops,
        "memory": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "first_step_seconds": first, "loss": loss,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m salcl_jax.bench.torch_byol", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip
    return report


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def make_step(args: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions of nothing: one training step, which gives its loss, and its two views alone."""
    import torch

    from salcl_jax.bench.torch_network import Byol, make_optimizer
    from salcl_jax.bench.torch_views import make_view

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # float32 products, as in the blur, on the tensor cores
    model = Byol(args.arch).to(args.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.batch)
    shape = (args.batch, 3, args.canvas, args.canvas)
    canvases = [torch.randint(256, shape, dtype=torch.uint8, device=args.device) for _ in range(CANVASES)]
    aspect = torch.empty(args.batch, device=args.device).uniform_(0.67, 1.5)
    half = getattr(torch, _dtype(args.device))

    def both(canvas: Any) -> list:
        found = [make_view(canvas, aspect, view, args.size) for view in (0, 1)]
        return [view.to(half, memory_format=torch.channels_last) for view in found]

    if args.compile != "off":
        mode = {} if args.compile == "default" else {"mode": args.compile}
        both, model.forward = torch.compile(both, **mode), torch.compile(model.forward, **mode)
    turn = iter(range(10**9))

    def views() -> Any:
        with torch.no_grad():
            return both(canvases[next(turn) % CANVASES])

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        pair = views()
        with torch.autocast(args.device, half, enabled=args.device == "cuda"):
            loss = model(*pair)
        loss.backward()
        optimizer.step()
        model.follow()
        return loss.detach()

    return step, views


def _seconds(call: Callable[[], Any], times: int, device: str) -> float:
    """Mean of `times` runs that follow each other."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - began) / times


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(report: dict[str, Any]) -> str:
    """The figures as one line for the terminal."""
    step, views = (report["milliseconds"][name] for name in ("step", "views"))
    mfu = f", MFU {report['mfu']:.1%}" if report["mfu"] else ""
    return (
        f"torch {report['versions']['torch']} BYOL {report['arch']} {report['crop']} px {report['dtype']} "
        f"(compile {report['compile']}) on {report['device']}: batch {report['batch_size']}, "
        f"{report['images_per_second']:.1f} images/s, step {step['median']:.2f} ms "
        f"({step['min']:.2f} .. {step['max']:.2f}), of it views {views['median']:.2f} ms{mfu}, "
        f"{report['flops_per_image'] / 1e9:.1f} GFLOP per image"
    )


if __name__ == "__main__":
    main()
