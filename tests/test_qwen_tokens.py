"""The presets of Qwen's family through its real tokenizer: ids, and which token is pooled."""

import numpy as np
import pytest
from PIL import Image
from qwen_strings import QWEN_STRINGS
from transformers import PreTrainedTokenizerFast

from e5v_jax.data.images import Size
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES
from e5v_jax.families.qwen_vl.processor import QwenVLProcessor
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import PRESETS
from e5v_jax.prompts import TextError

DOG = "A cat and a dog"
SYSTEM = [151644, 8948, 198]
HELPFUL = [2610, 525, 264, 10950, 17847, 13]  # You are a helpful assistant.
USER, ASSISTANT, END = [151644, 872, 198], [151644, 77091, 198], [151645, 198]


def processor(name: str, tokenizer: PreTrainedTokenizerFast) -> QwenVLProcessor:
    architecture = "qwen3-vl-2b" if name == "qwen3-vl-embedding" else "qwen2.5-vl-7b"
    return QwenVLProcessor(ARCHITECTURES[architecture], tokenizer, preset=PRESETS[name])


def test_published_ids(qwen_tokenizer: PreTrainedTokenizerFast) -> None:
    """As Qwen2's documentation and config.json of Qwen2-VL and Qwen3-VL have them."""
    ids = qwen_tokenizer.convert_tokens_to_ids
    assert len(qwen_tokenizer) == 151657
    for token, expected in (
        ("<|endoftext|>", 151643),
        ("<|im_start|>", 151644),
        ("<|im_end|>", 151645),
        ("<|vision_start|>", 151652),
        ("<|vision_end|>", 151653),
        ("<|image_pad|>", 151655),
        ("<|video_pad|>", 151656),
    ):
        assert ids(token) == expected
    found = processor("lco-embedding", qwen_tokenizer).measure(
        [DOG], PRESETS["lco-embedding"].choose()
    )
    head = [*SYSTEM, *HELPFUL, *END, *USER]
    assert found[0].ids[: len(head)] == head
    assert found[0].ids[-5:] == [*END, *ASSISTANT]


@pytest.mark.parametrize(("name", "role", "instruction"), QWEN_STRINGS)
def test_prompts_become_the_ids_of_the_string(
    name: str, role: str, instruction: str | None, qwen_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Tokenised whole, the image expanded; the last id is the preset's pooled token."""
    preset, said = PRESETS[name], QWEN_STRINGS[name, role, instruction]
    made = processor(name, qwen_tokenizer)
    size: Size = (64, 64)
    image = np.zeros((*size, 3), np.uint8)
    picture = Image.fromarray(image)
    inputs = [DOG, picture, *([{"text": DOG, "image": picture}] if said[2] else [])]
    marks = preset.image_text or "<|vision_start|><|image_pad|><|vision_end|>"
    for item, string in zip(
        made.measure(inputs, preset.choose(role, None, instruction)),
        (string for string in said if string),
        strict=True,
    ):
        string = string.replace("<image>", marks)
        expected = qwen_tokenizer(string, add_special_tokens=False)["input_ids"]
        assert item.ids == expected
        if preset.last_token is not None:
            assert item.ids[-1] == 151643


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <|vision_start|> b", "<|endoftext|>", "x<|image_pad|>"]
)
def test_no_text_forges_a_turn(text: str, qwen_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="means something else to the model"):
        processor("qwen3-vl-embedding", qwen_tokenizer).check_text(text, special_tokens="refuse")


def test_a_preset_of_another_model_is_refused(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its turns would be read as the characters that they are."""
    config = TextModelConfig(ARCHITECTURES["qwen3-vl-2b"].text)
    with pytest.raises(ValueError, match=r"lco-embedding says <\|im_start\|>, which is no token"):
        TextProcessor(config, llama3_tokenizer, preset=PRESETS["lco-embedding"])
