"""Malformed requests by the thousand: each is answered, none by 500, and the server goes on."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hf_models import Case, picture
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from serving import CLIENT, data_url, served

from e5v_jax import E5V

URL = data_url(picture(28, 28))
PATHS = [
    "/v1/embeddings",
    "/embeddings",
    "/v2/embed",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/tokenize",
]
GOOD: list[dict[str, Any]] = [
    {"model": "tiny", "input": "a", "encoding_format": "base64", "dimensions": 8, "user": "u"},
    {"input": ["a", [65, 66]], "truncate_prompt_tokens": 80, "prompt_name": "sts"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]},
    {"input": [{"text": "a"}, {"image": URL}], "task": "query", "embedding_type": ["int8"]},
    {"modality": "image", "input": [URL]},
    {"input_type": "search_query", "texts": ["a"], "embedding_types": ["float", "ubinary"]},
    {"input_type": "image", "images": [URL], "truncate": "NONE", "output_dimension": 8},
    {"input_type": "image", "inputs": [{"content": [{"type": "text", "text": "a"}]}]},
    {"query": "a", "documents": ["b", {"text": "c"}, {"image": URL}], "top_n": 1},
    {"text_1": "a", "text_2": ["b", "c"]},
    {"prompt": "a", "return_token_strs": True},
]
OWN = {
    "input_type": "/v2/embed",
    "documents": "/v1/rerank",
    "text_1": "/score",
    "prompt": "/tokenize",
}  # fields, and the path of bodies that have them
FIELDS = sorted({key for body in GOOD for key in body} | {"instruction", "truncate", "max_length"})
ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "<image>",
    "</s>",
    "<|eot_id|>",
    "data:image/png;base64,",
    "data:image/png;base64,AAAA",
    "http://127.0.0.1/",
    "file:///etc/passwd",
    "\\\\host\\share",
    "NaN",
    "\u202e",
    "\U0001f600" * 50,
    "x" * 5000,
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(ODD_TEXTS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "type", "text", "image", "url"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a good body with some places changed, or any object, or bytes."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(PATHS)), draw(st.binary(max_size=60))
    if kind == 1:
        return draw(st.sampled_from(PATHS)), json.dumps(draw(values)).encode()
    good = draw(st.sampled_from(GOOD))
    fitting = next((path for field, path in OWN.items() if field in good), "/v1/embeddings")
    path = draw(st.sampled_from(PATHS)) if kind == 3 else fitting
    body = json.loads(json.dumps(good))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        _change(draw, body)
    raw = json.dumps(body).encode()
    if kind == 2:  # cut off, or a byte is another
        at = draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + draw(st.binary(max_size=1)) + raw[at + draw(st.integers(1, 50)) :]
    return path, raw


def _change(draw: st.DrawFn, body: Any) -> None:
    """Another value somewhere, one less, or one more."""
    while True:
        keys = list(body) if isinstance(body, dict) else list(range(len(body)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(body[key], dict | list) and draw(st.booleans()):
            body = body[key]
            continue
        what = draw(st.integers(0, 2))
        if what == 0:
            body[key] = draw(values)
        elif what == 1:
            del body[key]
        elif isinstance(body, dict):
            body[draw(st.sampled_from(FIELDS))] = draw(values)
        else:
            body.append(draw(values))
        return


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").e5v


@pytest.fixture(scope="module")
def base(e5v: E5V) -> Iterator[str]:
    with served(e5v, cache_size=100) as (base, _):
        yield base


def fuzz(base: str, e5v: E5V, examples: int) -> None:
    expected = e5v.encode(["after"])
    statuses: dict[int, int] = {}

    @seed(15)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def run(request: tuple[str, bytes]) -> None:
        path, raw = request
        answer = CLIENT.post(base + path, content=raw)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404, 413), (raw, answer.text)
        body = answer.json()
        if answer.status_code != 200:
            message = body.get("message") or body.get("detail") or body["error"]["message"]
            assert isinstance(message, str) and message and "\n" not in message, answer.text

    run()
    assert min(statuses[200], statuses[400]) > examples / 50, statuses
    answer = CLIENT.post(f"{base}/v1/embeddings", json={"input": "after"}).json()
    found = np.array([answer["data"][0]["embedding"]])
    assert np.abs(found - expected).max() <= 1e-6
    assert "e5v_held_bytes 0.0" in CLIENT.get(f"{base}/metrics").text


def test_malformed_requests(base: str, e5v: E5V, caplog: pytest.LogCaptureFixture) -> None:
    fuzz(base, e5v, 300)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_ten_thousand_malformed_requests(
    base: str, e5v: E5V, caplog: pytest.LogCaptureFixture
) -> None:
    fuzz(base, e5v, 10_000)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
