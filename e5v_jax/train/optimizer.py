"""AdamW with clipping under a linear schedule, where its state lives, and how it is converted."""

import logging
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.train.config import OptimizerConfig

_logger = logging.getLogger(__name__)


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Make the learning rate by the number of steps done: 0 -> peak in ``warmup_steps``, then -> 0.

    As transformers' ``get_linear_schedule_with_warmup``: the first step of a warmup has rate 0, and
    a run shorter than its warmup never reaches the peak.
    """
    warmup = optax.linear_schedule(0.0, cfg.learning_rate, max(cfg.warmup_steps, 1))
    decay = optax.linear_schedule(cfg.learning_rate, 0.0, max(total_steps - cfg.warmup_steps, 1))
    return optax.join_schedules([warmup, decay], [cfg.warmup_steps])


def make_optimizer(
    cfg: OptimizerConfig, total_steps: int, *last: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Make what clips, then does AdamW under :func:`make_schedule`, then what comes ``last``.

    Every ``cfg.accumulate_steps`` steps it applies their mean gradient; the schedule counts these.
    """
    rate = make_schedule(cfg, total_steps // cfg.accumulate_steps)
    adamw = optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), adamw, *last)
    if cfg.accumulate_steps == 1:
        return optimizer
    return optax.MultiSteps(optimizer, cfg.accumulate_steps).gradient_transformation()


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
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def as_saved(saved: Any, fresh: optax.OptState, trainable: nnx.State, mesh: Mesh) -> optax.OptState:
    """Give the ``fresh`` state accumulated gradients just if ``saved``, Orbax's tree, has them."""
    accumulates = isinstance(saved, dict) and "acc_grads" in saved
    if accumulates == isinstance(fresh, optax.MultiStepsState):
        return fresh
    if isinstance(fresh, optax.MultiStepsState):
        return fresh.inner_opt_state
    zero = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
    return optax.MultiStepsState(zero, zero, inner_opt_state=fresh, acc_grads=trainable)


def carry_over(
    saved: optax.OptState, fresh: optax.OptState, *, step: int, before: int | None, now: int
) -> optax.OptState:
    """Fit the state ``saved`` after ``step`` steps to an optimizer that accumulates over ``now``.

    If the accumulate_steps ``before`` were others, AdamW's moments and their count of updates go
    on; the schedule, which counts updates, stands where a run with ``now`` from its beginning would
    be after ``step`` steps, so that it ends at 0 with the run; and accumulation begins anew: of
    gradients since the last update nothing is kept, and the next update comes after ``now`` steps.
    ``before`` None is found out: then it was the same in all steps.
    """
    inner, dropped, implied = saved, 0, 1
    if isinstance(saved, optax.MultiStepsState):
        inner, dropped, updates = saved.inner_opt_state, int(saved.mini_step), saved.gradient_step
        # without an update it was more than ``step``
        implied = (step - dropped) // int(updates) if updates else max(now, step + 1)
    before = before or implied
    if before == now:
        return saved
    _logger.warning(
        "optimizer.accumulate_steps was %d and is now %d: the schedule goes on from update %d, "
        "gradients of %d steps that made no update yet are dropped",
        *(before, now, step // now, dropped),
    )

    def of_schedule(path: tuple[Any, ...], _: Any) -> bool:
        return bool(path[-1].tuple_name == optax.ScaleByScheduleState.__name__)

    count = optax.tree.get(inner, "count", filtering=of_schedule)
    count = jax.device_put(np.asarray(step // now, count.dtype), count.sharding)
    inner = optax.tree.set(inner, of_schedule, count=count)
    accumulates = isinstance(fresh, optax.MultiStepsState)
    return fresh._replace(inner_opt_state=inner) if accumulates else inner
