"""The training step against torch + peft, and what must not change its result."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_models import Case, Recipe, build_text
from peft import PeftModel
from transformers import get_linear_schedule_with_warmup

from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import dotted, load_model
from e5v_jax.checkpoints.peft import Adapter, write_adapter
from e5v_jax.families.base import Measured, Model, Together
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.nn.layers import Build, Linear, LoRAConfig, LoRAParam, Precision
from e5v_jax.nn.remat import Remat
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.batches import BatchMaker, PairTokens, group_lengths
from e5v_jax.train.config import LossConfig, OptimizerConfig
from e5v_jax.train.optimizer import init_optimizer, make_optimizer, make_schedule
from e5v_jax.train.step import (
    PairBatch,
    make_train_step,
    pair_loss,
    split_trainable,
)

LORA = LoRAConfig(rank=4, alpha=8.0)
BATCH, STEPS, TEMPERATURE = 6, 10, 0.05
ROWS = 3 * BATCH  # seen more than three times, so that ten steps are enough to learn
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, max_grad_norm=10.0)
RECIPE = Recipe(
    template="chatml",
    text={
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    },
    seed=11,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny random Llama: 4 query heads, 2 key heads."""
    return build_text(RECIPE, tmp_path_factory.mktemp("llama"))


def make_tokens(columns: int, rows: int = ROWS, seed: int = 0) -> PairTokens:
    """Random sequences of 3 to 24 tokens; sent1 shares most tokens with sent0, hard_neg half."""
    rng = np.random.default_rng(seed)
    ids: list[list[list[int]]] = [[] for _ in range(columns)]
    for _ in range(rows):
        first = rng.integers(0, 256, size=rng.integers(3, 25))
        for column, changed in zip(ids, (0.0, 0.25, 0.5), strict=False):
            other = rng.integers(0, 256, size=len(first))
            kept = np.where(rng.random(len(first)) < changed, other, first)
            column.append(kept[: rng.integers(3, len(kept) + 1)].tolist())
    lengths = np.array([[len(x) for x in column] for column in ids])
    return PairTokens(
        items=[
            [Measured(row, sequence, len(sequence)) for row, sequence in enumerate(column)]
            for column in ids
        ],
        lengths=lengths,
        text_ids=np.arange(lengths.size).reshape(lengths.shape),
        image_shapes={},
    )


class Texts(TextProcessor):
    """Of what needs no tokenizer: these tests start from token ids."""

    def __init__(self) -> None:
        pass


def make_pair_batch(
    tokens: PairTokens, rows: np.ndarray, *, lengths: tuple[int, ...], multiple: int
) -> PairBatch:
    """The batch of ``rows``."""
    make = BatchMaker(
        tokens,
        Texts(),
        lengths=lengths,
        multiple=multiple,
        wanted=np.ones(len(rows), bool),
        row_ids=[],
        pool=ThreadPoolExecutor(),
    )
    return make(rows)


def rows_of(step: int) -> np.ndarray:
    """Row numbers of the given step, from 0."""
    return np.arange(step * BATCH, (step + 1) * BATCH) % ROWS


def batches_of(tokens: PairTokens, *, steps: int, groups: int) -> Iterator[PairBatch]:
    """The batches of the first steps."""
    order = [rows_of(step) for step in range(steps)]
    lengths = group_lengths(tokens.lengths, order, groups=groups, multiple=1)
    for rows in order:
        yield make_pair_batch(tokens, rows, lengths=lengths, multiple=1)


def load(case: Case, lora: LoRAConfig | None = LORA) -> Model:
    precision = Precision(param=np.float32, compute=np.float32)
    mesh = make_mesh(data=-1, fsdp=1)
    return load_model(open_source(case.folder), Build(precision, Runtime.on(mesh), lora), seed=5)


def flat(state: nnx.State) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


@dataclass
class Trace:
    """Metrics of each step and the trained arrays at the end.

    ``smallest``, of PyTorch's parameters: each value's least gradient, by size, of the steps that
    gave it one; infinity where none did.
    """

    loss: list[float]
    accuracy: list[float]
    grad_norm: list[float]
    values: dict[str, np.ndarray]
    smallest: dict[str, np.ndarray] = field(default_factory=dict)


