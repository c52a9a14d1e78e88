"""The driver's complaints about a row, and the columns that a turn of `make foreign` runs."""

import driver
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import ALL, SAMPLERS, Case, Size
from samplers import LIMIT, Reference

WARNED = "The chains of MEADS have not mixed: R-hat is up to 2.6, at 'b'."


def row_of(**meads):
    column = {"ok": True, "rhat": 1.01, "gap": 1.0, "warnings": []} | meads
    return {"model": "any", "size": Size()._asdict(), "NUTS": column, "MEADS": column}


@pytest.mark.parametrize(
    ("meads", "complaint"),
    [
        ({}, None),
        ({"rhat": 2.6, "gap": 40.0}, "does not warn"),
        ({"rhat": 2.6, "gap": 40.0, "warnings": [WARNED]}, None),
        ({"gap": 4.5}, "4.5 standard errors"),
    ],
)
def test_no_run_ends_in_silence(meads, complaint):
    wrong = driver.complaints(row_of(**meads))
    assert not wrong if complaint is None else complaint in wrong[0]


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ({"ok": False, "reason": "ValueError: plate 'N' takes rows at random"}, None),
        ({"ok": False, "reason": "KeyError: 0"}, "the reason is 'KeyError: 0'"),
        ({"ok": True, "rhat": 1.0, "warnings": []}, "said not to"),
    ],
)
def test_a_refusal_is_the_one_that_is_known(column, complaint):
    wrong = driver.complaints({"model": "any", "MEADS": column}, {"MEADS": "at random"})
    assert not wrong if complaint is None else complaint in wrong[0]


@pytest.mark.parametrize(("reason", "count"), [("UpstreamError: no start", 0), ("KeyError: 0", 2)])
def test_no_fit_is_numpyros_failure_where_its_own_fails(reason, count):
    row = {"AutoNormal": {"ok": False, "reason": reason}}
    row["ArviZ"] = {"ok": False, "reason": driver.NO_FIT}
    assert len(driver.complaints({"model": "any"} | row)) == count


@pytest.mark.parametrize("place", range(6))
def test_three_turns_run_every_column(place, monkeypatch):
    seen = set()
    for turn in range(3):
        monkeypatch.setenv("FOREIGN_TURN", str(turn))
        columns = driver.in_turn(place, Case(None))
        assert len(columns) == 6
        refused = dict.fromkeys(SAMPLERS, "at random")
        assert "NUTS" not in driver.in_turn(place, Case(None, refused=refused))
        seen |= set(columns)
    assert seen == set(ALL)


def test_a_slow_model_is_run_with_fewer_chains():
    assert Size(64, 500, 500).at_most(Size(16, 600, 150)) == Size(16, 500, 150)
    assert Size(8, 20, 20).at_most(None) == Size(8, 20, 20)


@pytest.mark.foreign
@pytest.mark.promotes_ranks
def test_a_longer_run_of_nuts_decides(key):
    """The longer run of NUTS decides, and not the short one, whose draws have a wrong mean."""
    case = Case(lambda: numpyro.sample("z", dist.Normal(0.0, 1.0)))
    right, wrong = (
        np.asarray(jax.random.normal(key, (2, 4, 500, 1)))
        + np.array([0.0, 0.3])[:, None, None, None]
    )
    reference = Reference(case, Size(8, 100, 100), wrong, 1.0)
    found = reference.compare(right, 1.0)
    assert found["gap"] < LIMIT
    assert found["nuts_draws"] == 1000
    assert reference.compare(wrong, 1.0)["gap"] > LIMIT
