"""ArviZ data in a Zarr store: large groups block by block, and the others at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble.predict.assembly import OF_MEMBERS, read_arviz
from numpyro_ensemble.predict.blocks import Predictions
from numpyro_ensemble.predict.collect import Draws, Sites, collect
from numpyro_ensemble.predict.densities import Computed, Wanted
from numpyro_ensemble.predict.density_blocks import SUMS, Densities
from numpyro_ensemble.sharding import Placement
from numpyro_ensemble.streaming.blocks import Block, Grid, Output, grid_for
from numpyro_ensemble.streaming.forms import SiteForm, site_forms, tried_forms
from numpyro_ensemble.streaming.options import StoreOptions, argument_digests, tree_digests
from numpyro_ensemble.streaming.rows import Rows
from numpyro_ensemble.streaming.store import BlockStore, import_zarr
from numpyro_ensemble.streaming.trial import stored_name
from numpyro_ensemble.streaming.writing import coords_of, library_attributes, write_blocks
from numpyro_ensemble.vi import EnsembleVI

_LP = "sample_stats/lp"


class Cut(NamedTuple):
    """A call of a model, and its rows if they are cut.

    Attributes:
        args: arguments of the model.
        kwargs: its keyword arguments.
        rows: of the call, None if they are not cut.
        forms: of the sites with few rows and with twice as many, None if rows are not cut.
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: Rows | None = None
    forms: tuple[dict[str, SiteForm], dict[str, SiteForm]] | None = None

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict, options: StoreOptions) -> Cut:
        """Return the call, cut as the user says."""
        rows = options.rows_of(model, args, kwargs)
        if rows is None:
            return cls(args, kwargs)
        return cls(args, kwargs, rows, tried_forms(partial(site_forms, model), rows))

    @property
    def few(self) -> tuple[tuple, dict]:
        """The call with the rows that the model is tried with, or all of it."""
        return (self.args, self.kwargs) if self.rows is None else self.rows.at(self.rows.tried)

    @property
    def axes(self) -> dict[str, int]:
        """Axes of the rows, of the values of sites that have them."""
        if self.forms is None:
            return {}
        small, large = self.forms
        return {
            name: next(i for i, n in enumerate(form.shape) if n != small[name].shape[i])
            for name, form in large.items()
            if form.type in ("sample", "deterministic")
            and small[name].shape != form.shape
            and len(small[name].shape) == len(form.shape)
        }

    def collect(
        self,
        inference: Any,
        result: Any,
        key: jax.Array,
        number: int | None,
        on_failed: str,
        members: Any = None,
    ) -> Draws:
        """Return the draws of a fit. Draws of a guide do not need all rows."""
        call = self.few
        if self.rows is None or self.forms is None:
            return collect(inference, result, key, number, *call, on_failed, members)
        own = [n for n in self.axes if self.forms[1][n].type == "sample"]
        latent = any(not self.forms[1][name].observed for name in own)
        if latent or not isinstance(getattr(inference, "guide", None), AutoGuide | None):
            call = (self.args, self.kwargs)
        draws = collect(inference, result, key, number, *call, on_failed, members)
        if not isinstance(inference, EnsembleVI):
            return draws
        computed = {n for n, form in self.forms[1].items() if form.type == "deterministic"}
        return draws._replace(
            samples={name: x for name, x in draws.samples.items() if name not in computed}
        )

    def sites(self, model: Callable, draws: Draws) -> Sites:
        """Return the sites of the model; latents of single rows have the shape for all rows."""
        sites = Sites.of(model, *self.few, draws.samples)
        if self.rows is None:
            return sites
        for name in sites.latent.keys() & self.axes.keys():
            shape = list(sites.shapes[name])
            shape[self.axes[name]] = self.rows.total
            sites.latent[name] = np.broadcast_to(0.0, shape)
        return sites

    def observed(self, model: Callable, draws: Draws, grid: Grid) -> dict[str, Any]:
        """Return the data of all observed sites, with all rows."""
        if self.rows is None:
            return Sites.of(model, self.args, self.kwargs, draws.samples).observed
        call, axes = (self.args, self.kwargs), self.axes
        parts = [
            Sites.of(model, *self.rows.cut(call, rows), draws.samples).observed
            for rows in grid.row_cuts
        ]
        return {
            name: np.concatenate([part[name] for part in parts], axes[name])
            if name in axes
            else value
            for name, value in parts[0].items()
        }


