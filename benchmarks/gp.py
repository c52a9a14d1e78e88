"""Posterior functions of Gaussian processes: accuracy, speed and memory.

Run `python benchmarks/gp.py basis` for the error of the random basis, `speed` for drawing and
evaluating paths (in turns with exact algebra, and with GPJax and BoTorch where they are installed),
`reference` for a whole
`Pathwise` call against Python loops, `large` for conjugate gradients, `co2` for Mauna Loa, `hsgp`
for a baseline of another kind.
"""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked, in_turns, report, timed
from gp_others import (
    Hilbert,
    botorch_rows,
    draw_exactly,
    error,
    error_of_means,
    exact_posterior,
    gpjax_paths,
    gpjax_rows,
)
from numpyro.infer import MCMC, NUTS
from records import note, peak, saved

from numpyro_ensemble.gp import (
    RBF,
    GaussianProcess,
    Matern52,
    Pathwise,
    Periodic,
    RationalQuadratic,
    draw_features,
    draw_paths,
)
from numpyro_ensemble.gp.conditioning import solved
from numpyro_ensemble.gp.kernels import Spectrum
from numpyro_ensemble.gp.spectra import gaussian, multivariate_t


def points(number, dim=2, seed=0):
    return np.random.default_rng(seed).uniform(size=(number, dim))


def implied(features, kernel, X, X_new, noise):
    """Return the posterior covariance of paths on one basis."""
    A = jnp.linalg.solve(kernel(X) + noise * jnp.eye(len(X)), kernel(X, X_new)).T
    M = features(X_new) - A @ features(X)
    return M @ M.T + noise * A @ A.T


def errors(pairs, mean, covariance):
    """Return the errors of both sides' last means over paths."""
    mine, other = (error_of_means(v, mean, jnp.diag(covariance)) for v in pairs.values)
    return {"error_of_means_in_sd": mine, "error_of_means_in_sd_instead": other}


class PlainRBF(RBF):
    """An RBF kernel whose frequencies are drawn from the spectral density itself."""

    def spectrum(self, uniforms, dim):
        frequencies, weights = gaussian(uniforms, 1.0)
        return Spectrum(self._unscaled(frequencies), weights)


class PlainMatern52(Matern52):
    """A Matern-5/2 kernel whose frequencies are drawn from the spectral density itself."""

    def spectrum(self, uniforms, dim):
        frequencies, weights = multivariate_t(uniforms, self.degrees, 1.0)
        return Spectrum(self._unscaled(frequencies), weights)


def basis():
    """Print the relative error of the posterior covariance, N = 512, D = 2, 1,024 features.

    The alternative is NumPyro's Hilbert-space basis of as many functions, which is not random.
    """
    numpyro.enable_x64()
    X, X_new, noise = points(512) - 0.5, points(100, seed=1) - 0.5, 0.01
    for family in (RBF, PlainRBF, Matern52, PlainMatern52):
        kernel = family(1.0, 0.25)
        exact = exact_posterior(kernel, X, X[:, 0], X_new, noise)[1]
        each = [
            implied(draw_features(jax.random.key(s), kernel, 1024, X), kernel, X, X_new, noise)
            for s in range(12)
        ]
        one = [error(S, exact) for S in each]
        four = [error(sum(each[i : i + 4]) / 4, exact) for i in (0, 4, 8)]
        smoothness = None if isinstance(kernel, RBF) else 2.5
        theirs = error(Hilbert(0.25, smoothness).covariance(X, X_new, noise), exact)
        print(f"{type(kernel).__name__}: one basis {np.median(one):.3f}, four "
              f"{np.median(four):.3f}, Hilbert-space basis {theirs:.3g}")  # fmt: skip
        note(f"{type(kernel).__name__}: error of the posterior covariance", one_basis=one,
             one_basis_instead=theirs, four_bases=four)  # fmt: skip


