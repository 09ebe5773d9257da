"""The hooks of mkdocs: pages that live outside ``docs/``, and the flags of every command."""

import os
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # a file of the checkout -> its page; it is read where it is, so that no copy ages
    "README.md": "index.md",
    "tpu/README.md": "tpu.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_MORE = {
    "e5v-evaluate": ("analyse", "golden"),
    "e5v-dryrun": ("train", "encode"),
    "e5v-search": ("index", "query", "serve"),
}
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of ``docs/``."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links between files of the checkout links between pages of the site."""
    own = {page: source for source, page in ELSEWHERE.items()}
    source = own.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        return ELSEWHERE.get(target, target.removeprefix("docs/"))

    return _LINK.sub(replace, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the names of Sphinx's roles out of docstrings."""
    return _ROLE.sub("", html)


def commands() -> str:
    """The page of commands: what ``--help`` says of each script that pyproject.toml names."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    page = "# Commands\n\nWhat `--help` says of each.\n"
    for name, place in scripts.items():
        for words in ((), *((word,) for word in _MORE.get(name, ()))):
            page += f"\n## {' '.join((name, *words))}\n\n```text\n{_help(name, place, words)}```\n"
    return page


def _help(name: str, place: str, words: tuple[str, ...]) -> str:
    module, function = place.split(":")
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
