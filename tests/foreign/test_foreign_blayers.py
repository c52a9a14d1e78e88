"""Layers of blayers: fits are compared with NumPyro's SVI, and many chains with NUTS."""

import pytest

pytest.importorskip("blayers", reason="blayers is not installed: pip install blayers")

import blayers_models
import driver

pytestmark = [pytest.mark.promotes_ranks, pytest.mark.filterwarnings("default")]
NAMES = tuple(blayers_models.LAYERS)
QUICK = ("RandomWalkLayer",)  # 3 seconds
LONG = (  # QUICK and LONG have latents of every shape
    "AdaptiveLayer",
    "LowRankInteractionLayer",
    "BilinearLayer",
    "EmbeddingLayer",
    "RandomEffectsLayer",
    "HorseshoeLayer",
    "FMLayer",
)


def case_or_skip(name):
    case = blayers_models.case(name)
    if isinstance(case, str):
        pytest.skip(f"{name}: {case}")
    return case


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_a_member_is_an_svi_of_the_layer(name):
    case = case_or_skip(name)
    row = driver.run_model(name, case, columns=("MAP",))
    assert row["MAP"] == {"ok": True}, driver.complaints(row)


@pytest.mark.foreign
@pytest.mark.parametrize("name", NAMES)
def test_layer(name):
    case = case_or_skip(name)
    columns = driver.in_turn(NAMES.index(name), case)
    row = driver.run_model(name, case, columns=columns, size=driver.SHORT)
    assert set(columns) <= set(row)
    assert driver.complaints(row, case.refused) == []
