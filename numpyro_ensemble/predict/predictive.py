"""Predictions from all members: NumPyro's `Predictive` for each, in one bounded program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.fit.state import Setup
from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mapping import ROOM, pick
from numpyro_ensemble.predict.checks import check_model, check_returned
from numpyro_ensemble.predict.given import read_given
from numpyro_ensemble.predict.program import Places, PredictiveProgram, places_of
from numpyro_ensemble.predict.stored import write_predictions
from numpyro_ensemble.sharding import Placement, as_mesh
from numpyro_ensemble.streaming.forms import RowPlan
from numpyro_ensemble.streaming.options import StoreOptions, call_digests


class EnsemblePredictive:
    """Predictions from all members of an ensemble, called as NumPyro's `Predictive` is.

    The first axis of each prediction has the `E * num_samples` draws of E members. With
    `group_by_member=True`, and for samples given as `(E, S, ...)`, predictions have shape
    `(E, num_samples, ...)`. Members that are not finite are left out.

    Args:
        model: a NumPyro model.
        posterior_samples: an `EnsembleResult`, or a dict of samples by site name with leading axes
            `(E,)`, or `(E, S)` if `batch_ndims=2`. A variational result also needs `guide`.
        params: parameters of the model and the guide, each with a leading axis `(E,)`.
        guide: draws the latents, with each member's parameters.
        num_samples: draws per member, 1 by default; needed with a guide and for prior predictions.
        return_sites: names of the sites to return (default: the model's sample sites that were not
            given, and its deterministic ones).
        group_by_member: return `(E, num_samples, ...)`.
        weights: mixture weights `(E,)`: members are resampled by these weights, and the total
            number of draws stays the same.
        batch_size: draws made at once (default: as many as fit into a quarter of a gigabyte).
        parallel: True makes all draws at once, False one at a time.
        batch_ndims: number of leading axes of the samples, 0 (one member), 1 or 2.
        infer_discrete: as in `Predictive`.
        condition_deterministic: as in `Predictive`.
        on_failed: "warn" leaves out members that are not finite and warns, "raise" raises an error.
        mesh: devices that predictions are spread over: a `jax.sharding.Mesh` with an axis "member",
            or "all".

    Raises:
        ValueError: for samples with unequal leading axes, invalid weights, a result of
            another model, or options that contradict each other.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsemblePredictive
        >>> def model(x, y=None):
        ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
        >>> predictive = EnsemblePredictive(model, {"w": jnp.array([1.0, 2.0])}, num_samples=50)
        >>> predictive(jax.random.key(0), jnp.ones(3))["y"].shape
        (100, 3)
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Any = None,
        *,
        params: Any = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = None,
        group_by_member: bool = False,
        weights: ArrayLike | None = None,
        batch_size: int | None = None,
        parallel: bool | None = None,
        batch_ndims: int | None = None,
        infer_discrete: bool = False,
        condition_deterministic: bool = False,
        on_failed: str = "warn",
        mesh: Mesh | str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model takes a callable with NumPyro primitives, got {model!r}.")
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        if isinstance(return_sites, str):
            raise TypeError(f"return_sites takes a collection of names, got {return_sites!r}.")
        if on_failed not in ("warn", "raise"):
            raise ValueError(f'on_failed takes "warn" or "raise", got {on_failed!r}.')
        if batch_size is not None and parallel is not None:
            raise ValueError("give either batch_size or parallel, not both.")
        if weights is not None and group_by_member:
            raise ValueError(
                "weights resample the members, so draws cannot be grouped by member: leave out "
                "weights or group_by_member."
            )
        self.model, self.guide = model, guide
        self.return_sites = None if return_sites is None else list(return_sites)
        self.infer_discrete = infer_discrete
        self.condition_deterministic = condition_deterministic
        self.batch_size, self.parallel = batch_size, parallel
        given = read_given(posterior_samples, params, guide, num_samples, batch_ndims, on_failed)
        if group_by_member and given.size is None:
            raise ValueError("group_by_member needs members: posterior_samples, or params.")
        self.given, self.num_samples = given, given.number
        self.grouped = group_by_member or given.ndims == 2
        self.weights = given.finite_weights(weights)
        self.setup = self._setup_of_guides()
        self.placement = Placement(mesh=as_mesh(mesh))
        self.placement.check(self.ensemble_size * self.num_samples, "predictions")
        self.programs = Programs()

    @property
    def ensemble_size(self) -> int:
        """Number of members E, 1 where there are none."""
        return self.given.size or 1

    def _setup_of_guides(self) -> Setup | None:
        """Return the set-up of the fit's guides, if the given guide is of their kind."""
        setup = self.given.setup
        if setup is None or setup.template is None or not isinstance(self.guide, AutoGuide):
            return None
        fitted: Any = setup.template.guide
        same = type(fitted) is type(self.guide) and fitted.prefix == self.guide.prefix
        return setup if same else None

    # The call -----------------------------------------------------------------------------------

    def __call__(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return predictions by site name.

        Args:
            rng_key: one key.
            *args: arguments of the model; leave observed ones out (None), or they are returned.
            **kwargs: keyword arguments of the model.
        """
        rng_key = one_key(rng_key)
        given, program = self.given, self.program()
        drawn = (rng_key, given.samples, given.params, self.model, args, kwargs)
        self.placement.check_alike(partial(call_digests, *drawn))
        inputs = (rng_key, self.places(rng_key), given.samples, given.params, program.guide_values)
        predictions = self.programs.call(
            program, self.placement.fill(inputs, None), self.model, args, kwargs, *program.key,
            prepare=lambda: check_model(self, args, kwargs), placement=self.placement,
        )  # fmt: skip
        predictions = home(predictions)
        check_returned(self.return_sites, predictions)
        if self.given.ndims == 0:
            return predictions if self.num_samples > 1 else pick(predictions, 0)
        if not self.grouped or self.weights is not None:
            return predictions
        shape = (self.ensemble_size, self.num_samples)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), predictions)

    @checked_keywords
    def to_zarr(
        self,
        store: Any,
        rng_key: jax.Array,
        *args: Any,
        row_args: Iterable[str | int] | None = None,
        row_batch_size: int | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, list[str]] | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Write predictions to a Zarr store, block by block, and return them as a dataset on disk.

        Memory holds three blocks of 24 MiB, and the values that a model needs to compute one. With
        blocks of draws alone, the numbers are those of the call with the same key (products of
        matrices to rounding). With blocks of rows too, each block has its own key for the random
        numbers of its rows, so these depend on `row_batch_size`. Everything else is equal to
        rounding. If a call was stopped, the same call continues it.

        Args:
            store: a path, or a store of Zarr's.
            rng_key: one key.
            *args: arguments of the model; leave observed ones out (None).
            row_args: names or positions of the arguments with rows along their leading axes, to cut
                the call by these rows. The rows of the model must be independent of each other.
            row_batch_size: rows of a block (default: as many as fit).
            coords: coordinates by dimension.
            dims: dimensions by site; those of plates and `infer={"event_dims": ...}` are known.
            progress_bar: show how many blocks are written.
            **kwargs: keyword arguments of the model.

        Returns:
            An `xarray.Dataset` that reads from the store: members are `chain`, draws are `draw`.
            The draws of a mixture (`weights=`) are one chain.

        Raises:
            ValueError: for a store of another call or a finished store, and for a model whose rows
                depend on each other, if `row_args` is given.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, tempfile
            >>> from numpyro_ensemble import EnsemblePredictive
            >>> def model(x, y=None):
            ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            ...     with numpyro.plate("rows", len(x)):
            ...         numpyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
            >>> predictive = EnsemblePredictive(model, {"w": jnp.ones((2, 50))}, batch_ndims=2)
            >>> path = tempfile.mkdtemp()
            >>> data = predictive.to_zarr(
            ...     path, jax.random.key(0), jnp.ones(30), row_args=["x"], row_batch_size=10,
            ...     progress_bar=False,
            ... )
            >>> dict(data["y"].sizes)
            {'chain': 2, 'draw': 50, 'rows': 30}
        """
        options = StoreOptions(row_args, row_batch_size, coords or {}, dims or {}, progress_bar)
        return write_predictions(self, store, one_key(rng_key), args, kwargs, options)

    # What programs are made of ------------------------------------------------------------------

    def program(self, plan: RowPlan | None = None, room: int = ROOM) -> PredictiveProgram:
        """Return the program of a call. Its rows are cut if a plan is given."""
        total = self.ensemble_size * self.num_samples
        at_once = self.batch_size
        if self.parallel is not None:
            at_once = total if self.parallel else 1
        return PredictiveProgram(
            self.model,
            self.guide,
            self.setup,
            self.return_sites,
            self.infer_discrete,
            self.condition_deterministic,
            at_once,
            total,
            self.given.ndims,
            self.weights is None and self.given.size is not None,
            self.placement,
            plan,
            room,
        )

    def places(self, rng_key: jax.Array) -> Places:
        """Return member and draw of each prediction, `(E, S)`, or `(1, E * S)` of a mixture."""
        return places_of(rng_key, self.ensemble_size, self.num_samples, self.weights)
