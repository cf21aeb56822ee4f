"""Where a saliency map comes from: a source a file, each with one function.

    draw(network, c, params, stats, x) -> map of each image, float [b, h, w], of any range

network: `models.network.Network`. c: `config.saliency`. params, stats: the branch that draws. x: whole
canvases, normalised, [b, 1, p, p, 3]. The name of the file is the value of `config.saliency.source`;
`guidance.make_saliency` brings maps to [0, 1].
"""

import importlib
import pkgutil
from collections.abc import Callable


def names() -> tuple[str, ...]:
    """Values of `config.saliency.source` that draw a map."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Callable:
    """`draw` of a source; ValueError for a name that is none."""
    if name not in names():
        raise ValueError(f"saliency.source = {name!r}: allowed: none, {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").draw
