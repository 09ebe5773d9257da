"""Caption loss on images that are not trained on, and which of them a caption finds."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from e5v_jax.align.batches import CaptionBatchMaker, tokenize_captions
from e5v_jax.align.captions import load_captions
from e5v_jax.align.config import AlignConfig
from e5v_jax.align.features import open_features
from e5v_jax.align.loss import CaptionBatch, Sums, caption_sums
from e5v_jax.encode.encoder import Encoder
from e5v_jax.encode.stream import BatchLimits, encode_stream
from e5v_jax.evaluate.ranking import Ranks, hits_at, rank_positives
from e5v_jax.sharding import local_rows, place_split
from e5v_jax.train.checkpoint import Score
from e5v_jax.train.setup import Training

DEV_LOSS = Score("dev_loss", "caption loss", sign=-1)


class CaptionValidation:
    """It scores the parameters of a running alignment."""

    def __init__(self, cfg: AlignConfig, training: Training) -> None:
        """Read the images' headers and captions now, so that no bad one stops a running run.

        Raises FileNotFoundError, ValueError: as the training data's.
        """
        assert cfg.evaluation.data is not None
        data = load_captions([cfg.evaluation.data], stride=cfg.evaluation.stride)
        mesh = training.runtime.mesh
        one = replace(cfg.data, captions="one")
        tokens = tokenize_captions(data, training.processor, one)
        size = cfg.chunk_size or cfg.batch_size
        wanted, pool = local_rows(size, mesh), ThreadPoolExecutor()
        self._data, self._pool = data, pool
        self._encoder = Encoder(training.graphdef, training.processor, training.runtime)
        processor, known = training.processor, open_features(cfg, training.processor)
        if known is not None:
            model = nnx.merge(training.graphdef, training.trainable, training.frozen)
            known.fill(model, tokens.items, pool)
        load = processor.load if known is None else known.load
        self._make = CaptionBatchMaker(tokens, processor, wanted, data.row_ids, pool, load)
        self._mesh = mesh
        rows = np.arange(len(data))
        rows = np.concatenate([rows, np.full(-len(data) % size, -1)])
        self._batches = rows.reshape(-1, size)

        def sums(trainable: nnx.State, frozen: nnx.State, batch: CaptionBatch) -> Sums:
            model = nnx.merge(training.graphdef, trainable, frozen)
            return caption_sums(model, batch, None, chunk_size=None, remat="none")

        self._sums = jax.jit(sums)

    def score(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Compute the mean loss of all tokens of each image's first caption.

        And, in percent, how many of these captions find their image among the first one and ten, as
        the evaluation embeds both.
        """
        loss = count = 0.0
        for rows in self._batches:
            batch = place_split(self._make(rows, np.zeros_like(rows)), self._mesh)
            sums = self._sums(trainable, frozen, batch)
            loss, count = loss + float(sums.loss), count + float(sums.labels)
        ranks = self._rank(nnx.merge_state(trainable, frozen))
        recalls = {f"dev_recall@{k}": 100 * float(hits_at(ranks, k).mean()) for k in (1, 10)}
        return {DEV_LOSS.name: loss / count, **recalls}

    def _rank(self, state: nnx.State) -> Ranks:
        """Where each first caption's image stands."""

        def embed(inputs: Sequence[Any]) -> np.ndarray:
            prompts = self._encoder.processor.preset.choose()
            vectors = encode_stream(
                self._encoder, state, inputs, prompts=prompts, limits=BatchLimits(), pool=self._pool
            )
            length = np.linalg.norm(vectors, axis=1, keepdims=True)  # [N, 1]
            return np.asarray(vectors / length)

        texts = embed([own[0] for own in self._data.texts])
        images = embed(self._data.images)
        return rank_positives(texts, images, list(np.arange(len(images))[:, None]))
