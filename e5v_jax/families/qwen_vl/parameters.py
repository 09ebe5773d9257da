"""The parameters of a Qwen-VL model: tower, mergers and the decoder's rows."""

from collections.abc import Iterator
from dataclasses import replace

from jax.sharding import PartitionSpec as P

from e5v_jax.families.qwen_vl.config import QwenVisionConfig, QwenVLConfig
from e5v_jax.families.qwen_vl.vision import FRAMES
from e5v_jax.nn.decoder import decoder_parameters
from e5v_jax.nn.parameters import Parameter, ParameterTable, Section, layer_norm, linear

# The exported prefixes are those that transformers has since 4.52, and the hub's files of Qwen3-VL.
_SECTIONS = {
    "text": Section(
        prefixes=("model.language_model.", "language_model.", "model.", ""),
        anchors=("embed_tokens.weight",),
        export="model.language_model.",
    ),
    "head": Section(prefixes=("", "model."), anchors=("lm_head.weight",), export=""),
    "vision": Section(
        prefixes=("model.visual.", "visual."),
        anchors=("patch_embed.proj.weight",),
        export="model.visual.",
    ),
}
_ADAPTER_PREFIXES = ("model.language_model.", "language_model.", "model.", "")
_COLUMNS, _ROWS, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P(None)


def parameters(config: QwenVLConfig) -> ParameterTable:
    """The rows of ``Qwen3VLForConditionalGeneration``."""
    rows = (*decoder_parameters(config.text), *_tower(config.vision))
    return ParameterTable(rows, _SECTIONS, _ADAPTER_PREFIXES)


def _tower(cfg: QwenVisionConfig) -> Iterator[Parameter]:
    """The rows of a :class:`QwenVision` at ``visual``."""
    d, f, wide = cfg.hidden_size, cfg.intermediate_size, cfg.hidden_size * cfg.merged

    def one(name: str, shape: tuple[int, ...], spec: P, layers: int | None = None) -> Parameter:
        return Parameter("vision", name, f"visual.{name}", shape, spec, layers=layers)

    def merger(name: str, norm: int, layers: int | None = None) -> Iterator[Parameter]:
        yield from layer_norm(one(f"{name}.norm", (norm,), _WHOLE, layers))
        first = one(f"{name}.linear_fc1", (wide, wide), _COLUMNS, layers)
        second = one(f"{name}.linear_fc2", (wide, cfg.out_hidden_size), _ROWS, layers)
        yield from linear(first, bias=P("tensor"))
        yield from linear(second, bias=_WHOLE)

    inputs = 3 * FRAMES * cfg.patch_size**2
    kernel, bias = linear(one("patch_embed.proj", (inputs, d), P(None, "fsdp")), bias=_WHOLE)
    yield replace(kernel, name="visual.patch_embed.kernel", transform="conv3d")
    yield replace(bias, name="visual.patch_embed.bias")
    table = one("pos_embed", (cfg.num_position_embeddings, d), P(None, None))
    yield replace(table, hf="pos_embed.weight")
    for name in ("norm1", "norm2"):
        yield from layer_norm(one(f"blocks.{{i}}.{name}", (d,), _WHOLE, cfg.depth))
    for name, shape, spec, bias_spec in (
        ("attn.qkv", (d, 3 * d), _COLUMNS, P("tensor")),
        ("attn.proj", (d, d), _ROWS, _WHOLE),
        ("mlp.linear_fc1", (d, f), _COLUMNS, P("tensor")),
        ("mlp.linear_fc2", (f, d), _ROWS, _WHOLE),
    ):
        yield from linear(one(f"blocks.{{i}}.{name}", shape, spec, cfg.depth), bias=bias_spec)
    yield from merger("merger", d)
    if deep := len(cfg.deepstack_visual_indexes):
        yield from merger("deepstack_merger_list.{i}", wide, deep)
