"""Memory and traffic by formula, for chips that nothing here compiles for: GPUs.

Held against what XLA allots for the same program in tests/test_dryrun.py.
"""

from dataclasses import dataclass

from e5v_jax.dryrun.flops import decoder_matmul_parameters, lora_parameters
from e5v_jax.dryrun.program import Program, per_device_bytes
from e5v_jax.dryrun.report import Memory
from e5v_jax.nn.config import ModelConfig
from e5v_jax.train.config import TrainConfig


@dataclass(frozen=True)
class Estimate:
    """Of one device and one step."""

    memory: Memory
    hbm_bytes: float
    collective_bytes: dict[str, float]


def _layer_activations(model: ModelConfig, tokens: int, length: int, size: int) -> int:
    """Bytes that one layer's backward pass keeps: inputs of every matmul, scores twice in fp32."""
    text = model.text
    heads = text.num_attention_heads * text.head_dim
    kv = 2 * text.num_key_value_heads * text.head_dim
    features = 4 * text.hidden_size + 2 * heads + kv + 4 * text.intermediate_size
    scores = 2 * 4 * text.num_attention_heads * length
    return tokens * (features * size + scores)


def estimate_train(
    cfg: TrainConfig,
    model: ModelConfig,
    program: Program,
    sequence_lengths: tuple[int, ...],
    *,
    devices: int,
    split: int,
) -> Estimate:
    """A training step on ``devices``, of which each ``split`` hold the weights once between them.

    Kept through the step: parameters, optimizer, gradients (fp32), the embeddings of all inputs,
    and per layer what ``remat`` keeps of the inputs that are in the model at a time. On top comes
    one layer at work, with its weights gathered or dequantised and the next ones on their way.
    """
    text, size = model.text, 2 if cfg.dtype == "bfloat16" else 4
    parameters = per_device_bytes((program.frozen, program.trainable))
    optimizer = per_device_bytes(program.optimizer)
    trained = per_device_bytes(program.trainable)
    inputs = 3 * cfg.batch_size // devices
    longest = max(sequence_lengths)
    rows = inputs // len(sequence_lengths)  # at work at a time, in one layer
    kept_tokens = sum(rows * length for length in sequence_lengths)
    if cfg.chunk_size is not None and cfg.chunk_size // devices < rows:
        rows = cfg.chunk_size // devices
        kept_tokens = rows * longest
    layer = _layer_activations(model, rows * longest, longest, size)
    per_layer = kept_tokens * text.hidden_size * size
    if cfg.remat != "full":
        per_layer = layer * kept_tokens // (rows * longest)
        per_layer //= 2 if cfg.remat == "dots" else 1
    kernel = decoder_matmul_parameters(model) // text.num_hidden_layers
    moved_weights = 2 * kernel * size if split > 1 or cfg.quantize else 0
    vectors = 3 * cfg.batch_size * text.hidden_size * 4
    peak = parameters + optimizer + trained + 2 * vectors
    peak += text.num_hidden_layers * per_layer + layer + moved_weights

    passes = 2 + (cfg.remat == "full")  # over the weights, for one group or chunk
    chunks = inputs // rows
    if cfg.chunk_size is not None:
        passes += 1
    tokens = inputs * longest
    stored = per_device_bytes(program.frozen) * min(split, devices)
    traffic = float(chunks * passes * stored)
    if cfg.quantize:
        traffic += chunks * passes * decoder_matmul_parameters(model) * 2 * size
    traffic += (
        passes * text.num_hidden_layers * 2 * _layer_activations(model, tokens, longest, size)
    )
    traffic += 3 * (trained + optimizer)
    collectives: dict[str, float] = {}
    if devices > 1:
        if split > 1:
            share = (split - 1) / split
            collectives["all-gather"] = chunks * passes * stored * share
        trained_weights = (
            lora_parameters(model, cfg.lora) if cfg.lora else decoder_matmul_parameters(model)
        )
        collectives["all-reduce"] = 2 * 4 * trained_weights * (devices - 1) / devices
    return Estimate(Memory(parameters, optimizer, peak, peak), traffic, collectives)


def estimate_encode(
    model: ModelConfig, program: Program, *, rows: int, length: int, tiles: int, size: int
) -> Estimate:
    """One batch of ``rows`` sequences and ``tiles`` tiles per device, whole weights on each."""
    parameters = per_device_bytes(program.frozen)
    text = model.text
    tokens = rows * length
    widest = 4 * text.hidden_size + 2 * text.intermediate_size
    working = tokens * widest * size
    if tiles and model.vision is not None:
        vision = model.vision
        positions = vision.num_patches + 1
        scores = vision.num_attention_heads * positions * 4 * 2
        tower = tiles * positions * ((8 * vision.hidden_size) * size + scores)
        working = max(working, tower) + tiles * 3 * vision.image_size**2 * 5
    kernel = decoder_matmul_parameters(model) // text.num_hidden_layers
    peak = parameters + working + 2 * kernel * size
    traffic = parameters + text.num_hidden_layers * 2 * tokens * widest * size
    return Estimate(Memory(parameters, 0, int(peak), int(peak)), float(traffic), {})
