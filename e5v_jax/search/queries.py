"""What embeds the queries of a page: the server's engine, in the same process."""

import numpy as np
from PIL import Image

from e5v_jax.data.images import FORMATS, MAX_IMAGE_PIXELS, read_image
from e5v_jax.data.inputs import Input, split_input
from e5v_jax.search.query import Embed, QueryError, Unavailable
from e5v_jax.serve.engine import Engine
from e5v_jax.serve.items import Item
from e5v_jax.serve.waiting import BadItem, Draining, Overloaded, TooLarge, UnusableVector


def engine_embed(engine: Engine, instruction: str | None) -> Embed:
    """What embeds queries from any thread: those that wait together are computed together.

    It raises QueryError: an input that cannot be embedded; Unavailable: the engine takes no more.
    """

    def embed(query: Input) -> np.ndarray:
        text, source = split_input(query)
        if source is not None and not isinstance(source, Image.Image):
            # the file's own mode: the model's processor makes of it what it makes of the file
            source = read_image(source, formats=tuple(FORMATS), max_pixels=MAX_IMAGE_PIXELS)
        item = Item(text, source, "query", instruction, truncate="end")
        try:
            return engine.submit([item])[0].result().vector
        except (BadItem, TooLarge, UnusableVector) as error:
            raise QueryError(str(error)) from error
        except (Overloaded, Draining) as error:
            raise Unavailable(str(error)) from error

    return embed
