"""The documentation: every link leads somewhere, and the site builds without a warning."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tpu/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(
    r"(?:benchmarks|configs|convert|docs|e5v_jax|tests|tpu)(?:/[\w-]+)+\.(?:py|md|sh)"
)
TEST = re.compile(r"\btest_[a-z0-9_]+")


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def anchors(page: Path) -> set[str]:
    """What ``#`` may name: the headings, as GitHub and the site spell them."""
    headings = re.findall(r"(?m)^#+ +(.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Links between files lead to a file and a heading; a file that a page names is there."""
    lost = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    text = page.read_text()
    lost += [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    modules = {file.stem for file in (ROOT / "tests").glob("test_*.py")}
    lost += [name for name in TEST.findall(text) if name not in modules]
    assert not lost


def test_extras_are_documented() -> None:
    """A page says of each what it is for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    for extra in project["optional-dependencies"]:
        assert f"[{extra}]" in text, extra


def rows(page: Path) -> Iterator[set[str]]:
    """The cells of every row of every table."""
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            yield {cell.strip() for cell in line.strip("|").split("|")}


def test_choosing_repeats_what_is_elsewhere() -> None:
    """Under "rows of FILE", the cells of a row, but for its first, are those of a row of FILE."""
    _, *parts = re.split(r"<!-- rows of (\S+) -->", (ROOT / "docs/choosing.md").read_text())
    checked = 0
    for file, text in zip(parts[::2], parts[1::2], strict=True):
        table = text.strip().split("\n\n")[0].splitlines()
        for line in table[2:]:
            cells = {cell.strip() for cell in line.strip("|").split("|")[1:]}
            assert any(cells <= row for row in rows(ROOT / file)), line
            checked += 1
    assert checked == 22


@pytest.mark.slow  # every command says its --help
@pytest.mark.skipif(not find_spec("mkdocs"), reason="the site: pip install -e '.[docs]'")
def test_site(tmp_path: Path) -> None:
    """``make docs`` finds no link, page or name that leads nowhere."""
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout + done.stderr
    for page, words in {
        "index.html": "e5v-convert",
        "reference/index.html": "normalize_embeddings",
        "commands/index.html": "--max-num-batched-tokens",
        "tpu/index.html": "v5litepod-8",
    }.items():
        assert words in (tmp_path / page).read_text()
