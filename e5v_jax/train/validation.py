"""STS-B dev inside a run: the score by which the best checkpoint is told."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerFast

from e5v_jax.data.text import bucket_length, encode_batch, pad_right
from e5v_jax.evaluate.sts import load_task, score_tasks
from e5v_jax.model.llava_next import LlavaNext, TextBatch
from e5v_jax.prompts import PROMPTS, TEMPLATES, fill
from e5v_jax.sharding import place_split

TASK = "stsb-dev"
BUCKETS = (32, 48, 64, 96, 128, 256)


class Validation:
    """Scores the parameters of a running training, with one compiled program per bucket."""

    def __init__(
        self,
        data: Path,
        graphdef: nnx.GraphDef[LlavaNext],
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        mesh: Mesh,
        *,
        stride: int,
    ) -> None:
        """Read the pairs (every ``stride``-th) now, so that a missing file stops no running run.

        Raises:
            FileNotFoundError, ValueError: a missing or damaged file.
        """
        self._pairs = load_task(data, TASK, stride=stride)
        self._batch_size = max(64, mesh.shape["data"] * mesh.shape["fsdp"])
        self._tokenizer, self._template, self._mesh = tokenizer, TEMPLATES[template], mesh

        def embed(trainable: nnx.State, frozen: nnx.State, batch: TextBatch) -> jax.Array:
            return nnx.merge(graphdef, trainable, frozen)(batch)

        replicated = NamedSharding(mesh, PartitionSpec())
        self._embed = jax.jit(embed, out_shardings=replicated)  # so that every process has them all

    def score(self, trainable: nnx.State, frozen: nnx.State) -> float:
        """Spearman x 100 by the paper's protocol (reference.md section 4)."""

        def encode(sentences: list[str]) -> np.ndarray:
            filled = [fill(PROMPTS["sts"], template=self._template, text=s) for s in sentences]
            ids = encode_batch(self._tokenizer, filled)
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
            vectors: list[np.ndarray] = [np.empty(0)] * len(ids)
            for start in range(0, len(ids), self._batch_size):
                rows = order[start : start + self._batch_size]
                length = bucket_length(len(ids[rows[-1]]), BUCKETS)
                short = [rows[-1]] * (self._batch_size - len(rows))  # the last batch is filled up
                batch = TextBatch(*pad_right([ids[i] for i in rows + short], length, 0))
                found = self._embed(trainable, frozen, place_split(batch, self._mesh))
                for i, vector in zip(rows, np.asarray(found), strict=False):
                    vectors[i] = vector
            return np.stack(vectors)  # [N, D]

        return score_tasks(encode, {TASK: self._pairs})[TASK].items.value()
