"""Published figures of accelerators, and what they allow at best (the roofline)."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Published peaks of one chip, as its maker's data sheet gives them.

    flops: dense bfloat16 (V100, T4: float16) operations a second; bandwidth: bytes a second from memory;
    memory: bytes; links: bytes a second to other chips of the slice or node, both directions together.
    """

    flops: float
    bandwidth: float
    memory: float
    links: float


# By a part of jax's device_kind, the longer names first: "TPU v5" is the v5p.
CHIPS = {
    "TPU v6 lite": Chip(918e12, 1638e9, 32 * GIB, 448e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * GIB, 200e9),
    "TPU v5": Chip(459e12, 2765e9, 95 * GIB, 600e9),
    "TPU v4": Chip(275e12, 1228e9, 32 * GIB, 300e9),
    "TPU v3": Chip(123e12, 900e9, 32 * GIB, 82e9),
    "H200": Chip(989e12, 4800e9, 141e9, 900e9),
    "H100": Chip(989e12, 3350e9, 80e9, 900e9),
    "A100": Chip(312e12, 2039e9, 80e9, 600e9),
    "V100": Chip(125e12, 900e9, 16e9, 300e9),
    "L4": Chip(121e12, 300e9, 24e9, 64e9),
    "T4": Chip(65e12, 320e9, 16e9, 32e9),
}


class Roofline(NamedTuple):
    """Seconds that a program needs at least for each of three things it does at the same time."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest of them: no program is faster."""
        return max(self)

    @property
    def bound(self) -> str:
        """What bounds the program: 'compute', 'memory' or 'links'."""
        return self._fields[self.index(self.seconds)]


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose name is part of jax's `device_kind`, None where it is not known."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def roofline(chip: Chip, *, flops: float, bytes_accessed: float, sent: float, chips: int) -> Roofline:
    """Least time of a program on each of `chips` chips.

    flops, bytes_accessed: of one chip. sent: bytes that all-reduces combine; a ring moves 2 (n - 1) / n of
    them out of every chip, in one direction of its links.
    """
    moved = 2 * (chips - 1) / chips * sent
    return Roofline(flops / chip.flops, bytes_accessed / chip.bandwidth, moved / (chip.links / 2))
