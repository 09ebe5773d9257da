"""Other projects' clients of OpenAI's interface, unchanged, get the vectors of E5V.encode."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hf_models import Case
from langchain_openai import OpenAIEmbeddings
from serving import served

from e5v_jax import E5V

TEXTS = ["A dog sits.", "Snow falls.", "Two men play."]


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").load()


@pytest.fixture(scope="module")
def address(e5v: E5V) -> Iterator[str]:
    with served(e5v) as (address, _):
        yield address


def test_langchain(address: str, e5v: E5V) -> None:
    client = OpenAIEmbeddings(
        model="tiny",
        base_url=f"{address}/v1",
        api_key="none",
        check_embedding_ctx_length=False,  # else it sends the ids of OpenAI's own tokenizer
    )
    expected = e5v.encode(TEXTS)
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(client.embed_query(TEXTS[0]), expected[0], atol=1e-6)
