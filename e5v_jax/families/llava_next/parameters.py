"""The parameters of LLaVA-NeXT: tower, projector, newline and the decoder's rows.

Layouts seen in the wild, told apart by the prefixes: transformers 4, transformers 5, and the
original LLaVA code, which numbers the projector's layers.
"""

from jax.sharding import PartitionSpec as P

from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.nn.clip import clip_parameters
from e5v_jax.nn.decoder import TEXT_SECTIONS, decoder_parameters
from e5v_jax.nn.parameters import Parameter, ParameterTable, Section, linear

# What we write: transformers 4 and 5 both read it.
_SECTIONS = {
    "text": Section(
        prefixes=TEXT_SECTIONS["text"].prefixes,
        anchors=TEXT_SECTIONS["text"].anchors,
        export="language_model.model.",
    ),
    "head": Section(
        prefixes=TEXT_SECTIONS["head"].prefixes,
        anchors=TEXT_SECTIONS["head"].anchors,
        export="language_model.",
    ),
    "vision": Section(
        prefixes=(
            "vision_tower.vision_model.",
            "model.vision_tower.vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
            "vision_tower.",
        ),
        anchors=("embeddings.class_embedding",),
        export="vision_tower.vision_model.",
    ),
    "projector": Section(
        prefixes=("multi_modal_projector.", "model.multi_modal_projector.", "model.mm_projector."),
        anchors=("linear_1.weight", "0.weight"),
        export="multi_modal_projector.",
        renamed={"0.": "linear_1.", "2.": "linear_2."},
    ),
    "newline": Section(prefixes=("", "model."), anchors=("image_newline",), export=""),
}


def parameters(config: LlavaNextConfig) -> ParameterTable:
    """The rows of ``LlavaNextForConditionalGeneration``."""
    d, v = config.text.hidden_size, config.vision.hidden_size
    ours = "multi_modal_projector.linear_"
    first = linear(
        "projector", "linear_1", f"{ours}1", (v, d), P("fsdp", "tensor"), bias=P("tensor")
    )
    second = linear("projector", "linear_2", f"{ours}2", (d, d), P("tensor", "fsdp"), bias=P(None))
    rows = (
        *decoder_parameters(config.text),
        *clip_parameters(config.vision, config.num_vision_layers),
        *first,
        *second,
        Parameter("newline", "image_newline", "image_newline", (d,), P(None)),
    )
    return ParameterTable(rows, _SECTIONS, adapter_prefix="model.language_model.")
