"""What sentence-transformers 6 reads beside a Hugging Face checkpoint, so that it embeds as we do.

Its modules, how they pool and normalise, a chat template that renders the prompts byte for byte,
and transformers' processor, for a source that brought none. vLLM's pooling runner and TEI read the
same files.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.preprocessor import FILES
from e5v_jax.families.base import Processor
from e5v_jax.presets import Preset

_TEXT = "\ue000"  # where the text goes: no prompt holds this character
_MODULES = (
    ("", "base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "base.modules.normalize.Normalize"),
)
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
_TEMPLATE = """\
{{#- One message with a text, an image, or both, as the model was trained to see them. -#}}
{{%- set found = namespace(text='', texts=0, images=0) -%}}
{{%- for message in messages -%}}
{{%- if message['content'] is string -%}}
{{%- set found.text = found.text + message['content'] -%}}{{%- set found.texts = 1 -%}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'text' -%}}
{{%- set found.text = found.text + part['text'] -%}}{{%- set found.texts = 1 -%}}
{{%- elif part['type'] == 'image' -%}}{{%- set found.images = found.images + 1 -%}}
{{%- else -%}}{{{{- raise_exception('expected texts and images, found ' + part['type']) -}}}}
{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{%- endfor -%}}
{{%- if found.images > 1 -%}}{{{{- raise_exception('expected at most one image') -}}}}
{{%- elif found.images and found.texts -%}}{text_image}
{{%- elif found.images -%}}{image}
{{%- else -%}}{text}
{{%- endif -%}}"""


def write_sentence_transformers(
    folder: Path, source: ConvertedFolder, processor: Processor
) -> list[str]:
    """Write the files into ``folder``, which has the exported checkpoint of ``source``.

    ``processor`` fills the prompts that they are to render; it has passed :func:`check_steps`.
    Returns what the user should know about it, a line each.
    """
    preset, images = processor.preset, "image" in source.config.modalities
    template = chat_template(processor)
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(_MODULES)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": _FORWARD,
                **({"image": _FORWARD} if images else {}),
                "message": {**_FORWARD, "format": "structured" if images else "flat"},
            },
            "module_output_name": "token_embeddings",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "embedding_dimension": source.config.text.hidden_size,
            "pooling_mode": "mean" if preset.pooling == "mean" else "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    brought = any((folder / file).is_file() for file in FILES)
    if images and not brought:
        contents[FILES[1]] = source.family.hf_processor(source.config, preset)
    for file, content in contents.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.json").unlink(missing_ok=True)  # the source's, of another use
    (folder / "chat_template.jinja").write_text(template)
    notes = []
    if images and preset.transparency == "white":
        notes.append("sentence-transformers drops transparency, where here it becomes white")
    if images and brought and (differing := _size_limits(source, preset)):
        notes.append(differing)
    return notes


def _size_limits(source: ConvertedFolder, preset: Preset) -> str | None:
    """What to say of a preset's least and most pixels, if they go before those of the folder."""
    followed, of_folder = (
        source.family.hf_processor(source.config, one)["image_processor"]["size"]
        for one in (preset, replace(preset, min_pixels=None, max_pixels=None))
    )
    if followed == of_folder:
        return None
    return (
        "sentence-transformers resizes images to {} to {} pixels, as the folder's image processor "
        "says, where here they have {} to {}".format(*of_folder.values(), *followed.values())
    )


def check_steps(preset: Preset) -> None:
    """Refuse what a preset does with images, and transformers' processor and model do not.

    Raises ValueError: names the preset and the step.
    """
    for step, is_there in (
        (
            "resizes images before the processor does",
            preset.resize or preset.resize_below or preset.first_pixels,
        ),
        ("numbers the tokens of an image one after the other", preset.positions == "1d"),
        ("takes the mean of an image's tokens alone", preset.pooling == "mean"),
    ):
        if is_there:
            raise ValueError(
                f"the preset {preset.name} {step}, which transformers would not: its vectors of "
                "images would be others"
            )


def chat_template(processor: Processor) -> str:
    """A Jinja template whose strings, tokenised by transformers, have the ids that we embed.

    A tokenizer's ``apply_chat_template`` adds no special tokens: they stand in the template. That
    of a processor adds them unless the string begins with the one for its beginning.
    """
    tokenizer, preset = processor.tokenizer, processor.preset
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = whole.index(bare[0])
    before = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    after = "".join(tokenizer.convert_ids_to_tokens(whole[start + len(bare) :]))
    images = "image" in processor.config.modalities
    prompts = preset.choose()

    def literal(text: str | None, *, has_image: bool) -> str:
        """What prints the prompt of a kind of input."""
        if text and has_image and prompts.adds:
            return "{{- raise_exception('embed the text and the image apart, and add') -}}"
        string = processor.fill(prompts, text, has_image=has_image)
        if preset.last_token is None:
            string = before + string + after
        if images and not before:
            string = string.removesuffix(after)  # the processor's tokenizer puts it there
        pieces = ["{{- " + ascii(piece) + " -}}" for piece in string.split(_TEXT)]
        return "{{- found.text -}}".join(pieces)

    return _TEMPLATE.format(
        text=literal(_TEXT, has_image=False),
        image=literal(None, has_image=True) if images else "",
        text_image=literal(_TEXT, has_image=True) if images else "",
    )