def run_ours(
    model: Model, tokens: PairTokens, *, steps: int, lora: bool = True, groups: int = 2
) -> Trace:
    """Train with our own step and optimizer."""
    graphdef, trainable, frozen = split_trainable(model, lora=lora)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    state = init_optimizer(optimizer, trainable, make_mesh(data=-1, fsdp=1))
    step = make_train_step(
        graphdef,
        optimizer,
        partial(
            pair_loss,
            columns=tokens.columns,
            loss=LossConfig(temperature=TEMPERATURE),
            chunk_size=None,
            remat="none",
        ),
        dropout=False,
        state=(trainable, state),
    )
    metrics = []
    for batch in batches_of(tokens, steps=steps, groups=groups):
        trainable, state, result = step(trainable, state, frozen, batch, jax.random.key(0))
        metrics.append([float(x) for x in result])
    loss, accuracy, grad_norm, finite = (list(column) for column in zip(*metrics, strict=True))
    assert all(finite)
    return Trace(loss, accuracy, grad_norm, flat(trainable))


def torch_embed(decoder: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Unit vectors of one left-padded batch, read at [:, -1] as the authors do."""
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = decoder(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return torch.nn.functional.normalize(hidden[:, -1], dim=-1)


def run_torch(model: Any, decoder: Any, tokens: PairTokens, *, steps: int) -> Trace:
    """Train the parameters of ``model`` that require a gradient, with PyTorch's own parts."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=OPTIMIZER.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, OPTIMIZER.warmup_steps, STEPS)
    trace = Trace([], [], [], {})
    for step in range(steps):
        rows = rows_of(step)
        parts = [torch_embed(decoder, [column[row].ids for row in rows]) for column in tokens.items]
        logits = parts[0] @ torch.cat(parts[1:]).T / TEMPERATURE
        labels = torch.arange(BATCH)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.max_grad_norm)
        for name, p in model.named_parameters():
            if p.grad is not None:
                size = np.abs(p.grad.numpy())
                size[size == 0] = np.inf
                trace.smallest[name] = np.minimum(size, trace.smallest.get(name, np.inf))
        optimizer.step()
        schedule.step()
        trace.loss.append(loss.item())
        trace.accuracy.append((logits.argmax(1) == labels).float().mean().item())
        trace.grad_norm.append(norm.item())
    return trace


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return float(np.abs(np.array(ours) - np.array(theirs)).max())


# --- against torch and peft ---


@pytest.mark.parametrize(
    "columns", [pytest.param(3, id="triplets"), pytest.param(2, id="pairs", marks=pytest.mark.slow)]
)
def test_ten_lora_steps_follow_peft(case: Case, columns: int, tmp_path: Path) -> None:
    tokens = make_tokens(columns)
    model = load(case)
    start = flat(nnx.state(model, LoRAParam))
    table = open_source(case.folder).table
    write_adapter(tmp_path / "adapter", Adapter(LORA, start), table)
    torch_model = build_text(RECIPE, tmp_path / "again").torch_model
    peft_model = PeftModel.from_pretrained(torch_model, tmp_path / "adapter", is_trainable=True)
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # layers, linear maps, factors

    ours = run_ours(model, tokens, steps=STEPS)
    theirs = run_torch(peft_model, peft_model.base_model.model.model, tokens, steps=STEPS)
    assert theirs.loss[-1] < 0.8 * theirs.loss[0]  # it learns, so ten steps compare ten models
    assert max(theirs.grad_norm) > 10 > min(theirs.grad_norm)  # clipped and not
    assert largest_difference(ours.loss, theirs.loss) <= 1e-4
    assert largest_difference(ours.accuracy, theirs.accuracy) <= 1e-6
    assert largest_difference(ours.grad_norm, theirs.grad_norm) <= 1e-3

    end = {name: p.detach().numpy() for name, p in peft_model.named_parameters()}
    for path, stacked in ours.values.items():
        module, factor = path.removeprefix("language_model.layers.").rsplit(".lora_", 1)
        for i, mine in enumerate(stacked):
            name = f"base_model.model.model.layers.{i}.{module}.lora_{factor.upper()}"
            assert np.abs(mine - start[path][i]).max() > 0.02, path  # it moved
            assert np.abs(mine.T - end[f"{name}.default.weight"]).max() <= 1e-5, path


def test_full_fine_tuning_follows_torch(case: Case, tmp_path: Path) -> None:
    """Every decoder weight: embeddings, linear maps and norms."""
    tokens = make_tokens(3)
    model = load(case, lora=None)
    start = flat(nnx.state(model))
    decoder = build_text(RECIPE, tmp_path / "again").torch_model.model
    ours = run_ours(model, tokens, steps=3, lora=False)
    theirs = run_torch(decoder, decoder, tokens, steps=3)
    assert largest_difference(ours.loss, theirs.loss) <= 1e-4
    assert largest_difference(ours.grad_norm, theirs.grad_norm) <= 1e-3

    end = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    layers = RECIPE.text["num_hidden_layers"]
    assert len(end) == 9 * layers + 2
    assert len(ours.values) == 9 + 2
    unsettled = 0
    for path, value in ours.values.items():
        name = path.removeprefix("language_model.")
        name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        name = name.replace("embed_tokens", "embed_tokens.weight")
        one_each = value if name.startswith("layers.") else [value]
        for i, mine in enumerate(one_each):
            theirs_name = name.replace("layers.", f"layers.{i}.")
            if path.endswith(".kernel"):
                mine = mine.T
            away = np.abs(mine - end[theirs_name])
            # Adam divides a gradient by its own size. One under 1e-7 is fp32's rounding of sums
            # around 1e-2, so its step is as well: no two libraries agree on it.
            settled = theirs.smallest[theirs_name] >= 1e-7
            assert away[settled].max() <= 1e-5, path
            assert away.max() <= OPTIMIZER.learning_rate, path
            unsettled += np.sum(~settled)
        assert np.abs(value - start[path]).max() > 0.005, path
    assert unsettled < 0.001 * sum(x.size for x in end.values())  # 5 of 23,872


