"""Presets: the authors' strings byte for byte, their images and vectors, and how one is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hf_models import picture
from PIL import Image

from e5v_jax import E5V
from e5v_jax.presets import PRESETS, Preset
from e5v_jax.prompts import TEMPLATES

if TYPE_CHECKING:
    from hf_models import Case

DOG = "A cat and a dog"
CIR = (
    "Retrieve the target image that best meets the combined criteria by using both the provided "
    "image and the image retrieval instructions: "
)
E5V_HEAD = "<|start_header_id|>user<|end_header_id|>\n\n"
E5V_TAIL = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
QWEN_TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
# preset, role, instruction -> what is said with a text, an image, and both (None: apart, added)
STRINGS: dict[tuple[str, str, str | None], tuple[str, str, str | None]] = {
    **dict.fromkeys(
        [("e5-v", "query", None), ("e5-v", "document", None)],
        (
            f"{E5V_HEAD}A cat and a dog\nSummary above sentence in one word: {E5V_TAIL}",
            f"{E5V_HEAD}<image>\nSummary above image in one word: {E5V_TAIL}",
            f'{E5V_HEAD}<image>Modify this image with "A cat and a dog", desribe modified image '
            f"in one word:{E5V_TAIL}",
        ),
    ),
    **dict.fromkeys(
        [("unime-llava-1.6", "query", None), ("unime-llava-1.6", "document", None)],
        (
            "[INST] A cat and a dog\nSummary above sentence in one word: [/INST]",
            "[INST] <image>\nSummary above image in one word: [/INST]",
            None,
        ),
    ),
    **dict.fromkeys(
        [("vlm2vec-llava-next", "query", None), ("vlm2vec-llava-next", "document", None)],
        (
            "A cat and a dog",
            "<image> Represent the given image.",
            "<image> Represent the given image with the following question: A cat and a dog",
        ),
    ),
    ("vlm2vec-llava-next", "query", "Find me an everyday image that matches the given caption:"): (
        "Find me an everyday image that matches the given caption: A cat and a dog",
        "<image> Find me an everyday image that matches the given caption:",
        "<image> Find me an everyday image that matches the given caption: A cat and a dog",
    ),
    ("vlm2vec-llava-next", "query", "Find an image caption describing the given image."): (
        "Find an image caption describing the given image. A cat and a dog",
        "<image> Find an image caption describing the given image.",
        "<image> Find an image caption describing the given image. A cat and a dog",
    ),
    ("vlm2vec-llava-next", "document", "Represent the given image."): (
        "Represent the given image. A cat and a dog",
        "<image> Represent the given image.",
        "<image> Represent the given image. A cat and a dog",
    ),
    ("bge-vl-mllm", "document", None): (
        "[INST]  A cat and a dog \n [/INST]",
        "[INST]  <image> [/INST]",
        "[INST]  A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", None): (
        "[INST] \n <instruct>  <query> A cat and a dog \n [/INST]",
        "[INST] \n <instruct>  <query> <image> [/INST]",
        "[INST] \n <instruct>  <query> A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", "Find a photo."): (
        "[INST] \n <instruct> Find a photo. <query>  A cat and a dog \n [/INST]",
        "[INST] \n <instruct> Find a photo. <query>  <image> [/INST]",
        "[INST] \n <instruct> Find a photo. <query>  A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", CIR): (
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  A cat and "
        "a dog \n [/INST]",
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  <image> "
        "[/INST]",
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  A cat and "
        "a dog \n <image> [/INST]",
    ),
    **{
        ("qwen3-vl-embedding", role, given): (
            f"{head}A cat and a dog{QWEN_TAIL}",
            f"{head}<image>{QWEN_TAIL}",
            f"{head}<image>A cat and a dog{QWEN_TAIL}",
        )
        for given, said in (
            (None, "Represent the user's input."),
            ("Find a photo", "Find a photo."),
            (" Is it a dog? ", "Is it a dog?"),
        )
        for head in [f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\n"]
        for role in ("query", "document")
    },
}


def say(
    preset: Preset,
    text: str | None,
    *,
    has_image: bool,
    role: str | None = None,
    instruction: str | None = None,
    image: str = "<image>",
) -> str:
    """The string that is tokenised."""
    choice = preset.choose(role, None, instruction)
    template = preset.template or TEMPLATES["llama3"]
    return choice.fill(text, has_image=has_image, template=template, image=image)


@pytest.mark.parametrize(("name", "role", "instruction"), STRINGS)
def test_the_strings_are_the_authors(name: str, role: str, instruction: str | None) -> None:
    preset, expected = PRESETS[name], STRINGS[name, role, instruction]
    how: dict[str, Any] = {"role": role, "instruction": instruction}
    assert say(preset, DOG, has_image=False, **how) == expected[0]
    assert say(preset, None, has_image=True, **how) == expected[1]
    assert preset.choose(role, None, instruction).adds == (expected[2] is None)
    if expected[2] is not None:
        assert say(preset, DOG, has_image=True, **how) == expected[2]
    if role == "document" and instruction is None:  # the default
        assert say(preset, DOG, has_image=False) == expected[0]


def test_every_preset_has_its_strings_written_out() -> None:
    assert {name for name, *_ in STRINGS} == set(PRESETS)
    for name, preset in PRESETS.items():
        takes = {role for known, role, words in STRINGS if known == name and words is not None}
        instructed = {"query": preset.instructed_query, "document": preset.instructed_document}
        assert {role for role, prompts in instructed.items() if prompts is not None} == takes


def bge_string(text: str | None, *, has_image: bool, role: str, instruction: str | None) -> str:
    """What the remote code of BGE-VL-MLLM concatenates."""
    if role == "query":
        said = "[INST] \n <instruct>  <query>"
        if instruction is not None:
            said = f"[INST] \n <instruct> {instruction} <query> "
    else:
        said = "[INST] "
    if text is not None:
        said = f"{said} {text} \n"
    if has_image:
        said = f"{said} <image>"
    return f"{said} [/INST]"


def test_bge_is_what_its_code_concatenates() -> None:
    """Over texts with spaces, newlines and everything that looks like a slot."""
    rng = np.random.default_rng(0)
    parts = ["dog", " ", "\n", "{}", "<sent>", "<instruction>", "<query>", "<instruct>", "é", "."]
    for _ in range(300):
        text, words = ("".join(rng.choice(parts, rng.integers(1, 7))) for _ in range(2))
        for has_image in (False, True):
            for role, instruction in (("query", words), ("query", None), ("document", None)):
                how: dict[str, Any] = {"role": role, "instruction": instruction}
                expected = bge_string(text, has_image=has_image, **how)
                assert say(PRESETS["bge-vl-mllm"], text, has_image=has_image, **how) == expected


# --- vectors, against transformers called as the authors call it


def images_of(folder: Path) -> dict[str, Path]:
    """Files of several sizes and modes."""
    noisy = picture(40, 57, seed=3)
    made = {
        "wide": picture(30, 90),
        "tall": picture(75, 41),
        "square": picture(56, 56),
        "palette": noisy.quantize(40),
        "grey": picture(33, 64).convert("L"),
    }
    made["alpha"] = noisy.convert("RGBA")
    ramp = np.tile(np.arange(57, dtype=np.uint8) * 4, (40, 1))
    made["alpha"].putalpha(Image.fromarray(ramp))
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in made}


SIZES = {"vlm2vec-llava-next": (1344, 1344), "bge-vl-mllm": (512, 512)}


@torch.no_grad()
def authors_vectors(case: "Case", preset: str, rows: list[tuple[str, Path | None]]) -> torch.Tensor:
    """The last hidden state [N, D] of the last position, one left-padded batch, as it is."""
    texts, images = [text for text, _ in rows], []
    for _, path in rows:
        if path is not None:
            image = Image.open(path)
            if preset in SIZES:
                image = image.resize(SIZES[preset])
            images.append(image.convert("RGB"))
    if images:
        inputs = case.processor(text=texts, images=images, return_tensors="pt", padding=True)
    else:
        inputs = case.tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {name: x for name, x in dict(inputs).items() if name != "token_type_ids"}
    out = case.torch_model(**inputs, output_hidden_states=True, return_dict=True)
    return out.hidden_states[-1][:, -1].float()


@pytest.mark.parametrize("name", ["unime-llava-1.6", "vlm2vec-llava-next", "bge-vl-mllm"])
def test_vectors_are_the_authors(name: str, llava: "Callable[[str], Case]", tmp_path: Path) -> None:
    case, files = llava("mistral"), images_of(tmp_path)
    model = E5V.from_pretrained(case.folder, dtype="float32", preset=name)
    assert model.preset is PRESETS[name]
    texts = [DOG, "Snow falls. ", "a"]
    normalize = torch.nn.functional.normalize
    for role, instruction in {(role, words) for known, role, words in STRINGS if known == name}:
        of_text, of_image, of_both = STRINGS[name, role, instruction]

        def embed(
            items: list[Any], role: str = role, words: str | None = instruction
        ) -> np.ndarray:
            encode = model.encode_query if role == "query" else model.encode_document
            return encode(items, instruction=words)

        said = [of_text.replace(DOG, text) for text in texts]
        words = authors_vectors(case, name, [(text, None) for text in said])
        np.testing.assert_allclose(embed(texts), normalize(words, dim=-1), atol=1e-5)
        if instruction == CIR:
            continue  # its length is tried; the images are those of the other instruction
        shown = authors_vectors(case, name, [(of_image, path) for path in files.values()])
        found = embed(list(files.values()))
        np.testing.assert_allclose(found, normalize(shown, dim=-1), atol=1e-5)
        both = [{"text": DOG, "image": path} for path in files.values()]
        expected = shown + words[0] if of_both is None else None
        if of_both is not None:
            expected = authors_vectors(case, name, [(of_both, path) for path in files.values()])
        np.testing.assert_allclose(embed(both), normalize(expected, dim=-1), atol=1e-5)
