"""Minima of posterior functions: `minimise` and BoTorch's `optimize_posterior_samples`.

Run `python benchmarks/optima.py [num_paths]` where BoTorch is installed (`pip install botorch`).
Both packages have the same hyperparameters, data, number of functions and 1,024 points to begin
with. Their functions differ, so each search is also compared with a far denser one on its own
functions.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from common import clocked, in_turns, report
from records import note, saved

from numpyro_ensemble.gp import RBF, draw_paths, minimise

NOISE = 1e-4
# name: its class in BoTorch, options, number of data, lengthscales on the unit box, variance
PROBLEMS = {
    "Branin": ("Branin", {}, 30, [0.25, 0.6], 2.0),
    "Hartmann-6": ("Hartmann", {"dim": 6}, 100, [0.5, 0.7, 1.5, 0.4, 0.4, 0.5], 2.0),
}


def data(fn, number):
    """Return points in the unit box, and the standardised values there."""
    import torch

    X = torch.quasirandom.SobolEngine(fn.dim, scramble=True, seed=0).draw(number).double()
    low, high = fn.bounds.double()
    y = fn(low + (high - low) * X)
    return X.numpy(), ((y - y.mean()) / y.std()).numpy()


def ours(X, y, lengths, variance, num_paths):
    """Return a function that draws with this package, and one that searches the draws."""
    kernel, box = RBF(variance, jnp.asarray(lengths)), [(0.0, 1.0)] * X.shape[1]

    def draw(seed):
        return draw_paths(jax.random.key(seed), kernel, X, y, noise=NOISE, num_paths=num_paths)

    def search(paths, **options):
        return np.asarray(minimise(jax.random.key(1), paths, box, **options).value)

    return draw, search


def theirs(X, y, lengths, variance, num_paths):
    """Return the same two functions with BoTorch."""
    import torch
    from botorch.models import SingleTaskGP
    from botorch.sampling.pathwise import draw_matheron_paths
    from botorch.utils.sampling import optimize_posterior_samples
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.means import ZeroMean

    inputs, values = torch.tensor(X), torch.tensor(y)[:, None]
    kernel = ScaleKernel(RBFKernel(ard_num_dims=X.shape[1]))
    options = {"covar_module": kernel, "mean_module": ZeroMean(), "outcome_transform": None}
    model = SingleTaskGP(inputs, values, torch.full_like(values, NOISE), **options).double().eval()
    kernel.outputscale, kernel.base_kernel.lengthscale = variance, torch.tensor([lengths])
    bounds = torch.tensor([[0.0] * X.shape[1], [1.0] * X.shape[1]], dtype=torch.double)

    def draw(seed):
        torch.manual_seed(seed)
        return draw_matheron_paths(model, torch.Size([num_paths]))

    def search(paths, **options):
        found = optimize_posterior_samples(paths, bounds, sample_transform=torch.neg, **options)[1]
        return found.detach().numpy().reshape(num_paths)

    return draw, search


def main(num_paths=16):
    """Print the lowest values, how often a dense search finds lower ones, and seconds."""
    from botorch import test_functions

    numpyro.enable_x64()
    for name, (kind, options, number, lengths, variance) in PROBLEMS.items():
        fn = getattr(test_functions, kind)(**options)
        given = (*data(fn, number), lengths, variance, int(num_paths))
        searches = {"minimise": (*ours(*given), {"num_points": 2**15, "num_starts": 64})}
        searches["BoTorch"] = (*theirs(*given), {"raw_samples": 2**13, "num_restarts": 100})
        print(f"{name}, {num_paths} functions")
        calls = []
        for label, (draw, search, dense) in searches.items():
            each = [draw(seed) for seed in range(5)]
            values, first, _ = clocked(lambda: [search(p) for p in each])  # noqa: B023
            lowest = [
                np.minimum(search(paths, **dense), v) for paths, v in zip(each, values, strict=True)
            ]
            missed = np.array(values) - lowest
            print(
                f"  {label}: mean lowest value {np.mean(values):.3f}, missed by 1e-3 or more "
                f"{(missed > 1e-3).mean():.1%}, on average {missed.mean():.1e}; "
                f"the first five calls took {first:.1f} s"
            )
            side = {"ours" if label == "minimise" else "theirs": first}
            note(f"{name}, {label}: the first five calls", **side, lowest=float(np.mean(values)),
                 missed=float((missed > 1e-3).mean()))  # fmt: skip
            calls.append(partial(lambda search, paths, _: search(paths), search, each[0]))
        report(f"  {name}: minimise / BoTorch", in_turns(*calls, 7))


if __name__ == "__main__":
    with saved("optima"):
        main(*sys.argv[1:])
