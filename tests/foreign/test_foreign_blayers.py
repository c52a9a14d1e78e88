"""Layers of blayers: fits beside NumPyro's SVI for all, many chains beside NUTS."""

import pytest

pytest.importorskip("blayers", reason="blayers is not installed: pip install blayers")

import blayers_models
import driver
from cases import ALL, SAMPLERS
from samplers import Size

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.filterwarnings("default")]
SHORT = Size(32, 300, 200)
QUICK = [  # what `make test` fits
    "AdaptiveLayer", "FM3Layer", "LowRankInteractionLayer", "EmbeddingLayer",
    "RandomEffectsLayer", "RandomWalkLayer", "HorseshoeLayer", "InterceptLayer",
]  # fmt: skip
ALIKE = ["FMLayer", "InteractionLayer", "BilinearLayer", "LowRankBilinearLayer"]


def case_or_skip(name):
    case = blayers_models.case(name)
    if isinstance(case, str):
        pytest.skip(f"{name}: {case}")
    return case


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in ALIKE)]
)
def test_a_member_is_an_svi_of_the_layer(name):
    case = case_or_skip(name)
    row = driver.run_model(name, case, columns=("MAP",))
    assert row["MAP"] == {"ok": True}, driver.complaints(row)


@pytest.mark.foreign
@pytest.mark.parametrize("name", blayers_models.LAYERS)
def test_layer(name):
    case = case_or_skip(name)
    row = driver.run_model(name, case, columns=ALL, size=SHORT)
    assert set(SAMPLERS) <= set(row)
    assert driver.complaints(row, case.refused) == []
