"""One optimizer step as a pure function of arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from e5v_jax.families.base import Array, Batch, Model, Together
from e5v_jax.nn.layers import LoRAParam
from e5v_jax.nn.remat import Remat
from e5v_jax.train.config import LossConfig
from e5v_jax.train.loss import contrastive_loss


class PairBatch(NamedTuple):
    """The inputs of B triplets (or pairs), sorted by length into groups."""

    groups: tuple[Batch, ...]
    order: Array  # int32 [3B] or [2B], where each sent0, then sent1, hard_neg is in joined groups
    text_ids: Array  # int32 [3B] or [2B], equal where two inputs are the same


class Metrics(NamedTuple):
    """Scalars of one step, fp32 but the last."""

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array  # before clipping
    finite: jax.Array  # bool, whether all parameters are after the step


Key = jax.Array | None  # of dropout; None is without
Loss = Callable[[Model, Any, Key], tuple[jax.Array, jax.Array]]
"""Loss and accuracy of a batch, fp32 scalars."""
TrainStep = Callable[
    [nnx.State, optax.OptState, nnx.State, Any, jax.Array],
    tuple[nnx.State, optax.OptState, Metrics],
]


DECODER = nnx.All(nnx.Param, nnx.PathContains("language_model"))
"""All that the decoder has, as a filter of parameters."""


def split_trainable(
    model: Model, *, lora: bool, wanted: Any = None
) -> tuple[nnx.GraphDef[Any], nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): the LoRA factors, or with ``lora`` off the whole decoder.

    ``wanted`` is a filter of parameters that are trained in place of these.
    """
    wanted = wanted or (LoRAParam if lora else DECODER)
    graphdef, trainable, *rest = nnx.split(model, wanted, ...)
    return graphdef, trainable, rest[0]


def in_chunks(
    work: Callable[[Any, Key], Any], tree: Any, key: Key, *, size: int, chunk_size: int
) -> Any:
    """What ``work`` makes of every ``chunk_size`` of ``size`` rows, with an axis in front.

    ``tree`` has arrays [size * K, ...]; K is 1, or say the tiles of an image. ``chunk_size`` is a
    divisor of ``size``. No more rows than that are in the model at a time: the backward pass runs
    each chunk forward again.
    """
    count = size // chunk_size

    # chunk j is every count-th input from j on: so each device has its share of every chunk
    def split(x: Array) -> Array:
        """[size * K, ...] -> [count, chunk_size * K, ...]."""
        x = x.reshape(chunk_size, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(count, -1, *x.shape[3:])

    @jax.checkpoint
    def one(chunk: tuple[Any, Key]) -> Any:
        return work(*chunk)

    keys = None if key is None else jax.random.split(key, count)
    return jax.lax.map(one, (jax.tree.map(split, tree), keys))


def _embed_group(
    model: Model,
    group: Batch,
    key: Key,
    *,
    chunk_size: int | None,
    remat: Remat,
    together: Together | None,
) -> jax.Array:
    """Pool the N inputs of one group: fp32 [N, D], not normalised.

    With a ``chunk_size`` they go through the model :func:`in_chunks`. The gradient is that of the
    whole batch (GradCache, Gao et al. 2021, arXiv 2101.06983), in the memory of one chunk.
    """
    size = group.last_index.shape[0]

    def embed(group: Batch, key: Key) -> jax.Array:
        if together is not None:
            return model.embed_together(group, together, remat=remat, dropout_key=key)
        return model(group, remat=remat, dropout_key=key)

    if chunk_size is None or size <= chunk_size:
        return embed(group, key)
    pooled = in_chunks(embed, group, key, size=size, chunk_size=chunk_size)
    vectors: jax.Array = pooled.swapaxes(0, 1).reshape(size, -1)  # [count, chunk_size, D]
    return vectors


def embed_pairs(
    model: Model,
    batch: PairBatch,
    *,
    chunk_size: int | None,
    remat: Remat,
    dropout_key: Key,
    together: Together | None = None,
) -> jax.Array:
    """Pool all inputs, in their original order: fp32 [3B or 2B, D], not normalised."""
    embed = partial(_embed_group, chunk_size=chunk_size, remat=remat, together=together)
    pooled = []
    for i, group in enumerate(batch.groups):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        pooled.append(embed(model, group, key))
    return jnp.concatenate(pooled)[batch.order]


def pair_loss(
    model: Model,
    batch: PairBatch,
    dropout_key: Key,
    *,
    columns: int,
    loss: LossConfig,
    chunk_size: int | None,
    remat: Remat,
    together: Together | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of one batch; ``columns`` is 3 for triplets, 2 for plain pairs."""
    vectors = embed_pairs(
        model,
        batch,
        chunk_size=chunk_size,
        remat=remat,
        dropout_key=dropout_key,
        together=together,
    )
    return contrastive_loss(
        vectors,
        columns=columns,
        temperature=loss.temperature,
        text_ids=jnp.asarray(batch.text_ids) if loss.mask_false_negatives else None,
        matryoshka_dims=loss.matryoshka_dims,
        bidirectional=loss.bidirectional,
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether every value of every array is finite, bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    loss_of: Loss,
    *,
    dropout: bool,
    state: tuple[nnx.State, optax.OptState],
) -> TrainStep:
    """Jit the step; parameters and optimizer state are donated, placed like the first ``state``."""
    placement = jax.tree.map(lambda x: x.sharding, state)

    def step(
        trainable: nnx.State,
        opt_state: optax.OptState,
        frozen: nnx.State,
        batch: Any,
        key: jax.Array,
    ) -> tuple[nnx.State, optax.OptState, Metrics]:
        def loss_fn(trainable: nnx.State) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, trainable, frozen)
            return loss_of(model, batch, key if dropout else None)

        (value, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics = Metrics(value, accuracy, optax.tree.norm(grads), all_finite(trainable))
        return trainable, opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placement, None))