# --- the schedule and the optimizer ---


@pytest.mark.parametrize("warmup", [0, 1, 3, 9, 10, 25])
def test_schedule_equals_transformers(warmup: int) -> None:
    total = 10
    torch_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    torch_schedule = get_linear_schedule_with_warmup(torch_optimizer, warmup, total)
    ours = make_schedule(OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup), total)
    for step in range(total):
        assert float(ours(step)) == pytest.approx(torch_schedule.get_last_lr()[0], rel=1e-5), step
        torch_optimizer.step()
        torch_schedule.step()


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.3},
        {"b1": 0.5, "b2": 0.8},
        {"eps": 0.1},
        {"max_grad_norm": 0.2},
        {"warmup_steps": 0, "learning_rate": 0.1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_option_of_the_optimizer_is_pytorchs(changed: dict[str, Any]) -> None:
    options = {"learning_rate": 0.05, "warmup_steps": 2, **changed}
    cfg = OptimizerConfig(**options)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=12), rng.normal(size=(6, 12))

    parameter = torch.tensor(start, requires_grad=True)
    torch_optimizer = torch.optim.AdamW(
        [parameter],
        lr=cfg.learning_rate,
        betas=(cfg.b1, cfg.b2),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
    )
    torch_schedule = get_linear_schedule_with_warmup(torch_optimizer, cfg.warmup_steps, 6)
    optimizer = make_optimizer(cfg, 6)
    ours = jnp.asarray(start, jnp.float32)
    state = optimizer.init(ours)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([parameter], cfg.max_grad_norm)
        torch_optimizer.step()
        torch_schedule.step()
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, ours)
        ours = ours + update
        difference = np.abs(np.asarray(ours) - parameter.detach().numpy()).max()
        # in fp32, 1 - b2 ** t of the first steps has 4 to 5 digits
        assert difference <= 1e-4 * cfg.learning_rate


# --- what must not change the result ---


def with_random_factors(model: Model) -> Model:
    """LoRA whose b is not zero, so that it and its dropout show."""
    graphdef, factors, rest = nnx.split(model, LoRAParam, ...)
    rng = np.random.default_rng(1)
    factors = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), factors
    )
    return nnx.merge(graphdef, factors, rest)


