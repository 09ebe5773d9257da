"""What a program costs by formula, for chips that nothing here compiles for: GPUs.

Held against what XLA allots for the same program on TPUs in tests/test_tpu_aot.py.
"""

import jax
import jax.numpy as jnp

from e5v_jax.dryrun.flops import lora_parameters, matmul_parameters
from e5v_jax.dryrun.program import COLUMNS, Program, Target, per_device_bytes
from e5v_jax.dryrun.report import Cost
from e5v_jax.families.base import BatchShape
from e5v_jax.nn.remat import INPUT, LOW_RANK, MLP, O_PROJ, OFFLOADED, QKV_PROJ
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.train.config import TrainConfig


def _layer_activations(text: TextConfig, tokens: int, length: int, size: int) -> int:
    """Bytes that one layer's backward pass keeps: inputs of every matmul, scores twice in fp32."""
    heads = text.num_attention_heads * text.head_dim
    kv = 2 * text.num_key_value_heads * text.head_dim
    features = 4 * text.hidden_size + 2 * heads + kv + 4 * text.intermediate_size
    scores = 2 * 4 * text.num_attention_heads * length
    return tokens * (features * size + scores)


def _offloaded(cfg: TrainConfig, text: TextConfig, size: int) -> int:
    """Bytes that go to the host for each token and layer."""
    d, rank = text.hidden_size, cfg.lora.rank if cfg.lora else 0
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    values = {
        INPUT: d,
        QKV_PROJ: heads * text.head_dim,
        O_PROJ: d,
        MLP: 2 * text.intermediate_size,  # no gradient needs what the layer's last linear map gives
        LOW_RANK: 7 * rank,
    }
    return size * sum(values[name] for name in OFFLOADED.get(cfg.remat, ()))


def estimate_train(
    cfg: TrainConfig, target: Target, program: Program, lengths: tuple[int, ...], flops: float
) -> Cost:
    """A training step on groups of padded ``lengths``, which does ``flops`` on each chip.

    Kept through the step: parameters, optimizer, gradients (fp32), the embeddings of all inputs,
    and per layer what ``remat`` keeps of the inputs that are in the model at a time, here or in the
    host's memory. On top comes one layer at work, with its weights gathered or dequantised and the
    next ones on their way.
    """
    devices, split = target.runtime.batch_devices, target.runtime.mesh.shape["fsdp"]
    text, size = target.config.text, jnp.dtype(cfg.dtype).itemsize
    layers, weights = text.num_hidden_layers, matmul_parameters(target.table)
    parameters = per_device_bytes((program.frozen, program.trainable))
    optimizer = per_device_bytes(program.optimizer)
    trained = per_device_bytes(program.trainable)
    inputs = COLUMNS * cfg.batch_size // devices
    longest = max(lengths)
    rows = inputs // len(lengths)  # at work at a time, in one layer
    kept_tokens = sum(rows * length for length in lengths)
    if cfg.chunk_size is not None and cfg.chunk_size // devices < rows:
        rows = cfg.chunk_size // devices
        kept_tokens = rows * longest
    layer = _layer_activations(text, rows * longest, longest, size)
    dots = layer * kept_tokens // (rows * longest) // 2
    kept = {
        "full": kept_tokens * text.hidden_size * size,
        "dots": dots,
        "dots_except_o": dots - kept_tokens * text.hidden_size * size,
        "dots_except_mlp": dots - kept_tokens * 2 * text.intermediate_size * size,
        "none": layer * kept_tokens // (rows * longest),
    }
    sent = _offloaded(cfg, text, size)
    on_its_way = 2 * sent * rows * longest  # of one layer to the host, of another from there
    moved_weights = 2 * (weights // layers) * size if split > 1 or cfg.quantize else 0
    vectors = COLUMNS * cfg.batch_size * text.hidden_size * 4
    peak = parameters + optimizer + trained + 2 * vectors
    peak += layers * kept.get(cfg.remat, 0) + on_its_way + layer + moved_weights

    # of a chunk over the weights
    passes = 2 + cfg.remat.endswith("full") + (cfg.chunk_size is not None)
    chunks = inputs // rows
    stored = per_device_bytes(program.frozen) * min(split, devices)
    traffic = float(chunks * passes * stored)
    if cfg.quantize:
        traffic += chunks * passes * weights * 2 * size
    group = inputs // len(lengths)
    activations = sum(_layer_activations(text, group * n, n, size) for n in lengths)
    traffic += passes * layers * 2 * activations
    traffic += 3 * (trained + optimizer)
    collectives: dict[str, float] = {}
    if split > 1:
        collectives["all-gather"] = chunks * passes * stored * ((split - 1) / split)
    if devices > 1:
        changed = lora_parameters(target.table, cfg.lora) if cfg.lora else weights
        collectives["all-reduce"] = 2 * 4 * changed * (devices - 1) / devices
    host_memory = layers * kept_tokens * sent
    host_bytes = 2.0 * host_memory  # there and back
    traffic += host_bytes
    return Cost(
        parameters,
        optimizer,
        peak,
        peak,
        flops,
        traffic,
        collectives,
        host_memory=host_memory,
        host_bytes=host_bytes,
    )


def estimate_encode(
    target: Target,
    program: Program,
    shape: BatchShape,
    flops: float,
    size: int,
    *,
    int8_flops: float,
) -> Cost:
    """One batch of the encoder, whole weights on each chip; ``size`` is the bytes of a value.

    Of ``flops`` those of int8 by int8 are ``int8_flops``.
    """
    parameters = per_device_bytes(program.frozen)
    text, rows = target.config.text, shape.rows // target.runtime.batch_devices
    tokens = rows * shape.length
    widest = 4 * text.hidden_size + 2 * text.intermediate_size
    images = target.family.image_cost(target.config, rows, shape.shape_key, size)
    pixels = [x for x in jax.tree.leaves(program.args[1]) if x.dtype == jnp.uint8]
    working = max(tokens * widest * size, images.bytes)
    working += 5 * per_device_bytes(pixels)  # as they come, and in fp32
    weights = matmul_parameters(target.table) // text.num_hidden_layers
    peak = parameters + working + 2 * weights * size
    traffic = parameters + text.num_hidden_layers * 2 * tokens * widest * size
    return Cost(parameters, 0, peak, peak, flops, float(traffic), int8_flops=int8_flops)
