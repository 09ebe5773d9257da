"""Measures and projections of an embedding space with two kinds of points: texts and images."""

from typing import NamedTuple

import numpy as np

from e5v_jax.evaluate.vectors import dot

_CHUNK = 1024  # rows of a similarity matrix in memory at once


class Gap(NamedTuple):
    """This says how texts and images lie to each other; all vectors have length 1."""

    centroid_distance: float  # of mean text and mean image: Liang et al.'s modality gap (2022)
    matched_cosine: float  # mean over captions with their image
    mismatched_cosine: float  # mean over captions with all other images
    alignment: float  # mean |caption - image|^2 (Wang & Isola 2020, alpha 2); lower is better
    # log of the mean of exp(-2 d^2) over pairs (Wang & Isola 2020, t 2); lower is more even.
    uniformity_texts: float
    uniformity_images: float


def measure_gap(texts: np.ndarray, images: np.ndarray, image_of: np.ndarray) -> Gap:
    """Measure vectors of unit length: texts [C, D], images [N, D], ``image_of`` int [C]."""
    matched = dot(texts, images[image_of])  # [C]
    mean_text, mean_image = (kind.mean(axis=0, dtype=np.float64) for kind in (texts, images))
    every = len(texts) * len(images) * float(mean_text @ mean_image)  # the sum over all pairs
    return Gap(
        centroid_distance=float(np.linalg.norm(mean_text - mean_image)),
        matched_cosine=float(matched.mean()),
        mismatched_cosine=(every - matched.sum()) / (len(texts) * (len(images) - 1)),
        alignment=float((2 - 2 * matched).mean()),
        uniformity_texts=uniformity(texts),
        uniformity_images=uniformity(images),
    )


def uniformity(vectors: np.ndarray) -> float:
    """Return log mean exp(-2 |x - y|^2) over the pairs of different rows of [N, D], unit length."""
    total = 0.0
    for start in range(0, len(vectors), _CHUNK):
        cosine = vectors[start : start + _CHUNK].astype(np.float64) @ vectors.T  # [C, N]
        total += np.exp(4 * np.minimum(cosine, 1) - 4).sum()
    own = np.exp(4 * np.minimum(dot(vectors, vectors), 1) - 4)
    return float(np.log((total - own.sum()) / (len(vectors) * (len(vectors) - 1))))


def project(vectors: np.ndarray, *, centred: bool) -> np.ndarray:
    """Return [N, 2], the coordinates on the two directions of largest variance (PCA).

    Not centred, it is the plain SVD that the authors plot: the first direction is then close to the
    mean of all vectors, and a gap between two kinds shows in the second.
    """
    vectors = vectors.astype(np.float64)
    if centred:
        vectors = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(vectors, full_matrices=False)
    coordinates = u[:, :2] * s[:2]
    # the sign of a direction is arbitrary: the larger half points up
    return coordinates * np.where(coordinates.sum(axis=0) < 0, -1, 1)


def tsne(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return [N, 2], the t-SNE of cosines from the centred PCA. Raises ImportError: no sklearn."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    model = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return np.asarray(model.fit_transform(vectors))
