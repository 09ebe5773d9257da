"""Queries of an index of synthetic vectors, and the page's time beside the query's embedding.

    python benchmarks/search.py                        # the table of docs/search.md
    python benchmarks/search.py --rows 100000 --dimensions 576 --page   # in Chromium too

Every row is compared. The index lies in the page cache of the system, as one that is in use does.
"""

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

from e5v_jax.data.inputs import Input
from e5v_jax.search.query import DUPLICATE, find
from e5v_jax.search.scan import File, Part
from e5v_jax.search.store import Store
from e5v_jax.search.writer import Writer

_BLOCK = 10_000


@dataclass(frozen=True)
class Args:
    """Time queries of an index of random unit vectors."""

    rows: int = 100_000
    dimensions: tuple[int, ...] = (576, 1024, 2048, 4096)
    """SmolLM2-135M has 576, Qwen3-VL-2B 2048, E5-V 4096."""
    repetitions: int = 30
    page: bool = False
    """The page too, in the system's Chromium (playwright): from the request to the results."""


def unit(random: np.random.Generator, rows: int, dimensions: int) -> np.ndarray:
    """Random unit vectors, fp32 [rows, dimensions]."""
    vectors = random.standard_normal((rows, dimensions), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(folder: Path, rows: int, dimensions: int) -> None:
    """An index of texts, 100 a file."""
    random, writer = np.random.default_rng(0), Writer(folder)
    with writer.commit():
        writer.set_meta(identity={}, model={"model": "synthetic"}, roots=["/synthetic"])
        for start in range(0, rows, _BLOCK):
            numbers = range(start, min(rows, start + _BLOCK))
            writer.add_vectors(
                [f"text {n}" for n in numbers], unit(random, len(numbers), dimensions)
            )
            for first in range(start, numbers.stop, 100):
                parts = [
                    Part(f"text {n}", "text", n - first + 1, f"Synthetic text number {n}.")
                    for n in range(first, min(first + 100, numbers.stop))
                ]
                writer.put_file(File(f"/synthetic/{first:07}.txt", 1, 1, str(first)), parts, None)
    writer.close()


def query(store: Store, vector: np.ndarray, duplicates: float | None) -> None:
    """Find the best 60, as the page does."""
    with store.reading() as now:
        assert len(find(now, vector, 60, duplicates=duplicates)) == 60


def measure(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each run but the first three, ascending."""
    times = []
    for run in runs:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return sorted(times[3:])


def time_page(folder: Path, dimensions: int, repetitions: int) -> list[float]:
    """Milliseconds from a query to its results in the page, without its embedding."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from playwright.sync_api import sync_playwright
    from search_server import serving

    random = np.random.default_rng(1)
    vectors = unit(random, repetitions + 3, dimensions)
    left = iter(vectors)

    def embed(item: Input) -> np.ndarray:
        return next(left)

    times: list[float] = []
    with serving(folder, embed) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#empty h2")
        for number in range(repetitions + 3):
            page.fill("#text", f"query {number}")
            page.evaluate("document.body.dataset.seconds = ''")
            page.press("#text", "Enter")
            page.wait_for_selector("body:not([data-seconds=''])")
            shown = json.loads(page.evaluate("document.body.dataset.seconds"))
            times.append(1000 * (shown["page"] - shown["embedding"]))
        browser.close()
    return sorted(times[3:])


def main(args: Args) -> None:
    """Print a row of the table for each number of dimensions."""
    print(f"{args.rows} rows; python {platform.python_version()}, numpy {version('numpy')}")
    for dimensions in args.dimensions:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "index"
            start = time.perf_counter()
            build(folder, args.rows, dimensions)
            built = time.perf_counter() - start
            store = Store(folder)
            queries = unit(np.random.default_rng(2), args.repetitions + 3, dimensions)
            plain, hiding = (
                measure([partial(query, store, vector, level) for vector in queries])
                for level in (None, DUPLICATE)
            )
            line = f"{dimensions} dimensions, {args.rows * dimensions * 2 / 2**20:.0f} MB: "
            line += f"query {told(plain)}, near-duplicates hidden {told(hiding)}, "
            line += f"built {built:.0f} s"
            if args.page:
                line += f", page {told(time_page(folder, dimensions, args.repetitions))}"
            print(line, flush=True)
            store.close()


def told(times: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(times):.0f} ms (worst {times[-1]:.0f})"


if __name__ == "__main__":
    main(tyro.cli(Args))
