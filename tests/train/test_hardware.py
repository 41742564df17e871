"""Names of topologies."""

import pytest

from lmm_jax.errors import UserError
from train.hardware import CHIPS, parse


@pytest.mark.parametrize(
    "name,chip,devices,shape",
    [
        ("v5e-64", "v5e", 64, "v5e:8x8"),
        ("v5p-128", "v5p", 64, "v5p:4x4x4"),  # 128 cores
        ("v4-32", "v4", 16, "v4:2x2x4"),
        ("v6e-256", "v6e", 256, "v6e:16x16"),
        ("v6e:2x2", "v6e", 4, "v6e:2x2"),
        ("h100-8", "h100", 8, ""),
        ("a100-64", "a100", 64, ""),
    ],
)
def test_parse(name, chip, devices, shape):
    found, *others = parse(name)
    assert (found.name, *others) == (chip, devices, shape)


@pytest.mark.parametrize(
    "name,share",
    [("v5e-256", 1), ("v5e:8x8", 1 / 2), ("v6e:8x16", 3 / 4), ("v5p:4x4x4", 1), ("v5p:2x2x1", 1 / 3), ("v5p:2x2x4", 2 / 3)],
)
def test_links_of_a_chip_at_the_edge(name, share):
    chip, *_ = parse(name)
    assert chip.links == pytest.approx(share * CHIPS[chip.name].links)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e-63", "v5e-512", "v5p-65", "h100-12", "h100:2x4", "v9-8", "v5e-", "v5e:axb", "v5e:0x0", "v5p:8x8"]
)
def test_there_is_no_such_topology(name):
    with pytest.raises(UserError, match="choose one of .*v5e-"):
        parse(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_chips_are_what_they_are(chip):
    assert chip.flops > 1e14
    for devices, shape in chip.shapes.items():
        count = 1
        for side in shape.split("x"):
            count *= int(side)
        assert count == devices <= chip.island
