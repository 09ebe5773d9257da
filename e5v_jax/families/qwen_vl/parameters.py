"""The parameters of a Qwen-VL model: tower, mergers and the decoder's rows."""

from collections.abc import Iterator
from dataclasses import replace

from jax.sharding import PartitionSpec as P

from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.vision import FRAMES
from e5v_jax.families.qwen_vl.vision_config import OMNI, QWEN2, QWEN2_5, QWEN3, QwenVisionConfig
from e5v_jax.nn.decoder import decoder_parameters
from e5v_jax.nn.parameters import Parameter, ParameterTable, Section, layer_norm, linear


def _sections(text: str, vision: str) -> dict[str, Section]:
    """The parts of a checkpoint, exported under the given prefixes."""
    return {
        "text": Section(
            prefixes=("model.language_model.", "language_model.", "thinker.model.", "model.", ""),
            anchors=("embed_tokens.weight",),
            export=text,
        ),
        "head": Section(
            prefixes=("", "model.", "thinker."), anchors=("lm_head.weight",), export=""
        ),
        "vision": Section(
            prefixes=("model.visual.", "visual.", "thinker.visual."),
            anchors=("patch_embed.proj.weight",),
            export=vision,
        ),
    }


# Those of the hub's files, which transformers 5 still writes.
_OLD, _NEW = _sections("model.", "visual."), _sections("model.language_model.", "model.visual.")
_IGNORED = {
    OMNI: {
        r"(thinker\.)?audio_tower\..*": "there is no sound",
        r"(talker|token2wav)\..*": "nothing is said aloud",
    },
    QWEN2_5: {r"multi_vector_projector\..*": "of jina-embeddings-v4: tokens get no own vectors"},
}
_ADAPTER_PREFIXES = ("model.language_model.", "language_model.", "thinker.model.", "model.", "")
_COLUMNS, _ROWS, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P(None)


def parameters(config: QwenVLConfig) -> ParameterTable:
    """The rows of ``Qwen2VLForConditionalGeneration`` and of those of later generations."""
    kind = config.vision.model_type
    return ParameterTable(
        (*decoder_parameters(config.text), *_tower(config.vision)),
        _NEW if kind == QWEN3 else _OLD,
        _ADAPTER_PREFIXES,
        ignored=_IGNORED.get(kind, {}),
    )


def _tower(cfg: QwenVisionConfig) -> Iterator[Parameter]:
    """The rows of a :class:`QwenVision` at ``visual``."""
    d, f, wide = cfg.hidden_size, cfg.intermediate_size, cfg.hidden_size * cfg.merged
    is_new = cfg.model_type == QWEN3

    def one(
        name: str, shape: tuple[int, ...], spec: P, layers: int | None = None, hf: str | None = None
    ) -> Parameter:
        return Parameter("vision", hf or name, f"visual.{name}", shape, spec, layers=layers)

    def norm(like: Parameter) -> Iterator[Parameter]:
        rows = layer_norm(like)
        yield next(rows)
        if not cfg.kind.is_gated:  # RMSNorm has no bias
            yield from rows

    def merger(name: str, width: int, layers: int | None = None) -> Iterator[Parameter]:
        names = ("norm", "linear_fc1", "linear_fc2") if is_new else ("ln_q", "mlp.0", "mlp.2")
        hf = [f"{name}.{part}" for part in names]
        yield from norm(one(f"{name}.norm", (width,), _WHOLE, layers, hf[0]))
        first = one(f"{name}.linear_fc1", (wide, wide), _COLUMNS, layers, hf[1])
        second = one(f"{name}.linear_fc2", (wide, cfg.out_hidden_size), _ROWS, layers, hf[2])
        yield from linear(first, bias=P("tensor"))
        yield from linear(second, bias=_WHOLE)

    inputs = 3 * FRAMES * cfg.patch_size**2
    patch = one("patch_embed.proj", (inputs, d), P(None, "fsdp"))
    kernel, *bias = linear(patch, bias=_WHOLE if is_new else None)
    yield replace(kernel, name="visual.patch_embed.kernel", transform="conv3d")
    yield from (replace(row, name="visual.patch_embed.bias") for row in bias)
    if cfg.num_position_embeddings is not None:
        table = one("pos_embed", (cfg.num_position_embeddings, d), P(None, None))
        yield replace(table, hf="pos_embed.weight")
    for name in ("norm1", "norm2"):
        yield from norm(one(f"blocks.{{i}}.{name}", (d,), _WHOLE, cfg.depth))
    for name, (shape, spec, hf) in _block_maps(cfg, d, f).items():
        place = f"blocks.{{i}}.{name}"
        like = one(place, shape, spec, cfg.depth, f"blocks.{{i}}.{hf}")
        yield from linear(like, bias=P("tensor") if spec == _COLUMNS else _WHOLE)
    yield from merger("merger", d)
    if deep := len(cfg.deepstack_visual_indexes):
        yield from merger("deepstack_merger_list.{i}", wide, deep)


def _block_maps(cfg: QwenVisionConfig, d: int, f: int) -> dict[str, tuple[tuple[int, int], P, str]]:
    """The linear maps of a block: shape, spec and Hugging Face's name of each."""
    found = {}
    for name in ("q", "k", "v") if cfg.kind.splits_qkv else ("qkv",):
        found[f"attn.{name}"] = ((d, len(name) * d), _COLUMNS, f"attn.{name}")
    found["attn.proj"] = ((d, d), _ROWS, "attn.proj")
    if cfg.kind.is_gated:
        maps = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    else:
        maps = {"linear_fc1": (d, f), "linear_fc2": (f, d)}
    for name, shape in maps.items():
        hf = name.removeprefix("linear_") if cfg.model_type == QWEN2 else name
        found[f"mlp.{name}"] = (shape, _ROWS if shape == (f, d) else _COLUMNS, f"mlp.{hf}")
    return found
