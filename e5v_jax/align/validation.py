"""Caption loss on images that are not trained on."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from e5v_jax.align.batches import CaptionBatchMaker, tokenize_captions
from e5v_jax.align.captions import load_captions
from e5v_jax.align.config import AlignConfig
from e5v_jax.align.features import open_features
from e5v_jax.align.loss import CaptionBatch, Sums, caption_sums
from e5v_jax.sharding import local_rows, place_split
from e5v_jax.train.setup import Training


class CaptionValidation:
    """It scores the parameters of a running alignment."""

    def __init__(self, cfg: AlignConfig, training: Training) -> None:
        """Read the images' headers and captions now, so that no bad one stops a running run.

        Raises FileNotFoundError, ValueError: as the training data's.
        """
        assert cfg.evaluation.data is not None
        data = load_captions([cfg.evaluation.data], stride=cfg.evaluation.stride)
        mesh = training.runtime.mesh
        tokens = tokenize_captions(data, training.processor, cfg.data)
        size = cfg.chunk_size or cfg.batch_size
        wanted, pool = local_rows(size, mesh), ThreadPoolExecutor()
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

    def score(self, trainable: nnx.State, frozen: nnx.State) -> float:
        """Compute the mean loss of all tokens of each image's first caption."""
        loss = count = 0.0
        for rows in self._batches:
            batch = place_split(self._make(rows, np.zeros_like(rows)), self._mesh)
            sums = self._sums(trainable, frozen, batch)
            loss, count = loss + float(sums.loss), count + float(sums.labels)
        return loss / count
