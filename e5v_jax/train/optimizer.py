"""AdamW with clipping under a linear schedule, and where its state lives."""

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.train.config import OptimizerConfig


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
    """Clip, then AdamW under :func:`make_schedule`.

    With ``cfg.accumulate_steps`` k, the parameters change every k steps, by the mean of their k
    gradients, and the schedule counts these changes.
    """
    total_steps //= cfg.accumulate_steps
    optimizer = optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            make_schedule(cfg, total_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        ),
    )
    if cfg.accumulate_steps == 1:
        return optimizer
    accumulating = optax.MultiSteps(optimizer, every_k_schedule=cfg.accumulate_steps)
    return accumulating.gradient_transformation()


def init_optimizer(
    optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Optimizer state placed like the parameters it belongs to; counters are replicated.

    Explicit, so that the first step already sees the placement that the step itself returns. Of
    ``jax.ShapeDtypeStruct`` parameters, its shapes and placement are returned.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    state: optax.OptState = optax.tree_map_params(
        optimizer,
        lambda x, parameter: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    )
    if all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(trainable)):
        return state
    shardings = jax.tree.map(lambda x: x.sharding, state)
    state = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    return state
