"""A projector that speaks the decoder's words before the first step, in closed form.

Ridge regression maps the features of each patch to the embeddings of the words in its image's
captions. LLaVA's projector, two linear maps around a GELU, holds that linear map exactly: since
gelu(x) - gelu(-x) = x, a hidden unit and its negative pass a value through unchanged. A decoder
then reads a photograph as a blend of words that it knows, and alignment begins there instead of at
noise. docs/results.md says what that is worth.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from e5v_jax.families.llava_next.model import Projector

_PENALTY = 0.1  # of the regression, in parts of the variance of a feature
_BLOCK = 64  # images at a time
Ids = Sequence[int]


class LinearMap(NamedTuple):
    """It is ``(x @ left - centre) @ right + bias``, of rank R; all are fp64."""

    left: np.ndarray  # [Dv, R]
    right: np.ndarray  # [R, D]
    bias: np.ndarray  # [D]
    centre: np.ndarray  # [R], the mean of x @ left


class Moments(NamedTuple):
    """Means over the patches of all images, fp64."""

    features: np.ndarray  # [Dv]
    targets: np.ndarray  # [D]
    covariance: np.ndarray  # [Dv, Dv], of the features
    cross: np.ndarray  # [Dv, D], their covariance with the targets


def start_from_words(
    model: Any, features: Iterable[np.ndarray], captions: Sequence[Sequence[Ids]]
) -> None:
    """Set ``model``'s projector, which is LLaVA's, by all images.

    ``features`` are [tiles, P, Dv] of each, ``captions`` the token ids of each one's captions.
    """
    projector: Projector = model.multi_modal_projector
    embeddings = np.asarray(model.language_model.embed_tokens[...], np.float64)
    hidden = projector.linear_1.kernel[...].shape[1]
    _set(projector, fit(features, caption_means(captions, embeddings), embeddings, hidden // 2))


def caption_means(captions: Sequence[Sequence[Ids]], embeddings: np.ndarray) -> np.ndarray:
    """The mean embedding of each image's caption tokens, fp64 [images, D].

    A token counts by the logarithm of how few captions have it; one that all have, not at all.
    """
    count = sum(map(len, captions))
    known = Counter(token for own in captions for ids in own for token in set(ids))
    weight = {token: np.log(count / seen) for token, seen in known.items()}
    means = np.zeros((len(captions), embeddings.shape[1]))
    for mean, own in zip(means, captions, strict=True):
        tokens = [token for ids in own for token in sorted(set(ids))]
        weights = np.array([weight[token] for token in tokens])  # [tokens]
        if weights.sum() > 0:
            mean[:] = weights @ embeddings[tokens] / weights.sum()
    return means


def fit(
    features: Iterable[np.ndarray], targets: np.ndarray, embeddings: np.ndarray, rank: int
) -> LinearMap:
    """Fit patches of ``features`` [tiles, P, Dv] of each image to its row of ``targets`` [N, D].

    What comes out differs from its mean as much as ``embeddings`` [V, D] do from theirs, though a
    regression of what is told in part alone would give less. ``rank`` is the most of the map.
    """
    found = measure(features, targets)
    penalty = np.diag(_PENALTY * np.maximum(np.diag(found.covariance), 1e-12))
    full = np.linalg.solve(found.covariance + penalty, found.cross)  # [Dv, D]
    variance = np.sum(full * (found.covariance @ full)) / full.shape[1]
    full *= np.sqrt(embeddings.var(axis=0).mean() / max(variance, 1e-12))
    left, sizes, right = np.linalg.svd(full, full_matrices=False)
    left, right = left[:, :rank] * sizes[:rank] ** 0.5, sizes[:rank, None] ** 0.5 * right[:rank]
    return LinearMap(left, right, found.targets, found.features @ left)


def measure(features: Iterable[np.ndarray], targets: np.ndarray) -> Moments:
    """The moments of patches, as :func:`fit` takes them, each with its image's target."""
    pairs = zip(features, targets, strict=True)
    count, told = 0, np.zeros(targets.shape[1])
    total, gram, cross = np.zeros((3, 1, 1))  # each as wide as what is added
    while block := list(islice(pairs, _BLOCK)):
        own = [x.reshape(-1, x.shape[-1]).astype(np.float64) for x, _ in block]  # [tiles * P, Dv]
        patches = np.concatenate(own)
        wanted = np.stack([target for _, target in block])  # [images, D]
        count += len(patches)
        told += np.array([len(x) for x in own]) @ wanted  # [D]
        total = total + patches.sum(axis=0)  # [1, Dv]
        gram = gram + patches.T @ patches  # [Dv, Dv]
        cross = cross + np.stack([x.sum(axis=0) for x in own]).T @ wanted  # [Dv, D]
    centre, mean = total[0] / count, told / count
    return Moments(
        centre,
        mean,
        gram / count - np.outer(centre, centre),
        cross / count - np.outer(centre, mean),
    )


def _set(projector: Projector, found: LinearMap) -> None:
    """Write the map into the first hidden units; others stay, and add nothing before a step."""
    first, second = projector.linear_1, projector.linear_2
    units = 2 * found.left.shape[1]
    kernels = [np.array(linear.kernel[...], np.float32) for linear in (first, second)]
    bias = np.array(first.bias[...], np.float32)
    kernels[0][:, :units] = np.concatenate([found.left, -found.left], axis=1)
    bias[:units] = np.concatenate([-found.centre, found.centre])
    kernels[1][:] = 0.0
    kernels[1][:units] = np.concatenate([found.right, -found.right])
    values = ((first.kernel, kernels[0]), (first.bias, bias), (second.kernel, kernels[1]))
    for parameter, value in (*values, (second.bias, found.bias)):
        like = parameter[...]
        parameter[...] = jax.device_put(value.astype(like.dtype), like.sharding)
