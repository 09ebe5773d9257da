"""Which layers of a frozen tower tell most of photographs' captions: a linear probe, no decoder.

    python benchmarks/tower_layers.py --model MODEL --train train-0.parquet --dev dev.parquet

MODEL is a folder of ``e5v-compose`` whose ``--vision-feature-layer`` names every layer to compare.
The mean feature of each photograph, standardised, is mapped to the words of its captions (TF-IDF)
by ridge regression, in closed form; each dev caption then looks for its photograph by cosine. That
is no embedding model: it says which layers a projector should be given. Features are kept in
``--output``. Tables: docs/results.md.
"""

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import tyro
from flax import nnx
from PIL import Image

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.evaluate.report import markdown_table
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

_ROWS = 20  # photographs in the tower at a time
_COMMON = 8  # captions that a word is in, at least
AT = (1, 5, 10)


@dataclass(frozen=True)
class Args:
    """Compare the layers of a tower."""

    model: Path
    """Converted folder."""
    train: Path
    """Parquet file with columns image and captions; photographs have the tower's size."""
    dev: Path
    """Another one, whose captions look for their photographs."""
    count: int = 2000
    """Photographs of ``train``."""
    most: int = 5
    """Layers side by side, at most."""
    penalty: float = 1.0
    """Of the regression, times the number of features."""
    output: Path = Path("runs/tower_layers")
    """Folder for features; what is there is not computed again."""


def features(base: ConvertedFolder, images: Sequence[bytes], file: Path) -> np.ndarray:
    """Mean features of photographs, fp32 [N, layers * width], from ``file`` if it is there."""
    if file.exists():
        return np.load(file)
    precision = Precision(jnp.dtype("float32"), jnp.dtype("float32"))
    model = load_model(base, Build(precision, Runtime.on(make_mesh(1, 1, 1))), seed=0)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, tiles: jax.Array) -> jax.Array:
        module: Any = nnx.merge(graphdef, state)
        return module.tile_features(tiles).mean(axis=1)

    found = []
    for start in range(0, len(images), _ROWS):
        part = [Image.open(io.BytesIO(x)).convert("RGB") for x in images[start : start + _ROWS]]
        found.append(np.asarray(run(state, np.stack([np.asarray(x) for x in part]))))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, np.concatenate(found))
    return np.concatenate(found)


def words(captions: Sequence[Sequence[str]], known: Counter[str], count: int) -> list[np.ndarray]:
    """The TF-IDF vectors of the captions of each photograph, [captions, words], of length 1.

    ``known`` says how many of ``count`` captions each word is in.
    """
    place = {word: i for i, word in enumerate(known)}
    weight = np.log(count / np.array(list(known.values())))
    found = []
    for own in captions:
        rows = np.zeros((len(own), len(place)), np.float32)
        for row, text in zip(rows, own, strict=True):
            for word in set(_split(text)) & place.keys():
                row[place[word]] = weight[place[word]]
        found.append(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))
    return found


def _split(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def recall(
    train: np.ndarray, texts: np.ndarray, dev: np.ndarray, queries: np.ndarray, penalty: float
) -> list[float]:
    """Recall in percent at :data:`AT`, of queries [5 * N, words] for dev [N, features]."""
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, dev = (train - mean) / deviation, (dev - mean) / deviation
    kernel = train @ train.T + penalty * train.shape[1] * np.eye(len(train))
    told = dev @ train.T @ np.linalg.solve(kernel, texts)  # [N, words]
    scores = queries @ (told / np.linalg.norm(told, axis=1, keepdims=True)).T
    owner = np.repeat(np.arange(len(dev)), len(queries) // len(dev))
    rank = (scores > scores[np.arange(len(scores)), owner][:, None]).sum(axis=1)
    return [100 * float((rank < k).mean()) for k in AT]


def main(args: Args) -> None:
    """Print recall for every set of layers."""
    base: Any = ConvertedFolder(args.model)
    rows = {
        "train": pq.read_table(args.train).slice(0, args.count).to_pylist(),
        "dev": pq.read_table(args.dev).to_pylist(),
    }
    x = {
        name: features(base, [row["image"] for row in own], args.output / f"{name}.npy")
        for name, own in rows.items()
    }
    captions = {name: [row["captions"] for row in own] for name, own in rows.items()}
    seen = Counter(word for own in captions["train"] for text in own for word in set(_split(text)))
    known = Counter({word: count for word, count in seen.items() if count >= _COMMON})
    count = sum(map(len, captions["train"]))
    texts = np.stack([own.mean(axis=0) for own in words(captions["train"], known, count)])
    centre = texts.mean(axis=0)
    queries = np.concatenate(words(captions["dev"], known, count)) - centre
    width = base.config.vision.hidden_size
    depths = base.config.feature_depths
    cells = []
    for several in range(1, min(args.most, len(depths)) + 1):
        for chosen in combinations(range(len(depths)), several):
            columns = np.concatenate([np.arange(i * width, (i + 1) * width) for i in chosen])
            parts = (x["train"][:, columns], texts - centre, x["dev"][:, columns], queries)
            found = recall(*parts, args.penalty)
            names = " ".join(str(depths[i]) for i in chosen)
            cells.append([names, *(f"{value:.1f}" for value in found)])
    print(markdown_table(["blocks", *(f"R@{k}" for k in AT)], cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