class Streamed:
    """The groups of one call that go to a store block by block.

    Args:
        cut: the call.
        draws: of members.
        sites: of the model.
        predictive: an `EnsemblePredictive`, None without predictions.
        wanted: names of the sites whose values or log densities are computed.
        keys: the second is for densities, the third for predictions.
        options: the user's options of the store.
        placement: the devices that draws are spread over.
    """

    def __init__(
        self,
        cut: Cut,
        draws: Draws,
        sites: Sites,
        predictive: Any,
        wanted: Wanted,
        keys: jax.Array,
        options: StoreOptions,
        placement: Placement,
    ) -> None:
        import_zarr()
        self.cut, self.draws, self.sites, self.options = cut, draws, sites, options
        call = (cut.args, cut.kwargs, cut.rows)
        self.densities: Densities | None = None
        self.predictions: Predictions | None = None
        if not sites.discrete:
            self.densities = Densities(draws, sites, wanted, keys[1], *call, cut.forms, placement)
        if predictive is not None:
            self.predictions = Predictions(predictive, keys[2], *call, "posterior_predictive")

    def write(self, store: Any, assembled: Callable[[Computed, dict], Any]) -> Any:
        """Write all groups, and return data that read from the store.

        Args:
            store: a path, or a store of Zarr's.
            assembled: makes ArviZ data of the densities and other groups.
        """
        parts = [part for part in (self.densities, self.predictions) if part is not None]
        outputs = [self._named(output) for part in parts for output in part.outputs]
        grid = self._grid(parts, outputs)
        if self.densities is not None:
            outputs.append(self.densities.sums(grid))
        coords = self._coords(outputs)
        started = [part.started(grid) for part in parts]

        def start(block: Block) -> Callable[[], dict[str, Any]]:
            waits = [begin(block) for begin in started]
            return lambda: {path: x for wait in waits for path, x in wait().items()}

        opened = BlockStore(store, self._fingerprint(grid, outputs), len(grid))
        try:
            if not opened.written:
                for path, values in coords.items():
                    opened.put(path, (path.rpartition("/")[2],), values)
            write_blocks(opened, grid, outputs, start, progress_bar=self.options.progress_bar)
            self._finish(opened, grid, outputs, assembled)
        finally:
            opened.close()
        return read_arviz(opened.store)

    def _named(self, output: Output) -> Output:
        """Return an output with the dimensions that the user names."""
        given = {stored_name(name): names for name, names in self.options.dims.items()}
        names = given.get(output.path.rpartition("/")[2], [])[: len(output.shape)]
        return output._replace(dims=(*names, *output.dims[len(names) :]))

    def _grid(self, parts: list, outputs: list[Output]) -> Grid:
        rows, options = self.cut.rows, self.options
        most = None
        if rows is not None and options.row_batch_size is None and parts:
            most = min(part.most_rows for part in parts)
        return grid_for(
            *self.draws.shape,
            outputs,
            rows=1 if rows is None else rows.total,
            most_rows=most,
            row_size=options.row_batch_size,
        )

    def _coords(self, outputs: list[Output]) -> dict[str, Any]:
        groups = dict.fromkeys(output.path.rpartition("/")[0] for output in outputs)
        found: dict[str, Any] = {}
        for group in groups:
            own = [o for o in outputs if o.path.startswith(f"{group}/") and not o.sums]
            number = self.draws.shape[1]
            of_group = coords_of(own, self.draws.members, number, self.options.coords)
            found |= {f"{group}/{dim}": values for dim, values in of_group.items()}
        return found

    def _fingerprint(self, grid: Grid, outputs: list[Output]) -> dict[str, dict[str, str]]:
        cut, draws = self.cut, self.draws
        predicted = {} if self.predictions is None else self.predictions.fingerprint["setting"]
        return {
            "argument": argument_digests(draws.model, cut.args, cut.kwargs, cut.rows),
            "sample": tree_digests(draws.samples),
            "parameter": tree_digests(draws.params),
            "setting": predicted,
            **self.options.fingerprint(grid, outputs),
        }

    def _finish(
        self,
        opened: BlockStore,
        grid: Grid,
        outputs: list[Output],
        assembled: Callable[[Computed, dict], Any],
    ) -> None:
        """Write the groups that fit into memory, and attributes and coordinates of the others."""
        draws, values = self.draws, Computed({}, None, {}, {}, {})
        if self.densities is not None:
            given = {n: draws.samples[n] for n in self.sites.deterministic if n in draws.samples}
            # without SUMS, an earlier call was stopped below, after lp had been written
            density = opened.read(SUMS).sum(axis=-1) if opened.has(SUMS) else opened.read(_LP)
            values = Computed(given, density, {}, {}, {})
        data = assembled(values, {"observed_data": self.cut.observed(draws.model, draws, grid)})
        groups = list(data.children) if hasattr(data, "children") else data.groups()
        attrs = dict(data[groups[0]].attrs)
        streamed = {output.path.rpartition("/")[0] for output in outputs}
        for group in streamed:
            opened.describe(group, attrs)
        for group in groups:
            dataset = data[group]
            opened.describe(group, dataset.attrs)
            for name, variable in dataset.variables.items():
                opened.put(f"{group}/{name}", variable.dims, variable.values)
        if draws.origins is not None:
            for group in streamed.union(groups).intersection(OF_MEMBERS):
                opened.put(f"{group}/member", ("chain",), draws.origins)
                opened.describe(group, {"coordinates": "member"})
        opened.describe("", library_attributes())
        opened.delete(SUMS)
        opened.finish()
