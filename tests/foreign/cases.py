"""What a foreign model is to the driver: the model, its data, and what is known of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

FITS = ("MAP", "AutoNormal", "AutoMultivariateNormal", "AutoLaplaceApproximation")
SAMPLERS = ("ChEES", "MEADS")
ALL = (*FITS, "Predictive", "ArviZ", *SAMPLERS)
DISCRETE = {name: "is discrete" for name in ("MAP", *SAMPLERS)}


class Case(NamedTuple):
    """A model that somebody else wrote, with data of our own.

    Attributes:
        model: the model.
        args: what it is called with.
        kwargs: keyword arguments of the call.
        guide: a hand-written guide; the model is then fitted with it alone.
        optim: the optimiser of its fits (default: Adam, with small steps).
        enumerated: the model sums out discrete latents, so its loss is `TraceEnum_ELBO`.
        single: the model itself runs in single precision alone.
        refused: by column, the part of a message that must tell the user why it does not run.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    guide: Callable[..., Any] | None = None
    optim: Any = None
    enumerated: bool = False
    single: bool = False
    refused: dict[str, str] = {}
