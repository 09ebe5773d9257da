"""``python -m convert.smooth MODEL DST``: the same model, whose activations int8 rounds less.

A few channels of a decoder's activations are much larger than the others, and set the scale of all.
SmoothQuant (arXiv 2211.10438, section 4) divides each channel of what a linear map gets, and
multiplies the rows of its kernel by the same number; the division is folded into what came before:
a norm's gain, or the columns of the linear map that made the channel. Here all these numbers are
powers of two, so that nothing is rounded otherwise: without int8 the vectors are those of the model
before, bit for bit.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from e5v_jax import cli
from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints.converted import ConvertedFolder, write_again
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.families.base import BatchShape, Processor
from e5v_jax.nn.decoder import Decoder, DecoderLayer
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.presets import find_preset
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.storage import as_path

ALPHA = 0.5
"""How much of the outliers goes to the kernels, as in the paper."""
_MOST = 12  # a channel changes by at most this power of two
_TEXTS, _ROWS = 128, 8  # sentences, and how many are in the model at a time
_LAYER = re.compile(r"language_model\.layers\.(\d+)\.(.+)")

Exponents = dict[str, np.ndarray]
"""Powers of two, int [layers, channels], of what linear maps get: ``qkv``, ``heads`` (of o_proj),
``mlp`` (of gate and up), ``down``; and ``o``, the same as ``heads`` for each value head once."""


@dataclass(frozen=True)
class Args:
    """Write a converted folder again so that --quantize int8 is more exact; nothing else changes.

    Outliers of the decoder's activations are looked for in sentences. An adapter that was trained
    on MODEL does not fit DST: merge it before.
    """

    model: Annotated[cli.BucketPath, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Converted folder."""
    dst: Annotated[cli.BucketPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist."""
    texts: Path | None = None
    """A file with a sentence on each line, of the kind that will be embedded; by default 128
    sentences that come with the package."""


def smooth(args: Args) -> None:
    """Smooth; ``args.dst`` appears only when whole. Raises ValueError or OSError, saying why."""
    base = ConvertedFolder(as_path(args.model))
    if base.info.smoothed:
        raise ValueError(f"{args.model}: is smoothed already")
    if (base.folder / "adapter").is_dir():
        raise ValueError(
            f"{args.model}/adapter: would not fit the smoothed model; convert with --adapter and "
            "--merge, then smooth"
        )
    exponents = find_exponents(base, _read_texts(args.texts))
    arrays = (
        {
            name: scaled(name, array, exponents)
            for name, array in zip(group, base.read(list(group)), strict=True)
        }
        for group in base.table.groups(base.shapes())
    )
    with new_folder(as_path(args.dst)) as folder:
        digest = write_again(folder, base, arrays, smoothed=True)
    most = max(int(np.abs(x).max()) for x in exponents.values())
    print(f"{args.dst}: written; channels changed by up to 2**{most}, hash {digest[:12]}")


def _read_texts(file: Path | None) -> list[str]:
    if file is None:
        rows = csv.reader(files("e5v_jax.demo").joinpath("train.csv").read_text().splitlines())
        texts = list(dict.fromkeys(text for row in rows for text in row))[1:]
        return texts[:_TEXTS]
    texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{file}: no sentences")
    return texts[:_TEXTS]


def find_exponents(base: ConvertedFolder, texts: Sequence[str]) -> Exponents:
    """Choose the power of two of each channel by the largest values that ``texts`` have there.

    Raises ValueError: a text cannot be embedded.
    """
    dtype = jnp.dtype(base.info.dtype)
    build = Build(Precision(dtype, jnp.float32), Runtime.on(make_mesh()))
    decoder: Decoder = load_model(base, build, load_vision=False).language_model
    preset = find_preset(None, *base.known_as)
    processor: Processor = base.family.processor(
        base.config, load_tokenizer(base.folder), None, preset
    )
    items = processor.measure(list(texts), preset.choose())
    length = processor.padded_length(max(item.length for item in items), 0)
    run = jax.jit(input_maxima)
    seen: dict[str, np.ndarray] = {}
    for start in range(0, len(items), _ROWS):
        part: list[Any] = [processor.load(item) for item in items[start : start + _ROWS]]
        part += [None] * (_ROWS - len(part))
        batch: Any = processor.stack(part, BatchShape(_ROWS, length))
        for name, found in run(decoder, batch.input_ids, batch.last_index).items():
            seen[name] = np.maximum(seen.get(name, 0), np.asarray(found))
    layers = decoder.layers
    kernels = {
        "qkv": (layers.self_attn.q_proj, layers.self_attn.k_proj, layers.self_attn.v_proj),
        "o": (layers.self_attn.o_proj,),
        "mlp": (layers.mlp.gate_proj, layers.mlp.up_proj),
        "down": (layers.mlp.down_proj,),
    }
    found = {}
    for name, maps in kernels.items():
        # [layers, in], over all that a row of the kernels is multiplied with
        rows = [np.asarray(jnp.abs(each.kernel[...]).max(axis=2), np.float32) for each in maps]
        both = seen[name], np.max(rows, axis=0)
        if name != "o":
            found[name] = _exponents(*both)
            continue
        # the query heads of one value head have its channels
        text, count = base.config.text, len(both[0])
        shape = (count, text.num_key_value_heads, -1, text.head_dim)  # [layers, K, G, H]
        values = _exponents(*(x.reshape(shape).max(axis=2, keepdims=True) for x in both))
        groups = text.num_attention_heads // text.num_key_value_heads
        found["o"] = values.reshape(count, -1)
        found["heads"] = np.repeat(values, groups, axis=2).reshape(count, -1)
    return found


def _exponents(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Equation 4 of the paper, rounded to powers of two; 0 where nothing is known."""
    known = (activations > 0) & (weights > 0)
    x, w = np.where(known, activations, 1.0), np.where(known, weights, 1.0)
    exact = ALPHA * np.log2(x) - (1 - ALPHA) * np.log2(w)
    exact -= np.median(
        exact, axis=tuple(range(1, exact.ndim)), keepdims=True
    )  # a token's own scale takes the rest
    return np.where(known, np.clip(np.rint(exact), -_MOST, _MOST), 0).astype(np.int32)


def input_maxima(
    decoder: Decoder, input_ids: jax.Array, last_index: jax.Array
) -> dict[str, jax.Array]:
    """The largest size of each channel that the linear maps get: fp32 [layers, channels] by name.

    Of token ids [B, L]; those behind ``last_index`` [B] do not count.
    """
    real = (jnp.arange(input_ids.shape[1]) <= last_index[:, None])[..., None]  # [B, L, 1]
    angles = decoder.angles(input_ids.shape[1], None)
    none: list[jax.Array | None] = [None] * 3

    def largest(x: jax.Array) -> jax.Array:
        return jnp.where(real, jnp.abs(x), 0).max(axis=(0, 1)).astype(jnp.float32)

    def body(x: jax.Array, layer: DecoderLayer) -> tuple[jax.Array, dict[str, jax.Array]]:
        qkv = layer.input_layernorm(x)
        o = layer.self_attn.heads(qkv, angles, none)
        x = x + layer.self_attn.o_proj(o)
        mlp = layer.post_attention_layernorm(x)
        down = layer.mlp.inside(mlp, none[:2])
        x = x + layer.mlp.down_proj(down)
        seen = {"qkv": qkv, "o": o, "mlp": mlp, "down": down}
        return x, {name: largest(value) for name, value in seen.items()}

    return jax.lax.scan(body, decoder.embed(input_ids), decoder.layers)[1]


def scaled(name: str, array: np.ndarray, exponents: Exponents) -> np.ndarray:
    """A parameter of the smoothed model, in the dtype that it had."""
    if (match := _LAYER.fullmatch(name)) is None:
        return array
    layer, rest = int(match[1]), match[2]
    qkv, o, mlp, down = (exponents[key][layer] for key in ("qkv", "o", "mlp", "down"))
    rows: np.ndarray | None = None  # of a kernel, what its inputs are divided by
    columns: np.ndarray | None = None  # what its outputs, or a vector, are divided by
    match rest.split("."):
        case ["input_layernorm", "scale"]:
            columns = qkv
        case ["post_attention_layernorm", "scale"]:
            columns = mlp
        case ["self_attn", "q_proj" | "k_proj", "kernel"]:
            rows = qkv
        case ["self_attn", "v_proj", "kernel"]:
            rows, columns = qkv, o
        case ["self_attn", "v_proj", "bias"]:
            columns = o
        case ["self_attn", "o_proj", "kernel"]:
            rows = exponents["heads"][layer]
        case ["mlp", "gate_proj", "kernel"]:
            rows = mlp
        case ["mlp", "up_proj", "kernel"]:
            rows, columns = mlp, down
        case ["mlp", "down_proj", "kernel"]:
            rows = down
        case ["self_attn", "q_proj" | "k_proj", "bias"] | ["self_attn", "q_norm" | "k_norm", _]:
            pass
        case _:
            raise ValueError(f"{name}: smoothing does not know what to do with it")
    exponent = np.zeros((), np.int32)
    if rows is not None:
        exponent = exponent + rows[:, None]
    if columns is not None:
        exponent = exponent - columns
    return np.ldexp(array.astype(np.float32), exponent).astype(array.dtype)
