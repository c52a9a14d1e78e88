"""NumPyro's examples, each run through all methods."""

import driver
import numpyro_examples
import numpyro_examples_2  # noqa: F401  (adds its cases)
import pytest

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.promotes_ranks,
    pytest.mark.filterwarnings("default"),
]
NAMES = tuple(numpyro_examples.CASES)
HARD = {"bnn", "funnel", "ode"}  # short runs of NUTS are too inaccurate to compare with


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    case = numpyro_examples.case(name)
    if isinstance(case, str):
        pytest.skip(case)
    columns = driver.in_turn(NAMES.index(name), case)
    row = driver.run_model(name, case, columns=columns, size=driver.SHORT)
    wrong = driver.complaints(row, case.refused)
    if name in HARD:
        wrong = [line for line in wrong if "standard errors" not in line]
    assert wrong == []
