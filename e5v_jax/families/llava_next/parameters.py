"""The parameters of LLaVA-NeXT: tower, projector, newline and the decoder's rows.

Layouts seen in the wild, told apart by the prefixes: transformers 4, transformers 5, and the
original LLaVA code, which numbers the projector's layers.
"""

from dataclasses import replace

from jax.sharding import PartitionSpec as P

from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.nn.decoder import TEXT_SECTIONS, decoder_parameters
from e5v_jax.nn.parameters import Parameter, ParameterTable, Section, linear
from e5v_jax.nn.vision_config import CLIP, DINOV2, SIGLIP
from e5v_jax.nn.vision_tower import tower_parameters

_PROJECTOR = "multi_modal_projector"
# The exported prefixes are those that transformers 4 and 5 both read.
_CLIP_SECTION = Section(
    prefixes=(
        "vision_tower.vision_model.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ),
    anchors=("embeddings.class_embedding",),
    export="vision_tower.vision_model.",
)
_VISION_SECTIONS = {
    CLIP: _CLIP_SECTION,
    SIGLIP: replace(_CLIP_SECTION, anchors=("embeddings.patch_embedding.weight",)),
    DINOV2: Section(
        prefixes=("vision_tower.", "model.vision_tower."),
        anchors=("embeddings.cls_token",),
        export="vision_tower.",
    ),
}
_SECTIONS = {
    "text": replace(TEXT_SECTIONS["text"], export="language_model.model."),
    "head": replace(TEXT_SECTIONS["head"], export="language_model."),
    "projector": Section(
        prefixes=("multi_modal_projector.", "model.multi_modal_projector.", "model.mm_projector."),
        anchors=("linear_1.weight", "0.weight"),
        export="multi_modal_projector.",
        renamed={"0.": "linear_1.", "2.": "linear_2."},
    ),
    "newline": Section(prefixes=("", "model."), anchors=("image_newline",), export=""),
}

_ADAPTER_PREFIXES = (
    "model.language_model.",
    "language_model.",  # the same without the head
    "language_model.model.",  # transformers 4
    "model.",  # the original LLaVA code, or trained on the decoder taken out
    "",
)


def parameters(config: LlavaNextConfig) -> ParameterTable:
    """The rows of ``LlavaNextForConditionalGeneration``."""
    d, v = config.text.hidden_size, config.vision.hidden_size * len(config.feature_depths)
    columns, split_rows = P("fsdp", "tensor"), P("tensor", "fsdp")
    first = Parameter("projector", "linear_1", f"{_PROJECTOR}.linear_1", (v, d), columns)
    second = Parameter("projector", "linear_2", f"{_PROJECTOR}.linear_2", (d, d), split_rows)
    rows = (
        *decoder_parameters(config.text),
        *tower_parameters(config.vision, config.num_vision_layers),
        *linear(first, bias=P("tensor")),
        *linear(second, bias=P(None)),
        Parameter("newline", "image_newline", "image_newline", (d,), P(None)),
    )
    sections = {**_SECTIONS, "vision": _VISION_SECTIONS[config.vision.model_type]}
    return ParameterTable(rows, sections, _ADAPTER_PREFIXES)
