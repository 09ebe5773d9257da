"""What clients speak: official clients and bodies by hand give the vectors of E5V.encode."""

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import cohere
import numpy as np
import openai
import pytest
from hf_models import Case, picture
from serving import CLIENT, data_url, served
from tokenizers import decoders

from e5v_jax import E5V

TOLERANCE = 1e-6
TEXTS = ["A dog sits.", "Snow falls.", "Two men play."]


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    model = llava("llama-gqa").load()
    # as real tokenizers have it; that of the test models is never asked to decode
    model.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return model


@pytest.fixture(scope="module")
def base(e5v: E5V) -> Iterator[str]:
    with served(e5v) as (base, _):
        yield base


@pytest.fixture(scope="module")
def named(e5v: E5V) -> dict[str, np.ndarray]:
    return dict(zip(TEXTS, e5v.encode(TEXTS), strict=True))


IMAGE = picture(28, 56)
URL = data_url(IMAGE)


def post(base: str, path: str, body: Any, status: int = 200) -> Any:
    response = CLIENT.post(base + path, json=body, timeout=30)
    assert response.status_code == status, response.text
    return response.json()


def assert_same(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE


def embeddings(answer: Any) -> list[Any]:
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


# --- OpenAI --------------------------------------------------------------------------------------


def test_openai_client(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    """Its own decoding of base64 included, which it asks for by default."""
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0)
    expected = np.stack(list(named.values()))
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="tiny", input=TEXTS, **options)
        found = [one.embedding for one in answer.data]
        if options == {"encoding_format": "base64"}:
            found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
        assert_same(found, expected)
        lengths = e5v.processor.measure(TEXTS, e5v.preset.choose())
        assert answer.usage.prompt_tokens == sum(one.length for one in lengths)
        assert answer.model == "tiny"
    answer = client.embeddings.create(model="tiny-too", input=TEXTS[0], dimensions=16)
    assert_same([answer.data[0].embedding], e5v.encode(TEXTS[:1], truncate_dim=16))
    more = {"prompt_name": "sts"}
    answer = client.embeddings.create(model="tiny", input=TEXTS[0], extra_body=more)
    assert_same([answer.data[0].embedding], e5v.encode(TEXTS[:1], "sts"))
    ids = e5v.tokenizer(TEXTS[:2], add_special_tokens=False)["input_ids"]
    answer = client.embeddings.create(model="tiny", input=ids)
    assert_same([one.embedding for one in answer.data], expected[:2])
    answer = client.embeddings.create(model="tiny", input=ids[1])
    assert_same([answer.data[0].embedding], expected[1:2])
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-too"]
    with pytest.raises(openai.NotFoundError) as lost:
        client.embeddings.create(model="other", input="a")
    assert lost.value.code == "model_not_found" and "serves tiny, tiny-too" in str(lost.value)
    with pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model="tiny", input=["a", " "])
    assert bad.value.param == "input[1]" and "the text is empty" in str(bad.value)


def test_long_texts(base: str, e5v: E5V) -> None:
    """400 unless the client asks for a cut."""
    long = "a long text " * 300
    answer = post(base, "/v1/embeddings", {"input": long}, 400)
    assert "the model takes at most 2048" in answer["error"]["message"]
    assert answer["error"]["param"] == "input"
    endless = post(base, "/v1/embeddings", {"input": "x" * 140_000, "truncate": "end"}, 413)
    assert "input: 140000 characters, at most 131072" in endless["error"]["message"]
    answer = post(base, "/v1/embeddings", {"input": "a", "instruction": "x" * 9000}, 400)
    assert answer["error"]["param"] == "instruction"
    cut = e5v.encode([long], truncate="start", max_length=100)
    for body in (
        {"truncate_prompt_tokens": 100},
        {"truncate": "start", "max_length": 100},
        {"truncate_prompt_tokens": 100, "truncation_side": "left"},
    ):
        answer = post(base, "/v1/embeddings", {"input": long, **body})
        assert_same(embeddings(answer), cut)
        assert answer["usage"]["total_tokens"] == 100
    answer = post(
        base,
        "/v1/embeddings",
        {"input": long, "truncate_prompt_tokens": 100, "truncation_side": "right"},
    )
    assert_same(embeddings(answer), e5v.encode([long], truncate="end", max_length=100))