def loss_and_gradients(
    model: Model,
    batch: PairBatch,
    *,
    remat: Remat = "none",
    chunk_size: int | None = None,
    together: Together | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """Without dropout, of the LoRA factors."""
    graphdef, trainable, frozen = split_trainable(model, lora=True)

    def loss(trainable: nnx.State) -> tuple[jax.Array, jax.Array]:
        return pair_loss(
            nnx.merge(graphdef, trainable, frozen),
            batch,
            columns=3,
            loss=LossConfig(temperature=TEMPERATURE),
            chunk_size=chunk_size,
            remat=remat,
            dropout_key=None,
            together=together,
        )

    (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    return float(value), flat(gradients)


def largest_relative(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert set(ours) == set(theirs)
    norms = {name: np.linalg.norm(x) for name, x in theirs.items()}
    assert min(norms.values()) > 0
    return max(float(np.linalg.norm(ours[name] - theirs[name]) / norms[name]) for name in ours)


@pytest.fixture(scope="module")
def adapted(case: Case) -> Model:
    return with_random_factors(load(case))


@pytest.fixture(scope="module")
def reference(adapted: Model) -> tuple[float, dict[str, np.ndarray]]:
    """One group, no remat, no dropout."""
    batch = next(batches_of(make_tokens(3), steps=1, groups=1))
    return loss_and_gradients(adapted, batch, remat="none")


@pytest.mark.parametrize(
    ("groups", "remat"),
    [(1, "dots"), (4, "none"), (3, "full"), (3, "offload_full")],
)
def test_length_groups_and_remat_change_nothing(
    adapted: Model,
    reference: tuple[float, dict[str, np.ndarray]],
    groups: int,
    remat: Remat,
) -> None:
    batch = next(batches_of(make_tokens(3), steps=1, groups=groups))
    assert len(batch.groups) == groups
    loss, gradients = loss_and_gradients(adapted, batch, remat=remat)
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert largest_relative(gradients, reference[1]) <= 1e-5


def test_groups_are_padded_to_what_the_run_needs() -> None:
    tokens = make_tokens(3)
    order = [rows_of(step) for step in range(3)]
    lengths = group_lengths(tokens.lengths, order, groups=4, multiple=1)
    assert list(lengths) == sorted(lengths)
    assert lengths[-1] == tokens.lengths.max()
    assert lengths[0] < lengths[-1] / 2  # short sentences are not padded to the longest
    for batch in batches_of(tokens, steps=3, groups=4):
        assert tuple(group.input_ids.shape[1] for group in batch.groups) == lengths
        assert sum(len(group.input_ids) for group in batch.groups) == 3 * BATCH


# --- dropout ---


def run_with_keys(
    case: Case, seeds: list[int], *, dropout: bool, remat: Remat
) -> list[list[float]]:
    """(loss, accuracy, gradient norm) of the same batch and weights for each key."""
    model = with_random_factors(load(case, LoRAConfig(rank=4, alpha=8.0, dropout=0.3)))
    graphdef, trainable, frozen = split_trainable(model, lora=True)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.0), STEPS)
    state = init_optimizer(optimizer, trainable, make_mesh(data=-1, fsdp=1))
    step = make_train_step(
        graphdef,
        optimizer,
        partial(
            pair_loss,
            columns=3,
            loss=LossConfig(temperature=TEMPERATURE),
            chunk_size=None,
            remat=remat,
        ),
        dropout=dropout,
        state=(trainable, state),
    )
    batch = next(batches_of(make_tokens(3), steps=1, groups=1))
    found = []
    for seed in seeds:
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(seed))
        found.append([float(x) for x in metrics])
    return found


def test_dropout_is_a_function_of_its_key(
    case: Case, reference: tuple[float, dict[str, np.ndarray]]
) -> None:
    first, other, again = run_with_keys(case, [1, 2, 1], dropout=True, remat="none")
    assert first == again
    assert abs(first[0] - other[0]) > 1e-3
    assert abs(first[0] - reference[0]) > 1e-3
    rematerialised = run_with_keys(case, [1], dropout=True, remat="full")[0]
    assert rematerialised == pytest.approx(first, rel=1e-5)  # the backward pass has the same masks


def test_without_dropout_the_key_is_not_used(
    case: Case, reference: tuple[float, dict[str, np.ndarray]]
) -> None:
    first, other = run_with_keys(case, [1, 2], dropout=False, remat="none")
    assert first == other
    assert first[0] == pytest.approx(reference[0], rel=1e-6)


def linear(dropout: float) -> Linear:
    precision = Precision(param=np.float32, compute=np.float32)
    lora = LoRAConfig(rank=3, alpha=6.0, dropout=dropout)
    module = Linear(8, 5, Build(precision, Runtime.on(make_mesh()), lora), rngs=nnx.Rngs(0))
    module.lora_b[...] = jax.random.normal(jax.random.key(7), (3, 5))
    return module


def outputs(module: Linear, x: jax.Array, count: int) -> np.ndarray:
    """The output for ``count`` keys, fp32 [count, 5]."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: module(x, dropout_key=key))(keys))


def test_rate_zero_is_no_dropout() -> None:
    module, x = linear(0.0), jax.random.normal(jax.random.key(3), (8,))
    assert (outputs(module, x, 3) == np.asarray(module(x))).all()


def test_expected_output_is_the_undropped_one() -> None:
    x = jax.random.normal(jax.random.key(3), (8,))
    many = outputs(linear(0.25), x, 20_000)
    error = many.std(axis=0) / np.sqrt(len(many))
    assert error.min() > 0
    assert (np.abs(many.mean(axis=0) - np.asarray(linear(0.0)(x))) < 4 * error).all()


def test_dropout_is_on_the_input_of_the_low_rank_path_only() -> None:
    """As in peft. An input with one entry is dropped whole or doubled; the base path keeps it."""
    module, x = linear(0.5), jnp.eye(8)[2]
    base = np.asarray(x @ module.kernel[...])
    delta = np.asarray(module(x)) - base
    found = outputs(module, x, 200) - base
    dropped = np.abs(found).max(axis=1) < 1e-6
    assert 60 < dropped.sum() < 140
    np.testing.assert_allclose(
        found[~dropped], np.tile(2 * delta, (200 - dropped.sum(), 1)), rtol=1e-5
    )
