"""Description of a foreign model for the driver: the model, its data, and known facts."""

from collections.abc import Callable
from typing import Any, NamedTuple

FITS = ("MAP", "AutoNormal", "AutoMultivariateNormal", "AutoLaplaceApproximation")
SAMPLERS = ("ChEES", "MEADS")
ALL = (*FITS, "Predictive", "ArviZ", "NUTS", *SAMPLERS)


class Size(NamedTuple):
    """Numbers of chains and iterations."""

    chains: int = 64
    warmup: int = 500
    draws: int = 500
    nuts_chains: int = 4

    def at_most(self, other: "Size | None") -> "Size":
        """Return the smaller numbers of the two."""
        return self if other is None else Size(*map(min, self, other))


def says_unmixed(notes: list[str]) -> bool:
    """Return whether a run warns that its chains have not mixed or did not move."""
    return any("have not mixed" in note or "did not move" in note for note in notes)


class Case(NamedTuple):
    """A model that somebody else wrote, with data of our own.

    Attributes:
        model: the model.
        args: arguments of the call.
        kwargs: keyword arguments of the call.
        guide: a hand-written guide; the model is then fitted with it alone.
        optim: the optimiser of its fits (default: Adam, with small steps).
        enumerated: the model sums out discrete latents, so its loss is `TraceEnum_ELBO`.
        single: the model itself runs in single precision only.
        size: the largest numbers of chains and iterations, for models where more take minutes.
        reverse_only: the gradient has no forward derivative, which draws of a Laplace guide need.
        refused: by column that does not run, a part of the message that tells the user why.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    guide: Callable[..., Any] | None = None
    optim: Any = None
    enumerated: bool = False
    single: bool = False
    size: Size | None = None
    reverse_only: bool = False
    refused: dict[str, str] = {}
