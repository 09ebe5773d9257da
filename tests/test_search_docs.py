"""The Python of docs/search.md: the way from an index to a database finds what the index finds."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from search_scenes import embed_scene, index_scenes

from e5v_jax.search.query import find
from e5v_jax.search.store import Store

PAGE = Path(__file__).parents[1] / "docs" / "search.md"


@pytest.mark.parametrize(("package", "score"), [("lancedb", None), ("qdrant_client", "score")])
def test_to_a_database(package: str, score: str | None, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"pip install {package.replace('_', '-')}")
    index_scenes(tmp_path)
    first, *others = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text())
    (block,) = (other for other in others if f"import {package}" in other or package in other)
    query = embed_scene("snow")
    # what is not here: buckets and servers, a model
    for name, here in (
        ("my.index", tmp_path / "index"),
        ("s3://bucket/search", tmp_path / "lance"),
        ("https://...", ":memory:"),
        ("(index, size=1000)", "(index, size=7)"),
    ):
        first, block = first.replace(name, str(here)), block.replace(name, str(here))
    *lines, last = block.rstrip().splitlines()
    names: dict[str, Any] = {
        "model": SimpleNamespace(
            encode_query=lambda text: query,
            config=SimpleNamespace(text=SimpleNamespace(hidden_size=query.size)),
        )
    }
    exec(first + "\n".join(lines), names)
    found = eval(last, names)
    with Store(tmp_path / "index").reading() as now:
        expected = find(now, query, 10)
    if score is None:
        paths, scores = [hit["path"] for hit in found], [1 - hit["_distance"] for hit in found]
    else:
        paths, scores = [hit.payload["path"] for hit in found], [hit.score for hit in found]
    np.testing.assert_allclose(scores, [hit.score for hit in expected], atol=2e-3)
    assert paths[:3] == [hit.row.path for hit in expected[:3]]
