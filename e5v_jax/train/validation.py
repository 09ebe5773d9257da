"""STS-B dev inside a run: the score by which the best checkpoint is told."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flax import nnx

from e5v_jax.encode.encoder import Encoder
from e5v_jax.encode.stream import BatchLimits, encode_stream
from e5v_jax.evaluate.sts import load_task, score_tasks
from e5v_jax.presets import E5_V
from e5v_jax.train.checkpoint import STSB_DEV

TASK = "stsb-dev"


class Validation:
    """It scores the parameters of a running training, embedding as users do."""

    def __init__(self, data: Path, encoder: Encoder, *, stride: int) -> None:
        """Read the pairs (every ``stride``-th) now, so that a missing file stops no running run.

        Raises FileNotFoundError, ValueError: a missing or damaged file, a pair the model refuses.
        """
        self._pairs, self._encoder = load_task(data, TASK, stride=stride), encoder
        preset = encoder.processor.preset
        self._prompts = preset.choose("sts" if preset is E5_V else "document")
        sentences = self._pairs.sentences1 + self._pairs.sentences2
        for item in encoder.processor.measure(sentences, self._prompts):
            encoder.processor.padded_length(item.length, item.shape_key)

    def score(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Compute Spearman x 100 by the paper's protocol."""
        embed = partial(encode_stream, self._encoder, nnx.merge_state(trainable, frozen))
        with ThreadPoolExecutor(1) as pool:  # there are no images to decode
            encode = partial(embed, prompts=self._prompts, limits=BatchLimits(), pool=pool)
            found = score_tasks(encode, {TASK: self._pairs})[TASK]
        return {STSB_DEV.name: found.items.value()}