def speed(bits="64", repeats="7"):
    """Time drawing 256 paths of 512 points and evaluating them at 1,000; BoTorch uses 64 bits."""
    numpyro.enable_x64(int(bits) == 64)
    noise = 0.01
    X, X_new = jnp.asarray(points(512)), jnp.asarray(points(1000, seed=1))
    y = jnp.sin(6 * X.sum(axis=1))
    kernel = RBF(1.0, 0.25)

    def ours(bases):
        options = {"noise": noise, "num_paths": 256, "num_bases": bases}
        return draw_paths(jax.random.key(1), kernel, X, y, **options)

    rows = {}
    for bases in (4, 1):
        paths = ours(bases)
        rows[f"draw, {bases} bases"] = partial(ours, bases)
        rows[f"evaluate, {bases} bases"] = partial(paths, X_new)
    rows |= gpjax_rows(X, y, X_new) | botorch_rows(X, y, X_new)
    for call in rows.values():
        call()
    times = {name: [] for name in rows}
    for _ in range(int(repeats)):
        for name, call in rows.items():
            times[name].append(timed(call))
    for name, seconds in times.items():
        print(f"{name:20} {np.median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]")
        side = "theirs" if name.endswith(("GPJax", "BoTorch")) else "ours"
        note(f"256 paths: {name}, warm", **{side: seconds})
    beside_algebra(kernel, X, y, X_new, noise, int(repeats))
    print(f"peak {peak():.2f} GiB")


def beside_algebra(kernel, X, y, X_new, noise, repeats):
    """Time 256 paths at the new points against exact draws there, which have no paths elsewhere."""

    @jax.jit
    def exactly(key, X, y, X_new):
        return draw_exactly(key, kernel, X, y, X_new, noise, 256)

    def ours(key):
        return draw_paths(key, kernel, X, y, noise=noise, num_paths=256, num_bases=4)(X_new)

    def theirs(key):
        return exactly(key, X, y, X_new)

    for fn in (ours, theirs):
        timed(fn, jax.random.key(9))
    pairs = in_turns(ours, theirs, repeats)
    exact = exact_posterior(kernel, X, y, X_new, noise)
    report("256 paths: draw and evaluate / exact draws by dense algebra, warm", pairs,
           **errors(pairs, *exact))  # fmt: skip


def reference_model(X, y=None):
    variance = numpyro.sample("variance", dist.LogNormal(0.0, 1.0))
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(-1.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(-3.0, 1.0))
    numpyro.sample("y", GaussianProcess(RBF(variance, lengthscale), X, noise), obs=y)


def reference(repeats="7"):
    """Time 8 paths for each of 120 draws at 200 points, against Python loops over the draws."""
    numpyro.enable_x64()
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(0, 3, 28))
    y = np.sin(3 * X) + 0.3 * np.cos(11 * X) + 0.15 * rng.normal(size=28)
    mcmc = MCMC(NUTS(reference_model), num_warmup=300, num_samples=120, progress_bar=False)
    mcmc.run(jax.random.key(0), X, y)
    samples, grid = mcmc.get_samples(), jnp.linspace(0, 3, 200)
    pathwise = Pathwise(reference_model, samples, X, y, num_paths=8, return_sites=["y_f"])

    def one(key, draw):
        kernel = RBF(draw["variance"], draw["lengthscale"])
        paths = draw_paths(key, kernel, X, y, noise=draw["noise"], num_paths=8, num_bases=1)
        return paths(grid)

    cached = jax.jit(one)
    keys = jax.random.split(jax.random.key(1), 120)
    draws = [{name: value[i] for name, value in samples.items()} for i in range(120)]

    def loop(fn):
        return [fn(key, draw) for key, draw in zip(keys, draws, strict=True)]

    def compiling():
        return [
            jax.jit(lambda k, d: one(k, d))(k, d) for k, d in zip(keys[:5], draws[:5], strict=True)
        ]

    first = timed(lambda: pathwise(jax.random.key(1), grid))
    loop(cached)
    pairs = in_turns(lambda key: pathwise(key, grid), lambda key: loop(cached), int(repeats))
    figures = mixture_errors(samples, X, y, grid, *pairs.values)
    report("warm Pathwise / loop over a cached function", pairs, 1.1, **figures)
    if gpjax_paths(X[:, None], y, 8, 1.0, 1.0, 0.1) is not None:

        def gpjax_loop():
            return [gpjax_paths(X[:, None], y, 8, *draw.values())(grid[:, None]) for draw in plain]

        names = ("variance", "lengthscale", "noise")
        plain = [{name: float(draw[name]) for name in names} for draw in draws]
        gpjax_loop()
        pairs = in_turns(lambda key: pathwise(key, grid), lambda key: gpjax_loop(), 3)
        report("warm Pathwise / GPJax, draw by draw", pairs, 0.25)
    anew = timed(compiling) * len(draws) / 5
    print(
        f"first call {first:.2f} s; a loop that compiles at each draw {anew:.1f} s (from 5 draws)"
    )
    name = "first call of Pathwise / a loop that compiles at each draw, from 5 of 120 draws"
    note(name, ours=first, theirs=anew, ratio=first / anew)


