"""Members in groups and on meshes: the same numbers as all at once on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsembleVI

KEY = jax.random.key(0)
Y = np.random.default_rng(0).normal(size=(5, 12))


def model(y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    b = numpyro.sample("b", dist.HalfNormal(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(w.sum(), b), obs=y)


@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=[pytest.mark.long] * (n != 2)) for n in (1, 2, 5, 9)]
)
def test_groups_of_members_are_the_members(size):
    """Five members are run in groups of 1; of 2, 2 and 1; and in one group."""

    def run(**options):
        runner = EnsembleVI(
            model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=5,
            **options,
        )  # fmt: skip
        return runner.run(KEY, 20, Y, member_args=[0], progress_bar=False)

    plain, grouped = run(), run(member_batch_size=size)
    assert set(grouped.params) == set(plain.params)
    for name, leaf in plain.params.items():
        np.testing.assert_allclose(grouped.params[name], leaf, rtol=1e-10)
    np.testing.assert_allclose(grouped.losses, plain.losses, rtol=1e-10)
    assert np.ptp(np.asarray(plain.losses)[:, -1]) > 0.1  # members differ


@pytest.mark.long
def test_groups_of_one_program():
    """Modes, states and steps agree for groups of two, with the calls in an unusual order."""
    plain, grouped = (EnsembleMAP(model, ensemble_size=5, **o) for o in ({}, GROUPS))
    state = plain.init(KEY, Y[0])
    np.testing.assert_allclose(grouped.evaluate(state, Y[1]), plain.evaluate(state, Y[1]))
    stepped, same = grouped.update(state, Y[1]), plain.update(state, Y[1])
    np.testing.assert_allclose(stepped[1], same[1])
    for name, leaf in plain.get_params(same[0]).items():
        np.testing.assert_allclose(grouped.get_params(stepped[0])[name], leaf, rtol=1e-10)
    grouped.member_batch_size = None  # the setting takes effect in the next call
    np.testing.assert_allclose(grouped.evaluate(state, Y[1]), plain.evaluate(state, Y[1]))
    with pytest.raises(ValueError, match="member_batch_size"):
        grouped.member_batch_size = 0


GROUPS = {"member_batch_size": 2}


@pytest.fixture(scope="module")
def found():
    """Return what `mesh_runs` has found on four devices."""
    return run_on_a_mesh()


@pytest.fixture(scope="module")
def found_long():
    """Return what the long run of `mesh_runs` has found."""
    return run_on_a_mesh("long")


def run_on_a_mesh(*words):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    script = Path(__file__).with_name("mesh_runs.py")
    run = subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


MESHES = ["members", "members and rows"]
KINDS = [
    "plain", "batches", "batches of its own", "data of its own", "batches of its own data",
    "stopping", "starts", "repelled", "repelled by values",
]  # fmt: skip


def test_a_mesh_changes_no_number(found):
    assert found["batches of its own data, members and rows"] < 1e-8
    assert found["another key"] > 1e-5
    assert found["devices"] == 4


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", [*KINDS, "minimiser"])
def test_no_kind_of_run_differs_on_a_mesh(found_long, kind, mesh):
    assert found_long[f"{kind}, {mesh}"] < 1e-8


@pytest.mark.long
def test_states_of_a_mesh_are_those_of_one_device(found_long):
    distances = {
        k: v for k, v in found_long.items() if k.startswith("states") and "leading" not in k
    }
    assert len(distances) == 4
    assert max(distances.values()) < 1e-8, distances
    assert found_long["states, leading"] == [5]


@pytest.mark.long
@pytest.mark.parametrize("how", ["gone on from", "draws", "taken home"])
def test_runs_go_on_from_states_of_a_mesh(found_long, how):
    assert found_long[f"runs, {how}"] < 1e-8


@pytest.mark.long
@pytest.mark.parametrize("label", ["plain", "sharded"])
def test_a_hundred_of_a_thousand_that_fail(found_long, label):
    """Members fail by data, an exploding rate or a start; the others have the same bits."""
    assert found_long[f"poison, {label}, same"]
    assert found_long[f"poison, {label}, named"]
    said = found_long[f"poison, {label}, said"]
    assert "67 of 1000 members start where the loss is not finite" in said
    assert any("members ended with values that are not finite" in line for line in said)


@pytest.mark.long
@pytest.mark.parametrize("label", ["MEADS of 8", "MAMS of 8", "MCLMC of 8", "ChEES of 6, grouped"])
def test_chains_of_a_mesh_draw_the_same(found_long, label):
    assert found_long[f"{label}, draws"] < 1e-8
    assert found_long[f"{label}, devices"] == 4
    # four devices do not divide six
    assert found_long[f"{label}, spread"] == label.endswith("of 8")


@pytest.mark.long
def test_chains_and_rows_of_a_mesh_draw_the_same(found_long):
    assert found_long["ChEES of rows, draws"] < 1e-6
    assert found_long["ChEES of rows, spread"]


@pytest.mark.long
def test_predictions_of_a_mesh_are_the_same(found_long):
    assert found_long["predictions"] < 1e-8
    assert found_long["predictions, devices"] == 4


def test_members_that_are_added_are_not_seen(found):
    assert found["failures, finite"] == [True] * 4 + [False]
    assert found["failures, said"] == [
        "1 of 5 members start where the loss is not finite: 4. Give other starts by init_params= "
        "or the guide's init_loc_fn=, or check the data."
    ]
    assert found["failures, callback"] == [5, 5]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("axes", "ValueError: mesh has axes ['chain'], and takes one named 'member'"),
        ("kind", 'TypeError: mesh takes a jax.sharding.Mesh or "all", got 4.'),
        ("few", "ValueError: mesh spreads members over 4 devices, and there are 3: take a smaller"),
        ("few draws", "ValueError: mesh spreads predictions over 4 devices, and there are 3"),
        ("chains", "ValueError: num_chains=3 is too few for ChEES"),
        ("few chains", "ValueError: mesh has axes ['chain'], and takes one named 'member'"),
        (
            "rows",
            "ValueError: mesh spreads rows over 2 devices, and there are 47, which 2 does not",
        ),
    ],
)
def test_errors(found, label, said):
    assert found[f"error, {label}"].startswith(said)
