"""How long the groups of a run's batches are padded, from its data."""

import itertools

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.data.pipeline import make_batches
from e5v_jax.train.batches import group_lengths, tokenize_pairs
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.feed import load_data
from e5v_jax.train.setup import open_base

GROUPS = (1, 2, 4, 8)
"""Numbers of length groups that a plan may have, beside the run's own."""


def data_lengths(cfg: TrainConfig, base: ConvertedFolder, multiple: int) -> list[tuple[int, ...]]:
    """Those of a run of ``cfg`` on ``base``, for one group, two and so on, of ``multiple`` each.

    Raises ValueError: the data is not of triplets of texts, or one line naming file and row;
    FileNotFoundError: no such data.
    """
    pairs = load_data(cfg.data)
    tokens = tokenize_pairs(pairs, open_base(cfg, base), cfg.data)
    if tokens.image_shapes or tokens.columns != 3:
        raise ValueError(
            "data: a plan is for triplets of texts, and this has something else: leave --plan out, "
            "or give the dry run --sequence-lengths"
        )
    batches = make_batches(
        pairs, batch_size=cfg.batch_size, seed=cfg.seed, num_epochs=cfg.num_epochs
    )
    order = list(itertools.islice(batches, cfg.max_steps))
    return [
        group_lengths(tokens.lengths, order, groups=groups, multiple=multiple)
        for groups in sorted({*GROUPS, cfg.data.length_groups})
    ]
