"""The wheel: no package named ``convert``, and commands that work away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hf_models import TEXT_RECIPES, build_text

from e5v_jax import __version__

ROOT = Path(__file__).parents[1]
COMMANDS = ("convert", "export", "train", "encode", "evaluate", "dryrun", "demo", "serve", "search")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, cwd: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A console script of the wheel, in a folder that is not the checkout."""
    script, *rest = map(str, words)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [str(installed / "bin" / script), *rest],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_contents(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"e5v_jax"}
    assert "e5v_jax/demo/train.csv" in names and "e5v_jax/demo/heldout.csv" in names
    page = ("index.html", "style.css", "search.js")
    assert {f"e5v_jax/search/page/{name}" for name in page} <= set(names)
    assert "e5v_jax/evaluate/published.csv" in names and "e5v_jax/py.typed" in names
    assert wheel.name.startswith(f"e5v_jax-{__version__}-")
    cited = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {__version__}" in cited
    assert {f"e5v-{name}" for name in COMMANDS} <= {f.name for f in (installed / "bin").iterdir()}


def test_commands(installed: Path, tmp_path: Path) -> None:
    """Convert, encode and export a tiny model; each command has its help."""
    case = build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    done = run(installed, tmp_path, "e5v-convert", case.folder, "ours")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ours: ")
    texts = ["--text", "A dog sits.", "--text", "Snow."]
    flags = ["--model", "ours", "--dtype", "float32", "--output", "vectors.npy"]
    done = run(installed, tmp_path, "e5v-encode", *flags, *texts)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vectors.npy").is_file()
    done = run(installed, tmp_path, "e5v-export", "ours", "hf-again")
    assert done.returncode == 0, done.stderr
    for name in ("train", "evaluate", "demo", "dryrun"):
        done = run(installed, tmp_path, f"e5v-{name}", "--help")
        assert done.returncode == 0 and f"usage: e5v-{name}" in done.stdout, done.stderr
    where = [sys.executable, "-c", "import e5v_jax; print(e5v_jax.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(where, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(installed)
