"""One model for each layer of blayers, with latents in no alphabetical order."""

from functools import partial

import numpy as np
import numpyro
import numpyro.distributions as dist
from cases import Case

ROWS = 24
_rng = np.random.default_rng(0)
X = _rng.normal(size=(ROWS, 3)).round(2)
Z = _rng.normal(size=(ROWS, 2)).round(2)
GROUP = np.arange(ROWS) % 4
Y = (X[:, 0] - 0.5 * X[:, 1] * X[:, 2] + 0.4 * GROUP + 0.3 * _rng.normal(size=ROWS)).round(2)
KNOTS = np.pad(np.linspace(-3.0, 3.0, 7), 3, mode="edge")  # clamped, for cubic splines
LOW_RANK = {"low_rank_dim": 2}
GROUPS = {"num_categories": 4}

LAYERS = {  # by layer, the keys of its inputs in INPUTS, and its options
    "AdaptiveLayer": ("x", {}),
    "FixedPriorLayer": ("x", {}),
    "InterceptLayer": ("", {}),
    "FMLayer": ("x", LOW_RANK),
    "FM3Layer": ("x", LOW_RANK),
    "LowRankInteractionLayer": ("xz", LOW_RANK),
    "InteractionLayer": ("xz", {}),
    "BilinearLayer": ("xz", {}),
    "LowRankBilinearLayer": ("xz", LOW_RANK),
    "EmbeddingLayer": ("g", GROUPS | {"embedding_dim": 2}),
    "RandomEffectsLayer": ("g", GROUPS),
    "RandomSlopesLayer": ("xg", GROUPS),
    "FixedEffectsLayer": ("g", GROUPS),
    "RandomWalkLayer": ("g", GROUPS | {"embedding_dim": 2}),
    "AR1Layer": ("g", GROUPS),
    "PSplineLayer": ("s", {"knots": KNOTS}),
    "HorseshoeLayer": ("x", {}),
    "HorseshoeInteractionLayer": ("xz", {}),
    "MixtureLayer": ("x", {}),
    "HSGPLayer": ("s", {"L": 4.0, "m": 5}),
    "SpikeAndSlabLayer": ("x", {}),  # versions before 0.3.8 have these two
    "AttentionLayer": ("x", {"head_dim": 2}),
}
INPUTS = {"x": X, "z": Z, "g": GROUP, "s": X[:, :1]}


def regression(layer, options, inputs, y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    effect = layer("effect", *inputs, **options)
    mean = numpyro.deterministic("mean", effect.reshape(len(effect), -1).sum(-1))
    with numpyro.plate("rows", ROWS):
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def case(name):
    """Return the model of one layer, or the reason why there is none."""
    import blayers.layers

    layer = getattr(blayers.layers, name, None)
    if layer is None:
        return "this version of blayers has no such layer"
    which, options = LAYERS[name]
    inputs = tuple(INPUTS[letter] for letter in which)
    return Case(partial(regression, layer(), options), (inputs, Y))
