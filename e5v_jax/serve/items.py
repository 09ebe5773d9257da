"""The one kind of thing that the engine embeds, and what it answers."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from e5v_jax.data.inputs import Input
from e5v_jax.prompts import Truncate


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A text, an image or both, and how it is to be embedded.

    Token ids, which OpenAI's interface takes too, come here as the text that the tokenizer decodes
    them to.
    """

    text: str | None = None
    image: Image.Image | None = None
    prompt_name: str | None = None  # "query", "document" or a name in prompts.PROMPTS
    instruction: str | None = None
    truncate: Truncate = "none"
    max_length: int | None = None  # tokens, prompt and image counted; None: what the model takes
    image_digest: str | None = None  # sha256 of the file's bytes; None: told from the pixels

    @property
    def key(self) -> bytes:
        """32 bytes that equal items share."""
        digest = hashlib.sha256()
        for value in (
            self.text,
            None if self.image is None else self._digest(self.image),
            self.prompt_name,
            self.instruction,
            self.truncate,
            self.max_length,
        ):
            content = b"" if value is None else str(value).encode("utf-8", "surrogatepass")
            # the length keeps two fields apart, the sign an empty text from none
            digest.update(f"{'-' if value is None else '+'}{len(content)} ".encode() + content)
        return digest.digest()

    def _digest(self, image: Image.Image) -> str:
        if self.image_digest is not None:
            return self.image_digest
        pixels = hashlib.sha256(f"{image.mode} {image.size} ".encode())
        pixels.update(repr(image.getpalette() if image.mode == "P" else None).encode())
        pixels.update(repr(image.info.get("transparency")).encode() + image.tobytes())
        return f"pixels {pixels.hexdigest()}"

    @property
    def size(self) -> int:
        """About how many bytes of memory it takes."""
        pixels = 0 if self.image is None else 3 * self.image.width * self.image.height
        return pixels + len((self.text or "").encode("utf-8", "surrogatepass"))

    @property
    def input(self) -> Input:
        """What ``E5V.encode`` is given for it."""
        given = {"text": self.text, "image": self.image}
        return {name: value for name, value in given.items() if value is not None}

    def apart(self) -> "tuple[Item, ...]":
        """Its image and its text, for models that add the vectors of the two; or itself."""
        if self.text is None or self.image is None:
            return (self,)
        return replace(self, text=None), replace(self, image=None, image_digest=None)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The answer to an item."""

    vector: np.ndarray  # float32 [D], of unit length
    tokens: int  # of the model: prompt, template and image counted
