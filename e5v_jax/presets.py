"""How the authors of embedding models call them: prompts, instructions, images, the pooled token.

Sources of each value stand above it; the strings are byte-exact, double spaces included.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal, get_args

from e5v_jax.prompts import (
    E5V_PROMPTS,
    IMAGE,
    MISTRAL,
    TEXT,
    PromptChoice,
    Prompts,
    choose_prompt,
    slots,
)

Role = Literal["query", "document"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Preset:
    """How the authors of an embedding model call it."""

    name: str
    """The checkpoint's hub name in lower case, without its owner's and size's part."""
    checkpoints: str
    """Pattern of hub names and folder names, compared without regard to case."""
    about: str
    """Dimensions, published scores with their source, and licence: for people."""
    document: Prompts
    """What is said with what is searched for, and where nobody says what an input is."""
    query: Prompts
    """What is said with what is searched by."""
    instructed_query: Prompts | None = None
    """The same for a query that comes with an instruction, which goes where ``<instruction>``
    stands here or in the template; None: none can be given."""
    instructed_document: Prompts | None = None
    default_instruction: str | None = None
    """What stands in a template's ``<instruction>`` where none is given."""
    ends_instructions: bool = False
    """Whether an instruction is stripped and gets a full stop, unless punctuation ends it."""
    template: str | None = None
    """The chat template, with ``{}`` for the prompt; None: told from the tokenizer."""
    resize: tuple[int, int] | None = None
    """Pixels (height, width) that every image is made first, its aspect ignored, as
    ``Image.open(path).resize(size)`` does it: before the conversion to RGB, so with Pillow's filter
    for its mode (nearest for palettes, else bicubic) and transparent pixels weighing nothing."""
    last_token: str | None = None
    """The pooled token, to be asserted; None: whatever the last token of the prompt is."""
    architecture: str | None = None
    """A class that ``architectures`` of config.json names for these checkpoints alone."""
    pooling: Literal["last", "before_last"] = "last"
    positions: Literal["mrope", "1d"] = "mrope"
    """Of image tokens, in models that can give them a row and a column."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Of images of any size; None: what the checkpoint's preprocessor file says."""
    transparency: Literal["drop", "white"] = "drop"

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> "Preset":
        """The same with other limits, where they are given. Raises ValueError: names a bad one."""
        least = self.min_pixels if min_pixels is None else min_pixels
        most = self.max_pixels if max_pixels is None else max_pixels
        for name, value in (("min_pixels", least), ("max_pixels", most)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_pixels {least}: expected at most max_pixels, {most}")
        return replace(self, min_pixels=least, max_pixels=most)

    def choose(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        instruction: str | None = None,
    ) -> PromptChoice:
        """The prompts of a call: for a role, by name, or a text with slots; default: documents.

        Raises ValueError: as :func:`e5v_jax.prompts.choose_prompt`, or an ``instruction`` that the
        preset takes none of there, is empty or no Unicode.
        """
        if prompt is not None or prompt_name not in (None, *ROLES):
            choice = choose_prompt(prompt_name, prompt)
            takes, of = "instruction" in slots(f"{self.template}{choice.prompt}"), "this prompt"
        else:
            is_query = prompt_name == "query"
            plain = self.query if is_query else self.document
            instructed = self.instructed_query if is_query else self.instructed_document
            choice = PromptChoice(prompts=(instructed or plain) if instruction else plain)
            takes, of = instructed is not None, "queries" if is_query else "documents"
        if instruction is not None and not takes:
            raise ValueError(f"instruction {instruction!r}: preset {self.name} has none for {of}")
        return replace(
            choice,
            instruction=None if instruction is None else self.finish(instruction),
            default_instruction=self.default_instruction,
        )

    def finish(self, instruction: str) -> str:
        """An instruction as it stands in the prompt."""
        if not self.ends_instructions:
            return instruction
        text = instruction.strip()
        ended = not text or unicodedata.category(text[-1]).startswith("P")
        return text if ended else f"{text}."


# github.com/kongds/E5-V: see prompts.py, also for its other prompts; the template is the backbone's
E5_V = Preset(
    name="e5-v",
    checkpoints="e5-v.*",
    about="royokong/e5-v, 4096 dimensions: MMEB 37.5 (arXiv 2504.17432), Flickr30K text to image "
    "R@1 79.5, COCO 52.0 (arXiv 2407.12580); also any other model",
    document=E5V_PROMPTS,
    query=E5V_PROMPTS,
)

# github.com/deepglint/UniME, self_evaluate/retrieval_self.py; of text with image, its paper
_UNIME = Prompts(TEXT, IMAGE, text_image=None)
_UNIME_LLAVA = Preset(
    name="unime-llava-1.6",
    checkpoints=r"unime-llava-1\.6.*",
    about="DeepGlint-AI/UniME-LLaVA-1.6-7B, 4096 dimensions: MMEB 66.6, Flickr30K text to image "
    "R@1 81.9, COCO 53.7 (arXiv 2504.17432)",
    document=_UNIME,
    query=_UNIME,
    template=MISTRAL,
)

# github.com/TIGER-AI-Lab/VLM2Vec, branch v1: README, src/dataset.py (process_image), src/model.py.
# An instruction is what MMEB puts in front of a text, colon and all.
_VLM2VEC = Prompts(
    text="<sent>",
    image="<image> Represent the given image.",
    text_image="<image> Represent the given image with the following question: <sent>",
)
_VLM2VEC_INSTRUCTED = Prompts(
    text="<instruction> <sent>",
    image="<image> <instruction>",
    text_image="<image> <instruction> <sent>",
)
_VLM2VEC_LLAVA = Preset(
    name="vlm2vec-llava-next",
    checkpoints="vlm2vec-llava-?next.*",
    about="TIGER-Lab/VLM2Vec-LLaVa-Next, 4096 dimensions: MMEB 62.9 (its model card), Flickr30K "
    "text to image R@1 80.2 (the authors' script)",
    document=_VLM2VEC,
    query=_VLM2VEC,
    instructed_query=_VLM2VEC_INSTRUCTED,
    instructed_document=_VLM2VEC_INSTRUCTED,
    template="{}",
    resize=(1344, 1344),
)

# modeling_llavanext_for_embedding.py of the checkpoints (prepare_text_input); README of
# github.com/VectorSpaceLab/MegaPairs
_BGE_VL = Preset(
    name="bge-vl-mllm",
    checkpoints=r"bge-vl-(mllm-s[12]|v1\.5-(zs|mmeb)).*",
    about="BAAI/BGE-VL-MLLM-S1 and -S2, BGE-VL-v1.5-zs and -mmeb, 4096 dimensions, MIT: MMEB 44.0 "
    "(S1, zero-shot), 64.1 (S2) (arXiv 2412.14475)",
    document=Prompts(" <sent> \n", " <image>", " <sent> \n <image>"),
    query=Prompts(
        text="\n <instruct>  <query> <sent> \n",
        image="\n <instruct>  <query> <image>",
        text_image="\n <instruct>  <query> <sent> \n <image>",
    ),
    instructed_query=Prompts(
        text="\n <instruct> <instruction> <query>  <sent> \n",
        image="\n <instruct> <instruction> <query>  <image>",
        text_image="\n <instruct> <instruction> <query>  <sent> \n <image>",
    ),
    template=MISTRAL,
    resize=(512, 512),
    architecture="LLaVANextForEmbedding",
)

# github.com/QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py (format_model_input). That
# <|endoftext|> ends the prompt is the tokenizer's doing there: its post-processor appends it.
_QWEN3_VL = Prompts("<sent>", "<image>", "<image><sent>")
_QWEN3_VL_EMBEDDING = Preset(
    name="qwen3-vl-embedding",
    checkpoints="qwen3-vl-embedding.*",
    about="Qwen/Qwen3-VL-Embedding-2B and -8B, 2048 and 4096 dimensions, any prefix of 64 or more "
    "(truncate_dim), Apache-2.0: MMEB 75.0 and 80.1, MMEB-V2 73.2 and 77.8 (arXiv 2601.04720)",
    document=_QWEN3_VL,
    query=_QWEN3_VL,
    instructed_query=_QWEN3_VL,
    instructed_document=_QWEN3_VL,
    default_instruction="Represent the user's input.",
    ends_instructions=True,
    template="<|im_start|>system\n<instruction><|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n<|endoftext|>",
    last_token="<|endoftext|>",
    min_pixels=4 * 32**2,
    max_pixels=1800 * 32**2,
    transparency="white",
)

PRESETS = {
    preset.name: preset
    for preset in (E5_V, _UNIME_LLAVA, _VLM2VEC_LLAVA, _BGE_VL, _QWEN3_VL_EMBEDDING)
}


def check_preset(name: str) -> None:
    """Raise ValueError, which lists the names, on a name that no preset has."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")


def find_preset(given: str | None, *told: str) -> Preset:
    """The preset that is ``given`` by its name, or the first that something ``told`` names.

    That may be a hub id, a path or a class of config.json. What names none is as E5-V.
    Raises ValueError: as :func:`check_preset`.
    """
    if given is not None:
        check_preset(given)
        return PRESETS[given]
    for name in (text.rstrip("/").rpartition("/")[2] for text in told):
        for preset in PRESETS.values():
            if name == preset.architecture or re.fullmatch(preset.checkpoints, name, re.IGNORECASE):
                return preset
    return E5_V
