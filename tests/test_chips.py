"""The roofline against arithmetic by hand, and the names jax gives to chips."""

import pytest

from salcl_jax.chips import CHIPS, Chip, chip_of, roofline


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5 lite"), ("TPU v5", "TPU v5"),
     ("TPU v6 lite", "TPU v6 lite"), ("NVIDIA H200", "H200"),
     ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA L4", "L4"), ("Tesla T4", "T4")],
)  # fmt: skip
def test_chip_by_device_kind(kind, name):
    assert chip_of(kind) == CHIPS[name]


def test_unknown_chips_are_none():
    assert chip_of("cpu") is None and chip_of("NVIDIA GeForce RTX 4090") is None


def test_roofline_by_hand():
    chip = Chip(flops=100.0, bandwidth=10.0, memory=1.0, links=8.0)
    line = roofline(chip, flops=300.0, bytes_accessed=20.0, sent=6.0, chips=4)
    assert line == (3.0, 2.0, 2.25)  # 2 * 3/4 * 6 bytes leave a chip, at 4 a second in one direction
    assert line.seconds == 3.0 and line.bound == "compute"
    assert roofline(chip, flops=0.0, bytes_accessed=20.0, sent=6.0, chips=4).bound == "links"
    assert roofline(chip, flops=0.0, bytes_accessed=20.0, sent=6.0, chips=1).bound == "memory"
