"""One optimizer step as a pure function of arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.model.layers import LoRAParam
from e5v_jax.model.llama import Remat
from e5v_jax.model.llava_next import Array, LlavaNext, TextBatch, l2_normalize
from e5v_jax.train.config import OptimizerConfig
from e5v_jax.train.loss import info_nce


class PairBatch(NamedTuple):
    """The sentences of B triplets (or pairs), sorted by length into groups.

    ``order[k]`` is where sentence k (all sent0, then all sent1, then all hard_neg) stands in the
    concatenation of the groups.
    """

    groups: tuple[TextBatch, ...]
    order: Array  # int32 [3B] or [2B]


class Metrics(NamedTuple):
    """fp32 scalars of one step."""

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array  # before clipping


TrainStep = Callable[
    [nnx.State, optax.OptState, nnx.State, PairBatch, jax.Array],
    tuple[nnx.State, optax.OptState, Metrics],
]


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by the number of steps done: 0 -> peak in ``warmup_steps``, then -> 0.

    As transformers' ``get_linear_schedule_with_warmup``: the first step of a warmup has rate 0, and
    a run shorter than its warmup never reaches the peak.
    """
    decay_steps = max(total_steps - cfg.warmup_steps, 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, cfg.learning_rate, max(cfg.warmup_steps, 1)),
            optax.linear_schedule(cfg.learning_rate, 0.0, decay_steps),
        ],
        [cfg.warmup_steps],
    )


def make_optimizer(cfg: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW under :func:`make_schedule`."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            make_schedule(cfg, total_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        ),
    )


def split_trainable(
    model: LlavaNext, *, lora: bool
) -> tuple[nnx.GraphDef[LlavaNext], nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): the LoRA factors, or with ``lora`` off every parameter."""
    graphdef, trainable, *rest = nnx.split(model, LoRAParam if lora else nnx.Param, ...)
    return graphdef, trainable, rest[0]


def init_optimizer(
    optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Optimizer state placed like the parameters it belongs to; counters are replicated.

    Explicit, so that the first step already sees the placement that the step itself returns.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda _: replicated,
    )
    state: optax.OptState = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    return state


def embed_pairs(
    model: LlavaNext, batch: PairBatch, *, remat: Remat, dropout_key: jax.Array | None
) -> jax.Array:
    """Unit vectors of all sentences in their original order, fp32 [3B or 2B, D]."""
    pooled = []
    for i, group in enumerate(batch.groups):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        pooled.append(model(group, remat=remat, dropout_key=key))
    return l2_normalize(jnp.concatenate(pooled))[batch.order]


def pair_loss(
    model: LlavaNext,
    batch: PairBatch,
    *,
    columns: int,
    temperature: float,
    remat: Remat,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of one batch; ``columns`` is 3 for triplets, 2 for plain pairs."""
    vectors = embed_pairs(model, batch, remat=remat, dropout_key=dropout_key)
    parts = jnp.split(vectors, columns)  # sent0, sent1 and hard_neg, each [B, D]
    hard_negative = parts[2] if columns == 3 else None
    return info_nce(parts[0], parts[1], hard_negative, temperature=temperature)


def make_train_step(
    graphdef: nnx.GraphDef[LlavaNext],
    optimizer: optax.GradientTransformation,
    *,
    columns: int,
    temperature: float,
    remat: Remat,
    dropout: bool,
) -> TrainStep:
    """The jitted step; trainable and optimizer state are donated.

    ``step(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics)``.
    """

    def step(
        trainable: nnx.State,
        opt_state: optax.OptState,
        frozen: nnx.State,
        batch: PairBatch,
        key: jax.Array,
    ) -> tuple[nnx.State, optax.OptState, Metrics]:
        def loss_fn(trainable: nnx.State) -> tuple[jax.Array, jax.Array]:
            return pair_loss(
                nnx.merge(graphdef, trainable, frozen),
                batch,
                columns=columns,
                temperature=temperature,
                remat=remat,
                dropout_key=key if dropout else None,
            )

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        metrics = Metrics(loss, accuracy, optax.tree.norm(grads))
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))
