"""Pictures: their content and axes; and the import loads no plotting library."""

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from numpy.testing import assert_allclose

from numpyro_ensemble import EnsembleResult, plotting

mpl.use("Agg")
import matplotlib.pyplot as plt

X = np.linspace(-1.0, 1.0, 7)
MEANS = np.linspace(-1.0, 1.0, 5)[:, None] * X


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_predictions_are_drawn_on_the_axes_given():
    _, ax = plt.subplots()
    draws = np.concatenate([MEANS - 0.3, MEANS + 0.3])
    got = plotting.plot_predictive(X, MEANS, draws, data=(X, X), level=0.5, ax=ax)
    assert got is ax
    assert len(ax.collections) == 2  # the two bands
    total, narrow = (band.get_paths()[0].vertices for band in ax.collections)
    assert np.ptp(total[:, 1]) > np.ptp(narrow[:, 1])
    mean = next(line for line in ax.lines if line.get_label() == "mean")
    assert_allclose(mean.get_ydata(), MEANS.mean(0), atol=1e-12)
    assert {"mean", "data", "members"} <= {text.get_label() for text in ax.lines}
    grouped = np.arange(4.0)[:, None, None] + np.zeros((4, 25, 7))
    lines = [
        line for line in plotting.plot_predictive(X, grouped).lines if line.get_label() != "mean"
    ]
    assert [line.get_ydata()[0] for line in lines] == [0.0, 1.0, 2.0, 3.0]  # one for each member
    with pytest.raises(ValueError, match="draws takes"):
        plotting.plot_predictive(X, MEANS, draws[:, :3])
    with pytest.raises(ValueError, match="means takes"):
        plotting.plot_predictive(X[:3], MEANS)


def test_calibration_and_weights():
    ax = plotting.plot_calibration(np.tile(np.linspace(-2, 2, 101)[:, None], 7), X, label="fit")
    assert ax.lines[1].get_label() == "fit"
    assert len(ax.lines[1].get_xdata()) == 19
    plotting.plot_calibration(np.tile(np.linspace(-1, 1, 101)[:, None], 7), X, ax=ax)
    first, second = ax.lines[1:]
    assert first.get_marker() != second.get_marker()  # and the diagonal is drawn once
    with pytest.raises(ValueError, match="weights takes numbers"):
        plotting.plot_weights([[0.5], [0.5]])
    bars = plotting.plot_weights([0.2, 0.8])
    assert [bar.get_height() for bar in bars.patches] == [0.2, 0.8]
    # members are counted in integers
    assert all(float(tick).is_integer() for tick in bars.get_xticks())


def test_failed_members_are_marked():
    losses = np.tile(np.linspace(5.0, 1.0, 6), (3, 1))
    losses[1, 3:] = np.nan
    result = EnsembleResult({"w": jnp.array([1.0, jnp.nan, 1.0])}, _State(), losses)
    ax = plotting.plot_losses(result)
    assert sum(line.get_linestyle() == "--" for line in ax.lines) == 1
    assert [line.get_xdata()[-1] for line in ax.lines if line.get_marker() == "x"] == [2]
    assert "1 failed (dashed)" in ax.get_title()
    assert len(plotting.plot_losses(losses).lines) == 4
    with pytest.raises(ValueError, match=r"losses \(E, num_steps\)"):
        plotting.plot_losses(losses[0])


class _State:
    mutable_state = None
