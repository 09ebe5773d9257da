"""What a preset says: prompts, instructions, images, positions and the pooled token."""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from e5v_jax.prompts import (
    IMAGE_PLACEHOLDER,
    PROMPTS,
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
    """Checkpoints, published score and its source: for people; more is in docs/models.md."""
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
    resize_below: int | None = None
    """Only an image with a side of fewer pixels is made ``resize``; None: every image is."""
    last_token: str | None = None
    """The pooled token, to be asserted; None: whatever the last token of the prompt is."""
    architecture: str | None = None
    """A class that ``architectures`` of config.json names for these checkpoints alone."""
    image_text: str | None = None
    """What stands for an image in a filled prompt; None: what the model family has there."""
    pooling: Literal["last", "mean"] = "last"
    """Which token's state is the vector, or the mean of all; of an image that is embedded by the
    mean, those of the image and its marks alone."""
    positions: Literal["mrope", "1d"] = "mrope"
    """Of image tokens, in models that can give them a row and a column."""
    first_pixels: tuple[int, int] | None = None
    """Least and most pixels of a resize before the one to ``min_pixels`` and ``max_pixels``."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Of images of any size; None: what the model folder's image processor says, and without one 4
    tokens to 1,800 on Qwen3-VL, to 1,280 on those before it."""
    adapter: str | None = None
    """The one to take of an adapter folder that has several by name."""
    transparency: Literal["drop", "white"] = "drop"

    def check_tokens(self, known: Collection[str]) -> None:
        """Check that a tokenizer with the added tokens ``known`` has those of the template.

        Raises ValueError: one is missing, so the model is not one of those that this is for.
        """
        for token in re.findall(r"<\|[^|]+\|>", self.template or ""):
            if token not in known:
                raise ValueError(
                    f"preset {self.name} says {token}, which is no token of this model: it is for "
                    "another one"
                )

    def first_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """What an image of ``size`` (height, width) is made first; None: it is left as it is."""
        below = self.resize_below
        return self.resize if below is None or min(size) < below else None

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> "Preset":
        """The same with other limits, where they are given. Raises ValueError: names a bad one."""
        if min_pixels is None and max_pixels is None:
            return self
        least = self.min_pixels if min_pixels is None else min_pixels
        most = self.max_pixels if max_pixels is None else max_pixels
        for name, value in (("min_pixels", least), ("max_pixels", most)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_pixels {least}: expected at most max_pixels, {most}")
        return replace(self, min_pixels=least, max_pixels=most)

    def with_text_prompt(self, name: str) -> "Preset":
        """The same for a text with another prompt, by ``data.prompt`` of a training run.

        "text" is the preset's own, and so is "released" when encoding, as the authors do it.
        Raises ValueError: it is no prompt for texts.
        """
        if name in ("text", "released"):
            return self
        prompt = PROMPTS.get(name, name)
        if "<sent>" not in prompt or IMAGE_PLACEHOLDER in prompt:
            raise ValueError(
                f"{name!r} is no prompt for texts; expected text, plain, sts, released, or one of "
                "your own with <sent> in it"
            )
        PromptChoice(prompt)  # refuses what is not Unicode
        document, query = (replace(of, text=prompt) for of in (self.document, self.query))
        return replace(self, document=document, query=query)

    def choose(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        instruction: str | None = None,
    ) -> PromptChoice:
        """The prompts of a call: for a role, by name, or a text with slots; default: documents.

        An ``instruction`` must have passed :func:`e5v_jax.prompts.check_text`.
        Raises ValueError: as :func:`e5v_jax.prompts.choose_prompt`, or there is no place for it.
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