def mixture_errors(samples, X, y, grid, ours, theirs):
    """Return the errors of both sides' means over all draws and paths, in standard deviations."""

    def one(draw):
        kernel = RBF(draw["variance"], draw["lengthscale"])
        mean, covariance = exact_posterior(kernel, X, y, grid, draw["noise"])
        return mean, jnp.diag(covariance)

    means, variances = jax.vmap(one)(samples)
    variance = variances.mean(axis=0) + means.var(axis=0)
    both = (ours["y_f"], jnp.stack(theirs))
    mine, other = (
        error_of_means(values.reshape(-1, len(grid)), means.mean(axis=0), variance)
        for values in both
    )
    return {"error_of_means_in_sd": mine, "error_of_means_in_sd_instead": other}


def large(number=15_000):
    """Compare conjugate gradients with Cholesky or, for many points, with a tighter solve.

    That one solves for the same functions, in double precision, 100 times as tightly.
    """
    number = int(number)
    X, X_new = (x.astype(np.float32) for x in (points(number), points(500, seed=1)))
    truth = lambda X: np.sin(6 * X[:, 0]) * np.cos(5 * X[:, 1])  # noqa: E731
    rng = np.random.default_rng(2)
    y = (truth(X) + 0.1 * rng.normal(size=number)).astype(np.float32)
    y_new = truth(X_new) + 0.1 * rng.normal(size=len(X_new))

    def drawn(**options):
        kernel = Matern52(1.0, 0.3)
        return draw_paths(jax.random.key(0), kernel, X, y, noise=0.01, num_paths=16, **options)

    def tighter():
        paths = jax.tree.map(
            lambda x: jnp.asarray(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            drawn(solver="cg", tolerance=1e-1),
        )
        paths = replace(paths, tolerance=jnp.asarray(1e-5))
        return jax.jit(solved)(paths)

    def show(label, draw):
        paths, seconds, _ = clocked(draw)
        values, more, _ = clocked(lambda: np.asarray(paths(X_new)))
        seconds += more
        rmse = np.sqrt(((values.mean(axis=0) - truth(X_new)) ** 2).mean())
        sd = np.sqrt(values.var(axis=0) + 0.01)
        nll = -dist.Normal(values.mean(axis=0), sd).log_prob(y_new).mean()
        print(
            f"{number} points, {label}: {seconds:.1f} s with compilation, peak {peak():.2f} GiB, "
            f"RMSE {rmse:.5f}, NLL {nll:.4f}, largest residual {float(paths.residuals.max()):.1e}",
            flush=True,
        )
        side = "theirs" if label == "Cholesky" else "ours"
        note(f"{number} points, {label}, cold", **{side: seconds}, rmse=float(rmse),
             nll=float(nll), peak_gib_of_the_whole_process=peak())  # fmt: skip
        return values

    ours = show("cg, 1e-3", partial(drawn, solver="cg", tolerance=1e-3))
    if number < 20_000:
        show("Cholesky", drawn)
        return
    numpyro.enable_x64()
    theirs = show("cg, 1e-5, double", tighter)
    apart = np.sqrt(((ours - theirs) ** 2).mean()) / theirs.std(axis=0).mean()
    print(f"the functions are {apart:.4f} of their standard deviation apart")


def co2_data(every=1):
    """Return years since 1990 and standardised monthly CO2 concentrations at Mauna Loa."""
    from statsmodels.datasets import co2

    monthly = co2.load_pandas().data["co2"].resample("MS").mean().dropna()
    years = monthly.index.year + (monthly.index.month - 0.5) / 12
    values = monthly.to_numpy()
    return (
        np.asarray(years, float)[::every] - 1990.0,
        ((values - values.mean()) / values.std())[::every],
    )


def co2_model(t, y=None):
    trend = numpyro.sample("trend", dist.LogNormal(3.5, 0.5))
    season = numpyro.sample("season", dist.LogNormal(-1.5, 0.5))
    shape = numpyro.sample("shape", dist.LogNormal(0.0, 0.3))
    rest = numpyro.sample("rest", dist.LogNormal(-3.0, 0.7))
    noise = numpyro.sample("noise", dist.LogNormal(-7.0, 1.0))
    kernel = (
        RBF(4.0, trend)
        + season * RBF(1.0, 60.0) * Periodic(1.0, shape, 1.0)
        + RationalQuadratic(rest, 1.5, 1.0)
    )
    numpyro.sample("y", GaussianProcess(kernel, t, noise), obs=y)


def co2(every=1):
    """Fit all but the last five years by MAP, and predict those years."""
    from numpyro_ensemble import EnsembleMAP

    numpyro.enable_x64()
    t, y = co2_data(int(every))
    early = t < t.max() - 5

    def predict():
        runner = EnsembleMAP(co2_model, numpyro.optim.Adam(0.05), ensemble_size=2)
        result = runner.run(jax.random.key(0), 300, t[early], y[early], progress_bar=False)
        pathwise = Pathwise(co2_model, result, t[early], y[early], num_paths=64)
        return np.asarray(pathwise(jax.random.key(1), t[~early])["y"])

    values, seconds, _ = clocked(predict)
    error = values.mean(axis=0) - y[~early]
    inside = np.mean(abs(error) < 1.96 * values.std(axis=0))
    print(
        f"{early.sum()} months, {(~early).sum()} predicted: RMSE {np.sqrt((error**2).mean()):.3f}, "
        f"95 % band holds {inside:.2f}, {seconds:.0f} s"
    )
    rmse = float(np.sqrt((error**2).mean()))
    note(f"Mauna Loa, {early.sum()} months, cold", ours=seconds, rmse=rmse, inside_95=float(inside))


def hsgp(repeats="7"):
    """Compare with NumPyro's Hilbert-space approximation, whose basis is fixed on a box."""
    numpyro.enable_x64()
    X, X_new, noise = jnp.asarray(points(512)) - 0.5, jnp.asarray(points(1000, seed=1)) - 0.5, 0.01
    kernel, y = RBF(1.0, 0.25), jnp.sin(6 * X.sum(axis=1))
    basis = Hilbert(0.25)
    theirs = jax.jit(lambda key: basis.draw(key, X, y, X_new, noise, 256))

    def ours(key):
        return draw_paths(key, kernel, X, y, noise=noise, num_paths=256)(X_new)

    mean, exact = exact_posterior(kernel, X, y, X_new, noise)
    print(
        f"Hilbert-space basis, 32 x 32: error {error(basis.covariance(X, X_new, noise), exact):.4f}"
    )
    for fn in (ours, theirs):
        jax.block_until_ready(fn(jax.random.key(0)))
    pairs = in_turns(ours, theirs, int(repeats))
    report("draw and evaluate / Hilbert-space basis", pairs, **errors(pairs, mean, exact))


if __name__ == "__main__":
    names = {f.__name__: f for f in (basis, speed, reference, large, co2, hsgp)}
    task, *rest = sys.argv[1:] or ["basis"]
    with saved(f"gp_{task}"):
        names[task](*rest)
