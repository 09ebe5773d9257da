"""AdamW with clipping under a linear schedule, where its state lives, and how it is converted."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.train.config import OptimizerConfig

_logger = logging.getLogger(__name__)


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


def as_saved(saved: Any, fresh: optax.OptState, trainable: nnx.State) -> optax.OptState:
    """``fresh``, this run's optimizer state, with accumulated gradients if ``saved`` has them.

    ``saved`` is the tree of a checkpoint's optimizer state as Orbax describes it.
    """
    accumulates = isinstance(saved, dict) and "acc_grads" in saved
    if accumulates == isinstance(fresh, optax.MultiStepsState):
        return fresh
    if isinstance(fresh, optax.MultiStepsState):
        return fresh.inner_opt_state
    zero = jnp.zeros((), jnp.int32)
    return optax.MultiStepsState(zero, zero, inner_opt_state=fresh, acc_grads=trainable)


def implied_accumulation(saved: optax.OptState, step: int, now: int) -> int:
    """accumulate_steps of a checkpoint that does not say it; then it was the same in all steps."""
    if not isinstance(saved, optax.MultiStepsState):
        return 1
    if int(saved.gradient_step) == 0:  # more than ``step``
        return max(now, step + 1)
    return (step - int(saved.mini_step)) // int(saved.gradient_step)


def carry_over(
    saved: optax.OptState, fresh: optax.OptState, *, step: int, before: int, now: int
) -> optax.OptState:
    """The state ``saved`` after ``step`` steps, for an optimizer that accumulates over ``now``.

    If the accumulate_steps ``before`` were others, AdamW's moments and their count of updates go
    on; the schedule, which counts updates, stands where a run with ``now`` from its beginning would
    be after ``step`` steps, so that it ends at 0 with the run; and accumulation begins anew: of
    gradients since the last update nothing is kept, and the next update comes after ``now`` steps.
    """
    if before == now:
        return saved
    inner, dropped = saved, 0
    if isinstance(saved, optax.MultiStepsState):
        inner, dropped = saved.inner_opt_state, int(saved.mini_step)
    _logger.warning(
        "optimizer.accumulate_steps was %d and is now %d: the schedule goes on from update %d, "
        "gradients of %d steps that made no update yet are dropped",
        *(before, now, step // now, dropped),
    )

    def at_step(state: Any) -> Any:
        if not isinstance(state, optax.ScaleByScheduleState):
            return state
        count = np.asarray(step // now, state.count.dtype)
        return state._replace(count=jax.device_put(count, state.count.sharding))

    inner = jax.tree.map(
        at_step, inner, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )
    if isinstance(fresh, optax.MultiStepsState):
        return fresh._replace(inner_opt_state=inner)
    return inner