# --- vLLM, Jina, infinity ------------------------------------------------------------------------


def test_vllm_messages(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    def say(*parts: Any, role: str = "user") -> dict[str, Any]:
        return {"role": role, "content": list(parts)}

    text = {"type": "text", "text": TEXTS[0]}
    image = {"type": "image_url", "image_url": {"url": URL}}
    both, one = {"text": TEXTS[0], "image": IMAGE}, IMAGE
    expected = e5v.encode([TEXTS[0], one, both])
    for messages, rows in (
        ([{"role": "user", "content": TEXTS[0]}], [0]),
        ([say(text)], [0]),
        ([say(image)], [1]),
        ([say(image, {"type": "text", "text": ""}), say(role="assistant")], [1]),
        ([say(image, text)], [2]),
        ([[say(text)], [say(image)], [say(image), say(text)]], [0, 1, 2]),
    ):
        answer = post(base, "/v1/embeddings", {"model": "tiny", "messages": messages})
        assert_same(embeddings(answer), expected[rows])
        assert answer["id"].startswith("embd-")
    for messages, words in (
        ([say(image, image)], "messages: 2 images, expected one at most"),
        ([say(role="user")], "messages: neither a text nor an image"),
        ([say(text, role="tool")], "messages[0].content: what 'tool' says"),
        ([], "messages: empty"),
        ([[]], "messages[0]: empty"),
        ([[say(text)], say(text)], "messages[1]: a message among conversations"),
        ([say({"type": "video"})], "messages[0].content[0]: expected {"),
        ([say(text), say(image), {"role": "system", "content": "Find."}], "has none for documents"),
    ):
        answer = post(base, "/v1/embeddings", {"messages": messages}, 400)
        assert words in answer["error"]["message"]
        assert answer["error"]["code"] == 400


def test_jina(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    body = {"model": "tiny", "input": [{"text": TEXTS[0]}, {"image": URL}, TEXTS[1]]}
    answer = post(base, "/v1/embeddings", body)
    expected = e5v.encode([TEXTS[0], IMAGE, TEXTS[1]])
    assert_same(embeddings(answer), expected)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    (bare,) = embeddings(post(base, "/v1/embeddings", {"input": {"image": URL.split(",")[1]}}))
    assert_same([bare], expected[1:2])
    answer = post(
        base,
        "/v1/embeddings",
        {
            "input": TEXTS,
            "task": "retrieval.query",
            "embedding_type": ["base64", "ubinary"],
            "dimensions": 16,
        },
    )
    cut = e5v.encode(TEXTS, truncate_dim=16)
    for row, one in zip(cut, embeddings(answer), strict=True):
        assert_same(np.frombuffer(base64.b64decode(one["base64"]), "<f4"), row)
        assert one["ubinary"] == np.packbits(row > 0).tolist()
    for body, words in (
        ({"input": [{}]}, "input[0]: neither text nor image"),
        ({"input": [{"video": "x"}]}, "input[0].video: unknown field"),
        ({"input": ["a"], "late_chunking": True}, "late_chunking: not offered"),
        ({"input": ["a"], "normalized": False}, "normalized: false is not offered"),
        ({"input": [{"text": "a"}], "embedding_type": []}, "embedding_type: empty"),
        (
            {"input": [{"text": "a"}], "embedding_type": "binary", "dimensions": 9},
            "embedding_type: binary needs dimensions in eights",
        ),
        ({"input": [{"image": "../etc/passwd"}]}, "input[0]: image: not base64"),
        ({"input": [{"image": "http://127.0.0.1/x"}]}, "the host 127.0.0.1 is not one"),
    ):
        assert words in post(base, "/v1/embeddings", body, 400)["detail"]


def test_infinity(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    answer = post(base, "/embeddings", {"model": "tiny", "modality": "image", "input": [URL, URL]})
    assert_same(embeddings(answer), e5v.encode([IMAGE, IMAGE]))
    answer = post(base, "/v1/embeddings", {"modality": "text", "input": TEXTS[0]})
    assert_same(embeddings(answer), named[TEXTS[0]][None])
    answer = post(base, "/v1/embeddings", {"modality": "audio", "input": "x"}, 400)
    assert answer["error"]["param"] == "modality"


# --- Cohere --------------------------------------------------------------------------------------


def test_cohere_client(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    """All encodings, as Cohere defines them: int8 and uint8 by range, bits by sign, packed."""
    client = cohere.ClientV2(api_key="any", base_url=base)
    expected = np.stack(list(named.values()))
    answer = client.embed(
        model="tiny",
        texts=TEXTS,
        input_type="search_document",
        embedding_types=["float", "int8", "uint8", "binary", "ubinary", "base64"],
    )
    found = answer.embeddings
    assert_same(found.float_, expected)
    int8, uint8 = np.array(found.int8), np.array(found.uint8)
    assert int8.min() >= -128 and int8.max() <= 127 and (np.abs(int8).max(axis=1) == 127).all()
    assert (uint8 == int8 + 128).all() and uint8.min() >= 0 and uint8.max() <= 255
    lengths = np.linalg.norm(int8, axis=1)
    assert (np.einsum("nd,nd->n", int8, expected) / lengths > 0.9999).all()
    assert found.ubinary == np.packbits(expected > 0, axis=1).tolist()
    assert found.binary == (np.packbits(expected > 0, axis=1).astype(int) - 128).tolist()
    decoded = [np.frombuffer(base64.b64decode(one), "<f4") for one in found.base64 or []]
    assert_same(decoded, expected)
    assert answer.texts == TEXTS
    assert answer.meta is not None and answer.meta.billed_units is not None
    answer = client.embed(model="tiny", images=[URL], input_type="image")
    assert_same(answer.embeddings.float_, e5v.encode([IMAGE]))
    content: Any = [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "text", "text": TEXTS[0]},
    ]
    answer = client.embed(
        model="tiny", inputs=[{"content": content}], input_type="search_query", output_dimension=8
    )
    both = e5v.encode([{"text": TEXTS[0], "image": IMAGE}], "query", truncate_dim=8)
    assert_same(answer.embeddings.float_, both)
    with pytest.raises(cohere.NotFoundError) as lost:
        client.embed(model="other", texts=["a"], input_type="classification")
    assert "does not exist" in str(lost.value.body)


def test_cohere_truncation(base: str, e5v: E5V) -> None:
    """Its default is END; NONE is an error."""
    long = "a long text " * 300
    client = cohere.ClientV2(api_key="any", base_url=base)
    answer = client.embed(model="tiny", texts=[long], input_type="search_document", max_tokens=100)
    cut = e5v.encode([long], truncate="end", max_length=100)
    assert_same(answer.embeddings.float_, cut)
    answer = client.embed(
        model="tiny",
        texts=[long],
        input_type="search_document",
        max_tokens=100,
        truncate="START",
    )
    assert_same(answer.embeddings.float_, e5v.encode([long], truncate="start", max_length=100))
    with pytest.raises(cohere.BadRequestError) as bad:
        client.embed(model="tiny", texts=["a", long], input_type="search_document", truncate="NONE")
    assert isinstance(bad.value.body, dict)
    assert bad.value.body["message"].startswith("texts[1]: ") and bad.value.body["id"]


# --- rerank, score, tokenize ---------------------------------------------------------------------


def test_rerank_and_score(base: str, e5v: E5V) -> None:
    documents = [*TEXTS, "A dog lies."]
    query = e5v.encode(["A dog sits there."], "query")
    cosines = e5v.similarity(query, e5v.encode(documents))[0]
    order = np.argsort(-cosines).tolist()
    client = cohere.ClientV2(api_key="any", base_url=base)
    answer = client.rerank(model="tiny", query="A dog sits there.", documents=documents, top_n=3)
    assert [one.index for one in answer.results] == order[:3]
    assert_same([one.relevance_score for one in answer.results], cosines[order[:3]])
    body = {
        "query": "A dog sits there.",
        "documents": [*({"text": one} for one in documents), {"image": URL}],
        "return_documents": True,
    }
    results = post(base, "/v1/rerank", body)["results"]
    assert len(results) == 5 and {"text": "A dog lies."} in [one["document"] for one in results]
    body = {"text_1": "A dog sits there.", "text_2": documents}
    scores = post(base, "/score", body)["data"]
    assert_same([one["score"] for one in scores], cosines)
    body = {"text_1": documents, "text_2": documents}
    scores = post(base, "/v1/score", body)["data"]
    assert_same([one["score"] for one in scores], np.ones(4))
    assert "message" in post(base, "/v1/rerank", {"query": "a", "documents": []}, 400)
    body = {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}
    answer = post(base, "/score", body, 400)
    assert "expected one or as many as text_2" in answer["error"]["message"]


def test_tokenize(base: str, e5v: E5V, named: dict[str, np.ndarray]) -> None:
    ids = e5v.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    answer = post(base, "/tokenize", {"prompt": TEXTS[0], "return_token_strs": True})
    assert answer["tokens"] == ids and answer["count"] == len(ids) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    (measured,) = e5v.processor.measure([TEXTS[0]], e5v.preset.choose())
    assert answer["count_in_prompt"] == measured.length
    found = embeddings(post(base, "/v1/embeddings", {"input": answer["tokens"]}))
    assert_same(found, named[TEXTS[0]][None])
    assert len(post(base, "/v1/tokenize", {"text": TEXTS[0]})["token_strings"]) == len(ids)
    for body in ({}, {"prompt": " "}, {"prompt": 3}, {"prompt": "a", "prompt_name": "x"}):
        assert "message" in post(base, "/tokenize", body, 400)["error"]


# --- bad bodies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "input", "missing"),
        ({"input": []}, "input", "empty"),
        ({"input": None}, "input", "Expected"),
        ({"input": [1, "a"]}, "input[0]", "a number among texts"),
        ({"input": [[]]}, "input[0]", "empty"),
        ({"input": [999999]}, "input", "token id 999999, expected 0 to 261"),
        ({"input": [-1]}, "input", "token id -1"),
        ({"input": [2**70]}, "input", ""),
        ({"input": [True]}, "input[0]", "Expected"),
        ({"input": "a", "dimensions": 0}, "dimensions", ">= 1"),
        ({"input": "a", "dimensions": 65}, "dimensions", "65, expected 1 to 64"),
        ({"input": "a", "dimensions": "8"}, "dimensions", "Expected `int"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "Invalid enum value"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
        ({"input": "a", "prompt_name": "none"}, "input", "expected one of"),
        ({"input": "a", "instruction": "Find."}, "input", "has none for documents"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"input": "a", "max_length": 9999}, "input", "the model takes at most 2048"),
        ({"input": ["a"] * 65}, None, "65 inputs, at most 64"),
        ({"input": "a", "model": 3}, "model", "Expected"),
    ],
)
def test_bad_bodies(base: str, body: Any, field: str | None, words: str) -> None:
    """The field is named, and the body is OpenAI's."""
    status = 413 if field is None else 400
    error = post(base, "/v1/embeddings", body, status)["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    if field is not None:
        assert (error["param"] or "").startswith(field) and error["message"].startswith(field)
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"\xff", b'"\\ud800"', b'{"input": NaN}', b"[" * 100_000]
)
def test_no_json(base: str, raw: bytes) -> None:
    response = CLIENT.post(f"{base}/v1/embeddings", content=raw)
    assert response.status_code == 400 and "the body is not" in json.dumps(response.json())
