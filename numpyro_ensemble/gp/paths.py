"""Posterior functions: Matheron's rule on one random basis, or several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.conditioning import check_agrees, check_solved, check_updatable, updated
from numpyro_ensemble.gp.inputs import as_inputs, check_finite, diagonal
from numpyro_ensemble.gp.path_arrays import PER_PATH, PathArrays, evaluated
from numpyro_ensemble.handlers import one_key
from numpyro_ensemble.mapping import pick


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Paths(PathArrays):
    """Functions drawn from a posterior Gaussian process: `paths(X_new) -> (num_paths, N_new)`.

    A pytree of arrays: it can be jitted, mapped over inputs, differentiated, indexed, concatenated,
    saved with the leaves of `jax.tree.flatten`, and conditioned further with `update`. `each`
    evaluates each path at its own inputs. Evaluation is deterministic.

    With many draws of the hyperparameters, all arrays have a leading axis of draws. The paths of
    one draw follow each other.

    Attributes:
        kernel: the kernel, or the kernels of all draws.
        mean_fn: None, a number or a function.
        points: inputs `(N, D)` that the functions were conditioned at.
        features: `B` random bases.
        weights: weights of the bases' columns, `(B, Q, F)`; `Q` paths share a basis.
        order: index of each path among the `B * Q`, `(P,)`.
        number: index of each path within its draw, for the noise of later updates, `(P,)`.
        alpha: weights of the kernel functions at the points, `(P, N)`.
        rhs: values - mean - prior - noise, `(P, N)`.
        diagonal: noise and jitter at the points, `(N,)`.
        noise: variance of the observations' noise, a number or `(N,)`; 0 for latent processes.
        jitter: part of the diagonal that is not noise, a number or `(N,)`.
        observed: which values are observed, `(N,)`, or None.
        residuals: relative residuals of the solves, `(P,)`; NaN for a Cholesky solve in double
            precision, where they are not computed.
        ok: whether each path's solve succeeded, `(P,)`.
        seed: random bits for the noise of later updates.
        part: whether these are the paths of one term of a sum.
        latent: whether the values are draws of latent values with an unknown covariance.
        copies: number of processes of a plate; path `i` is a path of process `i % copies`.
        keeps_jitter: whether the jitter was given, so that updates keep it.
        whitened: `L^-1 S L^-T`, `(M, M)`, with S the posterior covariance of the values at the
            first `M` points, and L the Cholesky factor of their prior covariance; None where the
            values are data.

    The example of `gp.draw_paths` makes one.
    """

    def __len__(self) -> int:
        return self.num_paths

    # Evaluation ---------------------------------------------------------------------------------

    def __call__(self, X: ArrayLike) -> jax.Array:
        """Evaluate all paths at inputs `(N, D)`, or `(N,)` in one dimension: `(num_paths, N)`."""
        return evaluated(self, self._inputs(X))

    def prior(self, X: ArrayLike) -> jax.Array:
        """Evaluate the prior functions that the paths were made of, without the mean."""
        X = self._inputs(X)
        if self.num_draws is None:
            return self._prior_at(X).T
        prior = jax.lax.map(lambda paths: paths._prior_at(X).T, self)
        return prior.reshape(self.num_paths, len(X))

    def each(self, X: ArrayLike) -> jax.Array:
        """Evaluate each path at inputs of its own, `(num_paths, N, D)`: `(num_paths, N)`."""
        check_finite("X", X)
        X = jnp.asarray(X)
        shape = (self.num_paths, self.points.shape[-1])
        if X.ndim != 3 or (len(X), X.shape[2]) != shape:
            raise ValueError(f"each takes inputs ({shape[0]}, N, {shape[1]}), got shape {X.shape}.")
        return jax.vmap(lambda i, x: self[i]._at(x)[0])(jnp.arange(self.num_paths), X)

    def _inputs(self, X: ArrayLike) -> jax.Array:
        X = as_inputs(X)
        if X.shape[1] != self.points.shape[-1]:
            raise ValueError(
                f"the paths are functions of {self.points.shape[-1]} columns, got {X.shape[1]}: "
                f"give inputs with the columns of the fit."
            )
        self.kernel.check_inputs(X)
        return X

    # Parts --------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Paths:
        """Return some of the paths; an integer returns a `Paths` of one path."""
        places: Any = np.arange(self.num_paths)
        if isinstance(index, jax.core.Tracer):
            places = jnp.asarray(index)
            if not jnp.issubdtype(places.dtype, jnp.integer):
                raise TypeError(f"inside a transformation paths take whole numbers, got {index!r}.")
        else:
            places = places[np.asarray(index) if isinstance(index, jax.Array) else index]
        whole = replace(self, copies=self._copies_among(places))
        if places.ndim == 0:
            return whole._one(places)
        if self.num_draws is None and not has_tracers((places, self.order)):
            return whole._some(places)
        return jax.vmap(whole._one)(jnp.asarray(places))

    def _copies_among(self, places: Any) -> int:
        """Return the number of processes among some of the paths.

        It is the number of paths if the places are traced or do not follow the order of copies.
        """
        if self.copies == 1 or places.ndim == 0:
            return 1
        if has_tracers(places):
            return len(places)
        copy = places % self.copies
        if (copy == copy[:1]).all():
            return 1
        groups = np.resize(np.arange(self.copies), len(copy))
        whole = len(copy) % self.copies == 0 and (copy == groups).all()
        return self.copies if whole else len(copy)

    def _one(self, i: Any) -> Paths:
        if self.num_draws is not None:
            draw, i = jnp.divmod(i, self.alpha.shape[1])
            return pick(self, draw)._one(i)
        basis, place = jnp.divmod(self.order[i], self.weights.shape[1])
        return replace(
            self,
            features=jax.tree.map(lambda leaf: leaf[basis][None], self.features),
            weights=self.weights[basis, place][None, None],
            order=jnp.zeros(1, int),
            **{name: getattr(self, name)[i][None] for name in PER_PATH},
        )

    def _some(self, places: np.ndarray) -> Paths:
        """Return the paths at known places, with their weights grouped by basis."""
        basis, within = np.divmod(np.asarray(self.order)[places], self.weights.shape[1])
        used, basis = np.unique(basis, return_inverse=True)
        most = int(np.bincount(basis).max(initial=1))
        order, kept = np.empty(len(places), int), np.zeros((len(used), most), int)
        for b in range(len(used)):
            mine = np.flatnonzero(basis == b)
            kept[b, : len(mine)] = within[mine]
            order[mine] = b * most + np.arange(len(mine))
        return replace(
            self,
            features=pick(self.features, used),
            weights=self.weights[used[:, None], kept],
            order=jnp.asarray(order),
            **{name: getattr(self, name)[places] for name in PER_PATH},
        )

    def components(self) -> list[Paths]:
        """Return the paths of each term of the kernel's sum, which add up to the paths.

        The mean is part of the first.
        """
        terms = self.kernel.terms()
        first = (0,) if self.num_draws is None else (0, 0)
        sizes = pick(self.features, *first).sizes(self.points.shape[-1])
        ends = np.cumsum(sizes)
        return [
            replace(
                self,
                kernel=term,
                mean_fn=None if i else self.mean_fn,
                features=replace(self.features, blocks=(self.features.blocks[i],)),
                weights=self.weights[..., ends[i] - sizes[i] : ends[i]],
                part=True,
            )
            for i, term in enumerate(terms)
        ]

    @staticmethod
    def concatenate(parts: list[Paths]) -> Paths:
        """Concatenate sets of paths with equal shapes.

        Raises:
            ValueError: if the shapes or the forms of the kernels differ.
        """
        stacked = [
            part if part.num_draws is not None else jax.tree.map(lambda leaf: leaf[None], part)
            for part in parts
        ]
        forms = {
            (jax.tree.structure(part), tuple(x.shape[1:] for x in jax.tree.leaves(part)))
            for part in stacked
        }
        if len(forms) != 1:
            raise ValueError(
                "paths are concatenated where their kernels are of one form and their numbers of "
                "points, features and paths agree."
            )
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacked)

    # Conditioning -------------------------------------------------------------------------------

    def update(
        self,
        X: ArrayLike,
        values: ArrayLike,
        *,
        noise: ArrayLike | None = None,
        rng_key: jax.Array | None = None,
    ) -> Paths:
        """Condition the same functions on more points.

        Inducing values are updated too, by their joint posterior with the new observations. Draws
        of the hyperparameters keep their equal weights.

        Args:
            X: inputs `(M, D)` or `(M,)`.
            values: `(M,)`, `(copies, M)` for processes in a plate, or `(num_paths, M)` with values
                for each path (pending points).
            noise: variance of the values (default: that of the paths, if it is one number).
            rng_key: key of the noise drawn here (default: from the bits stored in the paths).

        Raises:
            ValueError: if shapes do not match, the noise is not known, or the paths are of latent
                values whose posterior covariance is not known.
        """
        check_updatable(self, noise)
        check_finite("values", values)
        X, values = self._inputs(X), jnp.asarray(values, self.alpha.dtype)
        rows = self.copies if values.ndim == 2 and len(values) == self.copies else self.num_paths
        if values.shape != (rows, len(X)) and (values.shape != (len(X),) or self.copies > 1):
            each = f"({self.copies}, {len(X)})" if self.copies > 1 else f"({len(X)},)"
            owners = f"process of the {self.copies}" if self.copies > 1 else "input"
            raise ValueError(
                f"values take shape {each} or ({self.num_paths}, {len(X)}), got {values.shape}: "
                f"give values for each {owners}, or for each path."
            )
        if noise is not None:
            diagonal("noise", noise, X)
        if rows < self.num_paths:
            values = jnp.tile(values, (self.num_paths // rows, 1))
        check_agrees(self, X, values, noise)
        more = updated(self, X, values, noise, None if rng_key is None else one_key(rng_key))
        check_solved(more)
        return more
