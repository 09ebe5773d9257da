"""Queries of the page go through the server's engine, and mean what E5V.encode_query says."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hf_models import picture

from e5v_jax.search.queries import engine_embed
from e5v_jax.search.query import QueryError, Unavailable
from e5v_jax.serve.engine import Engine

if TYPE_CHECKING:
    from hf_models import Case


@pytest.fixture(scope="module")
def engine(llava: "Callable[[str], Case]") -> Iterator[Engine]:
    engine = Engine(llava("llama-gqa").e5v, cache_size=8)
    yield engine
    engine.close()


def test_vectors_are_those_of_encode_query(engine: Engine) -> None:
    photograph, file = picture(40, 60, seed=1), io.BytesIO()
    photograph.convert("P").save(file, "PNG")  # a palette: its colours are not its numbers
    queries: list[Any] = ["a dog", photograph, file.getvalue(), {"text": "at night"}]
    queries.append({"text": "at night", "image": file.getvalue()})
    embed = engine_embed(engine, None)
    with ThreadPoolExecutor(4) as threads:  # as a page's requests do
        found = np.stack(list(threads.map(embed, queries * 3)))
    expected = engine.model.encode_query(queries)
    np.testing.assert_allclose(found, np.concatenate([expected] * 3), atol=1e-6)


def test_what_it_refuses(engine: Engine) -> None:
    embed = engine_embed(engine, None)
    for bad in (b"GIF89a", {"text": "a", "image": b"none"}):
        with pytest.raises(ValueError, match="image"):
            embed(bad)
    with pytest.raises(QueryError, match=r"empty|white"):
        embed("  ")
    ended = Engine(engine.model)
    ended.close()
    with pytest.raises(Unavailable, match="about to end"):
        engine_embed(ended, None)("a dog")
