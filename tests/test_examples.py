"""The quickstart reaches, on the sinc problem, the scores that it states."""

import runpy
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quickstart

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_benchmarks_ask_for_what_there_is(path):
    runpy.run_path(str(path), run_name="imported")


@pytest.mark.long
@pytest.mark.single
@pytest.mark.promotes_ranks  # scoringrules does
def test_the_quickstart_scores_as_promised(capsys, tmp_path):
    x, y, x_test, y_test = quickstart.make_data()
    assert (x.shape, x_test.shape) == ((80,), (200,))
    oracle = quickstart.scores({"oracle": quickstart.truth(x_test)[None]}, x_test, y_test)
    assert abs(oracle.loc["oracle", "NLL"] + 0.884) < 0.1  # the oracle on these 200 points
    with jax.enable_x64(False):  # as users run it, and in half the time
        frame, predicted = quickstart.fit_rows()
    table = frame.to_dict("index")
    constant = table["MAP, starts 0.5 * normal"]
    cosine = table["MAP, the same, cosine from 2e-2"]
    assert constant["NLL"] <= -0.75
    assert cosine["NLL"] <= -0.82
    assert 0.90 <= cosine["coverage 0.95"] <= 0.98
    for name in ("MAP, starts Uniform(-2, 2)", "MAP, starts from the prior"):
        assert table[name]["NLL"] > constant["NLL"] + 0.03  # starts matter
    full, tempered = table["VI, small starts, cosine"], table["VI, the same, kl_weight 0.1"]
    # about -0.51 and -0.73, within 0.01 for any key and precision
    assert full["NLL"] <= -0.48
    assert tempered["NLL"] <= -0.70
    assert table["VI, defaults"]["NLL"] > full["NLL"] + 0.2  # the defaults do not converge
    assert np.isclose(table["oracle"]["NLL"], -0.884)
    quickstart.show(frame)
    printed = capsys.readouterr().out
    assert all(name in printed for name in table)
    path = tmp_path / "quickstart.png"
    shown = quickstart.picture(predicted, path)
    height, width, _ = plt.imread(path).shape
    assert (width, height) == (1200, 840)
    assert plt.imread(path).std() > 0.1  # the picture is not blank
    quickstart.overview(*shown, tmp_path / "overview.png")
    assert plt.imread(tmp_path / "overview.png").shape[:2] == (300, 1000)
