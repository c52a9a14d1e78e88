"""The log density of some rows of a model's plates, for kernels with stochastic gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_ensemble.density import Site, is_subsampled, model_sites, plate_of, unchecked_trace
from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mcmc.target import Target, density_of, with_values

_FOLLOW = (
    "Its data must follow the plate, by numpyro.subsample(y, event_dim=0) or by the indices that "
    "the plate gives: with numpyro.plate(...) as rows: y[rows]."
)
_START_ROWS = 1000  # fewest rows of starts: they determine 10 latents to about .1 of their scale

BatchSize = int | Mapping[str, int] | None


def check_batch_size(batch_size: Any) -> None:
    """Raise if a batch size is neither None, nor a number, nor a dict of numbers by plate."""
    if isinstance(batch_size, Mapping):
        for name, number in batch_size.items():
            check_count(f"batch_size[{name!r}]", number)
    elif batch_size is not None:
        check_count("batch_size", batch_size)


def drawn_rows(key: jax.Array, size: int, number: int) -> jax.Array:
    """Draw one row of each of `number` strata of `size` rows. Each row is equally likely.

    The variance is that of a draw without replacement if the rows are in random order, and smaller
    if they are sorted. NumPyro's draw takes a time proportional to `size`.
    """
    return rows_at(jax.random.randint(key, (number,), 0, size), size)


def rows_at(places: jax.Array, size: int) -> jax.Array:
    """Return one row of each stratum, the row that holds its place, 0 to `size - 1`.

    A row is `number` places wide and a stratum `size` places, so a row may belong to two strata.
    Then both strata may draw it.
    """
    number = places.shape[0]
    # stratum b begins at b * size / number
    first, rest = np.divmod(np.arange(number) * size, number)
    return jnp.asarray(first) + (jnp.asarray(rest) + places) // number


class Rows(Messenger):
    """A handler that sets the rows of subsampled plates: rows drawn by a key, or all rows.

    Args:
        fn: the model.
        batch_size: number of rows: None for the model's own `subsample_size`, a number for all
            subsampled plates, or a dict of numbers by the names of plates.
        key: a key, or None for all rows.
        fewest: smallest number of rows, if the plate has so many.
    """

    def __init__(
        self, fn: Callable, batch_size: BatchSize, key: jax.Array | None, fewest: int = 0
    ) -> None:
        self.batch_size, self.key, self.fewest = batch_size, key, fewest
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with JAX arrays: NumPy's cannot be indexed by traced rows."""
        with jax.ensure_compile_time_eval():
            args, kwargs = jax.tree.map(_as_jax, (args, kwargs))
        return super().__call__(*args, **kwargs)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the rows of a plate. Plates of the same name have the same rows."""
        if msg["type"] != "plate":
            return
        name, (size, asked) = msg["name"], msg["args"]
        number = self._number(name, asked)
        if number is None:
            return
        if number > size:
            raise ValueError(
                f"batch_size asks for {number} rows of plate {name!r}, which has {size}. Give "
                f"batch_size={{{name!r}: ...}}, {size} or fewer."
            )
        number = max(number, min(self.fewest, size))
        if self.key is None or number == size:
            msg["args"], msg["value"] = (size, size), jnp.arange(size)
            return
        key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
        msg["args"], msg["value"] = (size, number), drawn_rows(key, size, number)

    def _number(self, name: str, asked: int | None) -> int | None:
        if isinstance(self.batch_size, Mapping):
            return self.batch_size.get(name, asked)
        return asked if self.batch_size is None or asked is None else self.batch_size


def _as_jax(leaf: Any) -> Any:
    is_numeric = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"
    return jnp.asarray(leaf) if is_numeric else leaf


class _AtFixedRows:
    """A model whose subsampled plates always take the same rows."""

    def __init__(self, model: Callable, batch_size: BatchSize, fewest: int = 0) -> None:
        self.model, self.batch_size, self.fewest = model, batch_size, fewest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = Rows(self.model, self.batch_size, jax.random.key(0), self.fewest)
        return rows(*args, **kwargs)


class MinibatchTarget(Target):
    """A model whose log density can be computed on some rows.

    The methods of `Target` use 1,000 fixed rows, and serve the search for starts.
    """

    def __init__(self, model: Callable, batch_size: BatchSize, init_strategy: Callable) -> None:
        super().__init__(model, init_strategy=init_strategy)
        self.batch_size, self._whole = batch_size, model
        self._traced = self._some = _AtFixedRows(model, batch_size)

    def _with(self, fixed: dict[str, Any]) -> Callable:
        return with_values(_AtFixedRows(self._whole, self.batch_size, _START_ROWS), fixed)

    def density_of_rows(self, args: tuple, kwargs: dict) -> Callable[[Any, Any], jax.Array]:
        """Return the log density as a function of unconstrained values and a key (None: all rows).

        The mean over keys is the log density of all rows. The same holds for the gradient.
        """
        fixed, sums = self._settled(args, kwargs)

        def density(z: Any, key: jax.Array | None) -> jax.Array:
            model = with_values(Rows(self._whole, self.batch_size, key), fixed)
            return density_of(model, sums, args, kwargs, z)

        return density

    def _sites(self, args: tuple, kwargs: dict) -> dict[str, Site]:
        # raise errors that batch_size did not cause
        model_sites(_AtFixedRows(self._whole, None), args, kwargs)
        try:
            sites = super()._sites(args, kwargs)
            whole = model_sites(Rows(self._whole, self.batch_size, None), args, kwargs)
        except (TypeError, ValueError) as error:
            if self.batch_size is None:
                raise
            raise ValueError(
                f"the model cannot take the rows that batch_size={self.batch_size!r} asks for: "
                f"{error} {_FOLLOW}"
            ) from error
        some = [name for name, site in sites.items() if site.drawn_from is not None]
        for name, site in sites.items():
            inside = any(plate_of(frame, some) for frame, _ in site.plates)
            if site.role and not inside and site.shape != whole[name].shape:
                raise ValueError(
                    f"site {name!r} depends on the rows that plates {some} take, and is in none of "
                    f"them, so that nothing makes up for the other rows: its shape is "
                    f"{site.shape}, and {whole[name].shape} for all of them. Put it inside, one "
                    f"draw for each row (without to_event)."
                )
        return sites

    def _check_plates(self, sites: Mapping[str, Site]) -> None:
        """Check the model's plates.

        Raises:
            ValueError: if no plate is subsampled, if a subsampled plate holds latents, or if a site
                inside it has the data of all rows.
        """
        plates = {name: site for name, site in sites.items() if site.kind == "plate"}
        asked = self.batch_size if isinstance(self.batch_size, Mapping) else {}
        unknown = [name for name in asked if name not in plates]
        if unknown:
            raise ValueError(
                f"batch_size names {unknown}, and the plates of the model are {list(plates)}: "
                f"name one of these."
            )
        some = {name: site for name, site in plates.items() if site.drawn_from is not None}
        if not some:
            raise ValueError(
                f"no plate of the model takes some of its rows (plates: {list(plates)}), so that "
                f"there is no minibatch. Write numpyro.plate('data', N, subsample_size=100) around "
                f"the data and numpyro.subsample(y, event_dim=0) in it, or name a plate whose data "
                f"are taken so: SGMCMC(model, batch_size={{'data': 100}}). For gradients of all "
                f"rows take MCLMC(model)."
            )
        for site in sites.values():
            for frame, _ in site.plates:
                plate = plate_of(frame, some)
                if plate is not None:
                    _check_inside(site, some[plate])

    def _of_some_rows(self, args: tuple, kwargs: dict) -> set[str]:
        trace = unchecked_trace(self._some, args, kwargs)
        some = {name for name, site in trace.items() if is_subsampled(site)}

        def within(site: dict[str, Any]) -> bool:
            return any(plate_of(frame.name, some) for frame in site["cond_indep_stack"])

        return {k for k, v in trace.items() if v["type"] == "deterministic" and within(v)}


def _check_inside(site: Site, plate: Site) -> None:
    """Raise a ValueError for a site that cannot be inside a subsampled plate."""
    taken, rows = plate.shape[0], plate.drawn_from or 0
    if site.kind in ("latent", "discrete"):
        raise ValueError(
            f"latent site {site.name!r} is in plate {plate.name!r}, of which {taken} of {rows} "
            f"rows are taken at random: the next step would see others of its values. Sum or "
            f"integrate it out of the model, leave the plate whole, or take "
            f"MCLMC(model) or MAMS(model) with all rows."
        )
    if site.kind != "observed":
        return
    batch = site.shape[: len(site.shape) - site.event_dim]
    if batch.count(rows) > [size for _, size in site.plates].count(rows):
        raise ValueError(
            f"site {site.name!r} has the data of all {rows} rows in plate {plate.name!r}, of which "
            f"{taken} are taken. {_FOLLOW}"
        )
