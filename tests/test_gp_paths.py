"""Paths against the covariance that their own basis implies, and operations on paths."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import KERNELS, gram, implied, inputs, jitter, posterior, within
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm
from zoo import chosen

from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    GaussianProcess,
    Linear,
    Matern52,
    Paths,
    Periodic,
    draw_paths,
)

X, X_NEW = inputs(15, 1, width=5.0), np.linspace(-1.0, 6.0, 9)[:, None]
Y = np.sin(X[:, 0])
CLOSE = np.linspace(-1.1, 6.0, 36)[:, None]  # close enough to show how smooth paths are
NUMBER = 512
# the tolerance between values of the same paths from two programs
SAME = within({"rtol": 1e-9}, {"rtol": 1e-5, "atol": 2e-5})


def z_scores(values, mean, covariance):
    """Return z-scores of means and variances of draws, at points and along principal directions."""
    number, left = len(values), values - mean
    width, directions = np.linalg.eigh(covariance)
    wide = width > 1e-3 * width.max()  # rounding swamps the others
    scores = []
    for each, variance in (
        (left, np.diag(covariance)),
        (left @ directions[:, wide], width[wide]),
    ):
        scores.append(each.mean(axis=0) / np.sqrt(variance / number))
        # the variance of a normal sample is chi-square
        scores.append(((each**2).mean(axis=0) / variance - 1) * np.sqrt(number / 2))
    return np.concatenate(scores)


def accepts(values, mean, covariance):
    z = z_scores(np.asarray(values, float), mean, covariance)
    return bool(abs(z).max() < norm.isf(0.001 / 2 / len(z)))  # Bonferroni


def stretched(kernel, by):
    """Return the kernel with other lengthscales."""

    def stretch(path, leaf):
        return by * leaf if jax.tree_util.keystr(path).endswith("lengthscale") else leaf

    return jax.tree_util.tree_map_with_path(stretch, kernel)


TESTED = {"RBF": RBF(1.2, 0.8), "Matern52": Matern52(1.2, 0.8)} | {
    name: KERNELS[name] for name in ("sum", "product", "linear product", "Periodic")
}
Z = np.linspace(-0.5, 5.5, 15)[:, None]  # as many as X, for one program in all cases


@pytest.mark.core
@pytest.mark.parametrize("name", chosen(TESTED, {"RBF"}))
def test_paths_are_draws_from_what_the_basis_implies(name):
    """Exact, latent and sparse processes differ only in points, values and noise."""
    kernel = TESTED[name]
    # the values are not periodic, so that weights in the thousands multiply the kernel's rounding
    extra = within(1e-4, 1e-2) if name == "Periodic" else 1e-4
    for points, values, noise in ((X, Y, 0.05), (X, Y, 0.0), (Z, np.cos(Z[:, 0]), 0.0)):
        draw = partial(
            draw_paths, jax.random.key(3), points=points, values=values,
            noise=noise, num_paths=NUMBER, num_features=256, num_bases=1, jitter=extra,
        )  # fmt: skip
        paths = draw(kernel)
        added = noise + extra
        features = jax.tree.map(lambda leaf: leaf[0], paths.features)
        mean, _ = posterior(kernel, points, values, CLOSE, added)
        covariance = implied(features, kernel, points, CLOSE, added) + 1e-9 * np.eye(len(CLOSE))
        drawn = np.asarray(paths(CLOSE))
        assert accepts(drawn, mean, covariance)
        # wrong answers are rejected: a mean alone, wide draws, another lengthscale
        assert not accepts(mean + 0.0 * drawn, mean, covariance)
        assert not accepts(mean + 1.3 * (drawn - mean), mean, covariance)
        assert not accepts(draw(stretched(kernel, 1.1))(CLOSE), mean, covariance)


@pytest.mark.long
def test_a_wrong_lengthscale_is_seen():
    kernel = RBF(1.2, 0.8)
    paths = draw_paths(
        jax.random.key(0), kernel, X, Y, noise=0.05, num_paths=16 * NUMBER, num_bases=4
    )
    values = paths(X_NEW)
    assert accepts(values, *posterior(kernel, X, Y, X_NEW, 0.05))
    assert not accepts(values, *posterior(RBF(1.2, 0.88), X, Y, X_NEW, 0.05))


@pytest.mark.long
def test_the_prior_draw_needs_the_jitter_too():
    """Noise and jitter of 1e-4 each: paths are too narrow if the prior draw has no jitter."""
    kernel, noise = RBF(1.0, 0.8), 1e-4
    points = np.linspace(0.0, 5.0, 40)[:, None]
    new = points[:-1:4] + 0.05
    paths = draw_paths(
        jax.random.key(0), kernel, points, np.sin(points[:, 0]),
        noise=noise, jitter=1e-4, num_paths=NUMBER, num_bases=1,
    )  # fmt: skip
    features = jax.tree.map(lambda leaf: leaf[0], paths.features)
    mean, _ = posterior(kernel, points, np.sin(points[:, 0]), new, 2e-4)
    covariance = implied(features, kernel, points, new, 2e-4)
    assert accepts(paths(new), mean, covariance)
    # the wrong answer: the prior draw has noise, but no jitter
    C = gram(kernel, points) + 2e-4 * np.eye(40)
    error = np.asarray(paths.rhs) - (np.sin(points[:, 0]) - np.asarray(paths.prior(points)))
    shrunk = np.asarray(paths.rhs) - error * (1 - np.sqrt(0.5))
    values = np.asarray(paths.prior(new)) + np.linalg.solve(C, shrunk.T).T @ gram(
        kernel, points, new
    )
    assert not accepts(values, mean, covariance)


@pytest.mark.long
@pytest.mark.parametrize("name", chosen(["sum", "product", "linear product", "Periodic", "Linear"]))
def test_composed_kernels_against_the_dense_posterior(name):
    """Mean and variance of many paths on many bases, for kernels without a published sampler."""
    kernel = KERNELS[name]
    paths = draw_paths(
        jax.random.key(1), kernel, X, Y, noise=0.05, num_paths=2000, num_features=512, num_bases=20
    )
    mean, covariance = posterior(kernel, X, Y, X_NEW, 0.05 + jitter(kernel, X))
    values = np.asarray(paths(X_NEW))
    error = np.sqrt(np.diag(covariance) / 2000)
    assert (abs(values.mean(axis=0) - mean) < 5 * error).all()
    assert_allclose(values.var(axis=0) / np.diag(covariance), 1.0, atol=0.16)


@pytest.mark.long
def test_the_draws_distance_is_that_of_exact_draws():
    """In 2-Wasserstein distance, draws are nearly as close to the truth as exact draws are."""
    from scipy.linalg import sqrtm

    def distance(values, mean, covariance):
        m, S = values.mean(axis=0), np.cov(values.T)
        root = sqrtm(covariance)
        cross = np.real(sqrtm(root @ S @ root))
        return np.sqrt(((m - mean) ** 2).sum() + np.trace(S + covariance - 2 * cross))

    points, new = inputs(512, 2, width=1.0), inputs(40, 2, seed=1, width=1.0)
    y = np.sin(6 * points.sum(axis=1))
    for kernel, most in ((RBF(1.0, 0.25), 1.10), (Matern52(1.0, 0.25), 1.15)):
        mean, covariance = posterior(kernel, points, y, new, 0.01)
        covariance = covariance + within(1e-10, 1e-6) * np.eye(40)
        L, ratios = np.linalg.cholesky(covariance), []
        for seed in range(5):
            paths = draw_paths(jax.random.key(seed), kernel, points, y, noise=0.01, num_paths=256)
            normal = np.random.default_rng(seed).normal(size=(256, 40))
            ours, theirs = np.asarray(paths(new)), mean + normal @ L.T
            ratios.append(distance(ours, mean, covariance) / distance(theirs, mean, covariance))
        assert np.mean(ratios) <= most, ratios


@pytest.mark.core
def test_solves_in_single_precision_are_refined(key):
    """A factor rounds by as much as the jitter: unrefined residuals are three times its root."""
    points = inputs(300, 1, width=3.0).astype(np.float32)
    y = np.sin(2 * points[:, 0])
    paths = draw_paths(key, RBF(1.0, 10.0), points, y, num_paths=50, num_bases=1, num_features=64)
    exact, alpha = np.float64(points), np.asarray(paths.alpha, float)
    K = np.exp(-0.5 * ((exact - exact.T) / 10.0) ** 2)
    added = float(paths.jitter)
    left = alpha @ (K + added * np.eye(300)) - np.asarray(paths.rhs, float)
    assert np.sqrt((left**2).mean()) < np.sqrt(added)


# Operations on paths ----------------------------------------------------------------------------

PATHS = {}


def some_paths(number=6, bases=2):
    if (number, bases) not in PATHS:
        PATHS[number, bases] = draw_paths(
            jax.random.key(0), RBF(1.2, 0.8), X, Y,
            noise=0.05, mean_fn=0.5, num_paths=number, num_features=64, num_bases=bases,
        )  # fmt: skip
    return PATHS[number, bases]


@pytest.mark.core
def test_one_key_is_one_set_of_functions():
    paths = some_paths()
    whole = paths(X_NEW)
    assert whole.shape == (6, 9)
    again = draw_paths(
        jax.random.key(0), RBF(1.2, 0.8), X, Y,
        noise=0.05, mean_fn=0.5, num_paths=6, num_features=64, num_bases=2,
    )  # fmt: skip
    assert_array_equal(again(X_NEW), whole)
    for i in range(9):
        assert_allclose(paths(X_NEW[i : i + 1])[:, 0], whole[:, i], **SAME)
    assert_allclose(paths(X_NEW[:, 0]), whole)
    old = draw_paths(jax.random.PRNGKey(0), RBF(), X, Y, noise=0.1, num_paths=2)
    assert old(X_NEW).shape == (2, 9)


@pytest.mark.long
def test_blocks_of_rows_agree(monkeypatch):
    from numpyro_ensemble.gp import solvers

    paths = some_paths()
    whole = paths._at(jnp.asarray(X_NEW))
    monkeypatch.setattr(solvers, "_ENTRIES", 300)
    again = paths._at(jnp.asarray(X_NEW))
    assert_allclose(again, whole, rtol=within(1e-10), atol=within(0.0, 2e-5))


@pytest.mark.long
def test_transformations():
    paths = some_paths()
    whole = paths(X_NEW)
    assert_allclose(jax.jit(paths)(X_NEW), whole, **SAME)
    assert_allclose(jax.jit(lambda p, x: p(x))(paths, X_NEW), whole, **SAME)
    each = jax.vmap(paths)(X_NEW[:, None])
    assert_allclose(each[..., 0].T, whole, **SAME)
    x, h = jnp.array([1.3]), within(1e-5, 1e-2)
    slope = jax.jacobian(lambda x: paths(x[None])[:, 0])(x)[:, 0]
    numeric = (paths((x + h)[None]) - paths((x - h)[None]))[:, 0] / (2 * h)
    assert_allclose(slope, numeric, rtol=within(1e-5, 1e-3), atol=within(0.0, 1e-3))
    with pytest.raises(ValueError, match="functions of 1 columns, got 2"):
        paths(np.zeros((3, 2)))


@pytest.mark.parametrize(
    "index",
    [2, np.array([5, 0, 0])]
    + [
        pytest.param(i, marks=pytest.mark.long)
        for i in (-1, slice(1, 5), slice(None, None, 2), np.arange(6) > 3)
    ],
)
def test_some_of_the_paths(index):
    paths = some_paths()
    part = paths[index]
    expected = np.atleast_2d(np.asarray(paths(X_NEW))[index])
    assert part.num_paths == len(expected)
    assert_allclose(part(X_NEW), expected, **SAME)
    assert_allclose(part[0](X_NEW), expected[:1], **SAME)


@pytest.mark.long
def test_a_traced_index_and_inputs_of_each_paths_own():
    paths = some_paths()
    whole = paths(X_NEW)
    one = jax.jit(lambda i: paths[i](X_NEW))(jnp.array(3))
    assert_allclose(one[0], whole[3], **SAME)
    some = jax.jit(lambda i: paths[i](X_NEW))(jnp.array([4, 1]))
    assert_allclose(some, whole[np.array([4, 1])], **SAME)
    places = np.stack([X_NEW[i : i + 3] for i in range(6)])
    own = paths.each(places)
    assert_allclose(own, [whole[i, i : i + 3] for i in range(6)], **SAME)
    with pytest.raises(ValueError, match=r"each takes inputs \(6, N, 1\)"):
        paths.each(X_NEW)


@pytest.mark.long
def test_concatenation_and_files(tmp_path):
    a, b = some_paths(), some_paths().update(np.array([5.5]), np.array([0.0]), noise=0.0)
    both = Paths.concatenate([a, a[:6]])
    assert both.num_paths == 12 and both.num_draws == 2
    assert_allclose(both(X_NEW), np.tile(a(X_NEW), (2, 1)), **SAME)
    assert_allclose(both[7](X_NEW)[0], a(X_NEW)[1], **SAME)
    with pytest.raises(ValueError, match="paths are concatenated where"):
        Paths.concatenate([a, b])
    leaves, treedef = jax.tree.flatten(a)
    np.savez(tmp_path / "paths.npz", *leaves)
    with np.load(tmp_path / "paths.npz") as file:
        loaded = jax.tree.unflatten(
            treedef, [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        )
    assert_array_equal(loaded(X_NEW), a(X_NEW))


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.long), True])
def test_an_update_conditions_the_same_functions(stacked):
    paths = some_paths()
    more, values = np.array([[-0.5], [5.7]]), np.array([0.2, -0.9])
    if stacked:
        paths = Paths.concatenate([paths, paths])
    sure = paths.update(more, values, noise=0.0)
    # accurate to the root of the jitter, which is 3e-3 in single precision
    known = within(1e-6, 2e-2)
    assert_allclose(sure(more), np.broadcast_to(values, (paths.num_paths, 2)), atol=known)
    # Matheron's rule by dense algebra, on the union of the points
    first = jax.tree.map(lambda leaf: leaf[0], sure) if stacked else sure
    union = np.concatenate([X, more])
    kernel = RBF(1.2, 0.8)
    C = gram(kernel, union) + np.diag(first.diagonal)
    assert_allclose(first.rhs[:, :15], some_paths().rhs, **SAME)
    expected = np.asarray(first.prior(X_NEW)) + 0.5
    expected += np.linalg.solve(C, np.asarray(first.rhs).T).T @ gram(kernel, union, X_NEW)
    assert_allclose(first(X_NEW), expected, rtol=within(1e-6), atol=within(0.0, 5e-5))
    own = paths(more) + 0.1  # values of each path, as for pending points
    assert_allclose(paths.update(more, own, noise=0.0)(more), own, atol=known)
    noisy = paths.update(more, values)  # with the noise of the paths
    assert abs(noisy(more) - values[None]).max() > within(1e-3, 0.1)
    with pytest.raises(
        ValueError, match=r"values take shape \(2,\) or.*for each input, or for each path"
    ):
        paths.update(more, np.zeros(3))


def test_an_update_keeps_noise_and_jitter_apart(key):
    paths = draw_paths(
        key, RBF(1.2, 0.8), X, Y,
        noise=np.full(15, 0.05), jitter=1e-3, num_paths=2, num_features=64,
    )  # fmt: skip
    more = paths.update(np.array([-0.5, 5.7]), np.zeros(2), noise=np.array([0.1, 0.2]))
    assert_allclose(more.diagonal[14:], [0.051, 0.101, 0.201], rtol=1e-5)
    assert_allclose(more.noise[14:], [0.05, 0.1, 0.2], rtol=1e-5)


@pytest.mark.long
def test_an_update_keeps_the_jitter_that_was_given(key):
    """The jitter may be above or below the default, which is 1.6e-14 for 15 points."""
    for given in (1e-12, 1e-18):
        paths = draw_paths(key, RBF(1.2, 0.2), X, Y, noise=0.05, jitter=given, num_features=64)
        more = paths.update(np.array([-0.5, 5.7]), np.zeros(2))
        assert_array_equal(more.jitter, jnp.asarray(given))
    default = draw_paths(key, RBF(1.2, 0.2), X, Y, noise=0.05, num_features=64)
    grown = default.update(np.array([-0.5, 5.7]), np.zeros(2)).jitter / default.jitter
    assert_allclose(grown, 17 / 15, rtol=1e-5)


@pytest.mark.long
def test_residuals_are_measured_or_left_out(key):
    """Measured residuals agree with residuals from the dense matrix in NumPy."""
    kernel, tolerance = Matern52(1.2, 0.8), within(1e-8, 1e-5)
    options = {"noise": 1e-3, "num_paths": 3, "num_features": 64}
    paths = draw_paths(key, kernel, X, Y, solver="cg", tolerance=tolerance, **options)
    C = gram(kernel, X) + np.diag(paths.diagonal)
    left = np.asarray(paths.rhs) - np.asarray(paths.alpha) @ C
    norms = np.linalg.norm(left, axis=1) / np.linalg.norm(paths.rhs, axis=1)
    assert_allclose(paths.residuals, norms, rtol=1e-2, atol=10 * float(jnp.finfo(float).eps))
    factored = draw_paths(key, kernel, X, Y, **options)
    assert (np.isnan(factored.residuals) == within(True, False)).all() and factored.ok.all()


@pytest.mark.long
def test_components_add_up():
    kernel = RBF(1.0, 0.8) + Periodic(0.5, 0.8, 1.3) + Linear(0.2)
    paths = draw_paths(
        jax.random.key(0), kernel, X, Y, noise=0.05, mean_fn=1.0, num_paths=4, num_features=96
    )
    parts = paths.components()
    assert len(parts) == 3
    added = sum(part(X_NEW) for part in parts)
    assert_allclose(added, paths(X_NEW), rtol=within(1e-7), atol=within(0.0, 2e-5))
    slope = np.diff(np.asarray(parts[2](X_NEW)), axis=1)
    linear = within({"rtol": 1e-6}, {"rtol": 1e-5, "atol": 3e-5})
    assert_allclose(slope, np.broadcast_to(slope[:, :1], slope.shape), **linear)


@pytest.mark.long
def test_functions_of_arrays_are_leaves_of_the_paths():
    import equinox as eqx

    net = eqx.nn.MLP(1, "scalar", 4, 1, key=jax.random.key(0))
    paths = draw_paths(jax.random.key(0), RBF(), X, Y, noise=0.1, mean_fn=jax.vmap(net))
    assert paths(X_NEW).shape == (1, 9)
    held = jax.tree_util.Partial(lambda net, x: jax.vmap(net)(x), net)
    with_net = draw_paths(jax.random.key(0), RBF(), X, Y, noise=0.1, mean_fn=held)
    assert_allclose(with_net(X_NEW), paths(X_NEW), **SAME)
    assert len(jax.tree.leaves(with_net.mean_fn)) == 4


@pytest.mark.long
def test_collapsed_paths_follow_the_optimal_inducing_values():
    Z = np.linspace(0.0, 5.0, 6)[:, None]
    gp = CollapsedSparseGP(RBF(1.0, 1.0), X, Z, 0.05)
    paths = gp.draw_paths(jax.random.key(0), Y, num_paths=2000, num_bases=20)
    mean, covariance = gp.predict(Y, X_NEW, full_cov=True)
    assert (abs(paths(X_NEW).mean(axis=0) - mean) < 5 * np.sqrt(np.diag(covariance) / 2000)).all()
    assert_allclose(paths(X_NEW).var(axis=0) / np.diag(covariance), 1.0, atol=0.16)


@pytest.mark.long
def test_conjugate_gradients_agree_with_cholesky():
    points = inputs(300, 2, width=2.0)
    y = np.sin(3 * points.sum(axis=1))
    options = {"noise": 0.01, "num_paths": 3, "num_features": 64}
    tolerance = within(1e-8, 1e-5)
    kernel, key = Matern52(1.0, 0.5), jax.random.key(0)
    dense = draw_paths(key, kernel, points, y, **options)
    iterated = draw_paths(key, kernel, points, y, solver="cg", tolerance=tolerance, **options)
    assert iterated.residuals.max() < 10 * tolerance and iterated.ok.all()
    assert_allclose(iterated(points), dense(points), atol=within(1e-5, 3e-4))
    with pytest.raises(
        ValueError, match=r"3 of 3 paths did not converge \(largest relative residual"
    ):
        draw_paths(key, kernel, points, y, solver="cg", tolerance=1e-30, **options)


@pytest.mark.long
def test_conjugate_gradients_with_missing_values():
    points, seen = inputs(300, 2, width=2.0), np.arange(300) % 4 > 0
    y, kernel, key = np.sin(3 * points.sum(axis=1)), Matern52(1.0, 0.5), jax.random.key(0)
    options = {"noise": 0.01, "num_paths": 3, "num_features": 64}
    cg = {"solver": "cg", "tolerance": within(1e-8, 1e-5)}
    part = draw_paths(key, kernel, points, y, observed=seen, **cg, **options)
    same = draw_paths(key, kernel, points, y, observed=seen, **options)
    assert_allclose(part(points), same(points), atol=within(1e-5, 3e-4))


@pytest.mark.single
@pytest.mark.core
def test_single_precision_has_no_nan():
    points = inputs(1000, 2, width=1.0).astype(np.float32)
    for lengthscale in (0.01, 0.3, 10.0):
        kernel = RBF(1.0, lengthscale)
        paths = draw_paths(
            jax.random.key(0), kernel, points, np.sin(points[:, 0]),
            noise=1e-4, num_paths=2, num_features=64,
        )  # fmt: skip
        values = paths(points[:50])
        assert values.dtype == jnp.float32 and np.isfinite(values).all()
        gp = GaussianProcess(kernel, points[:200])
        assert np.isfinite(gp.log_prob(gp.sample(jax.random.key(0))))


def twice(**options):
    points = np.concatenate([X, X[:1]])
    return draw_paths(jax.random.key(0), RBF(), points, np.append(Y, Y[0] + 1.0), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: draw_paths(key, RBF(), X, Y[:3]), r"values take shape \(15,\)"),
        (
            lambda key: draw_paths(key, RBF(), X, np.where(Y > 0.9, np.nan, Y)),
            r"values has \d of 15 entries that are not finite, at \(",
        ),
        (lambda key: draw_paths(key, RBF(), np.where(X > 4, np.inf, X), Y), "points has"),
        (lambda key: draw_paths(key, RBF(), X, Y, num_paths=0), "num_paths must be at least 1"),
        (lambda key: draw_paths(key, RBF(), X, Y, num_features=3), "num_features .* must be even"),
        (
            lambda key: draw_paths(key, RBF(), X, Y, noise=np.ones(3)),
            "noise takes one variance, or one for each",
        ),
        (lambda key: draw_paths(key, RBF(), X, Y, noise=-1.0), "not negative"),
        (lambda key: draw_paths(key, RBF(), X, Y, solver="lu"), "solver takes one of"),
        (lambda key: twice(), "values at equal points differ although noise is 0"),
        (lambda key: draw_paths(key, RBF(1e8, 50.0), X, Y, jitter=0.0), "could not be factored"),
    ],
)  # fmt: skip
def test_bad_input(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)


def test_repeated_points_with_noise_are_fine():
    assert np.isfinite(twice(noise=0.1)(X_NEW)).all()
