"""What is published works where nothing else is: on the lowest versions allowed, and the newest.

Wheel and sdist are built, the wheel from the sdist, and installed into empty environments by uv, as
pip has no way to ask for the lowest. Without a package index it skips, saying so.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hf_models import RECIPES, build_llava, picture
from test_retrieval import write_set
from training_runs import write_csv

from e5v_jax import E5V, __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEWER = ("3.14", "3.13", "3.12")  # Pythons that the newest versions are tried on, if there is one
USED_HERE = ("analyse", "onnx", "gcs")  # extras whose lowest versions are installed, too
pytestmark = pytest.mark.slow


def call(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that knows nothing of this checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "UV_RESOLUTION")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"UV_PYTHON_DOWNLOADS": "never", "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    # for a folder of wheels that pip is told of, and uv is not
    env.setdefault("UV_FIND_LINKS", env.get("PIP_FIND_LINKS", ""))
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def uv(*words: str | Path, cwd: Path | None = None) -> str:
    """Run uv; without a package index the test skips."""
    done = call(sys.executable, "-m", "uv", *words, cwd=cwd)
    if "No module named uv" in done.stderr:
        pytest.skip("uv is not installed: pip install uv")
    lost = ("error sending request", "dns error", "network was disabled", "Failed to fetch")
    if done.returncode != 0 and any(word in done.stderr for word in lost):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def find_python(versions: tuple[str, ...]) -> Path:
    """The first of the versions that is here and runs; else the Python of the tests."""
    for version in versions:
        places = [Path(found)] if (found := shutil.which(f"python{version}")) else []
        places += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for place in places:
            if call(place, "-c", "").returncode == 0:
                return place
    return Path(sys.executable)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that was built from it."""
    source, out = tmp_path_factory.mktemp("source") / "e5v-jax", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)  # building writes into it
    uv("build", "--out-dir", out, source)
    return out


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and nothing but what it asks for."""

    folder: Path
    versions: dict[str, str]
    """Of the packages in it."""

    def run(self, name: str, *words: str | Path, cwd: Path) -> str:
        """Run one of its programs, successfully."""
        done = call(self.folder / "bin" / name, *words, cwd=cwd)
        assert done.returncode == 0, f"{self.versions}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module", params=["lowest-direct", "highest"])
def installed(
    request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """The wheel on the lowest versions of what it asks for itself, and on the newest of all."""
    folder = tmp_path_factory.mktemp(request.param) / "env"
    lowest = request.param == "lowest-direct"
    python = Path(sys.executable) if lowest else find_python(NEWER)
    uv("venv", "--python", python, folder)
    (wheel,) = dist.glob("*.whl")
    into = ("--python", folder / "bin/python")
    extras = [word for extra in USED_HERE for word in ("--extra", extra)]
    how = ("--resolution", request.param, *extras, "--output-file", folder / "wanted.txt")
    uv("pip", "compile", *into, *how, ROOT / "pyproject.toml")
    uv("pip", "install", *into, "--requirements", folder / "wanted.txt", wheel)
    frozen = uv("pip", "freeze", *into).splitlines()
    versions = dict(line.split("==") for line in frozen if "==" in line)
    return Installed(folder, {name.lower(): version for name, version in versions.items()})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an image, triplets and captions."""
    folder = tmp_path_factory.mktemp("inputs")
    build_llava(RECIPES["llama-gqa"], folder / "hf")
    (folder / "photos").mkdir()
    picture(40, 60).save(folder / "photos/a.png")
    write_csv(folder / "my.csv", rows=48)
    write_set(folder / "data/flickr30k")
    return folder


def test_what_is_published(dist: Path) -> None:
    """Version from one place, type information, data and licence; no tests in the wheel."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"e5v_jax-{__version__}-py3-none-any.whl"
    assert sdist.name == f"e5v_jax-{__version__}.tar.gz"
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    assert {name.split("/")[0] for name in names} == {
        "e5v_jax",
        f"e5v_jax-{__version__}.dist-info",
    }
    assert {"e5v_jax/py.typed", "e5v_jax/demo/train.csv", "e5v_jax/evaluate/published.csv"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    package = {
        f"e5v_jax/{f.relative_to(ROOT / 'e5v_jax')}" for f in (ROOT / "e5v_jax").rglob("*.py")
    }
    assert package <= names
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE", "e5v_jax/py.typed"} <= inside
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    said = files.read(metadata).decode()
    assert f"Version: {__version__}\n" in said and "License-Expression: Apache-2.0\n" in said
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in said


def test_every_program_works(installed: Installed, inputs: Path, tmp_path: Path) -> None:
    """From a checkpoint to vectors, a trained adapter, scores and exports; equal to those here."""
    if installed.folder.parent.name.startswith("lowest"):  # it is what was asked for
        bounds = dict(line.split(">=") for line in PROJECT["dependencies"] if ">=" in line)
        for name, bound in bounds.items():
            found = installed.versions[name.partition("[")[0].lower()]
            assert found == bound or found.startswith(f"{bound}."), f"{name}: {found}, not {bound}"
    for name in PROJECT["scripts"]:
        assert f"usage: {name}" in installed.run(name, "--help", cwd=tmp_path)
    installed.run("e5v-convert", inputs / "hf", "ours", cwd=tmp_path)
    model = ("--model", "ours", "--dtype", "float32")
    texts = ["A dog sits.", "Snow falls on the roofs."]
    said = [word for text in texts for word in ("--text", text)]
    installed.run("e5v-encode", *model, *said, "--output", "texts.npy", cwd=tmp_path)
    installed.run(
        "e5v-encode", *model, "--input", inputs / "photos", "--output", "bulk", cwd=tmp_path
    )
    here = E5V.from_pretrained(tmp_path / "ours", dtype="float32")
    np.testing.assert_allclose(np.load(tmp_path / "texts.npy"), here.encode(texts), atol=1e-5)
    from e5v_jax.encode.bulk import read_embeddings

    ids, vectors = read_embeddings(tmp_path / "bulk")
    assert list(ids) == ["a.png"]
    np.testing.assert_allclose(vectors, here.encode([picture(40, 60)]), atol=1e-5)
    train = ["--config", ROOT / "configs/demo.py", "--model", "ours", "--output", "run"]
    train += ["--data.path", inputs / "my.csv", "--max-steps", "2", "--batch-size", "4"]
    installed.run("e5v-train", *train, "--lora.rank", "2", "--dtype", "float32", cwd=tmp_path)
    quantised = (*model, "--adapter", "run", "--quantize", "int8")
    installed.run("e5v-encode", *quantised, *said, "--output", "int8.npy", cwd=tmp_path)
    assert np.isfinite(np.load(tmp_path / "int8.npy")).all()
    data = ("--data", inputs / "data", "--tasks", "flickr30k", "--output", "scores")
    installed.run("e5v-evaluate", *model, *data, "--adapter", "run", cwd=tmp_path)
    pictures = ("--data", inputs / "data/flickr30k", "--output", "space")
    installed.run("e5v-evaluate", "analyse", *model, *pictures, cwd=tmp_path)
    assert (tmp_path / "space/svd.png").is_file()
    export = ("e5v-export", "ours", "--adapter", "run", "--scores", "scores")
    installed.run(export[0], export[1], "whole", *export[2:], cwd=tmp_path)
    installed.run(export[0], export[1], "lora", *export[2:], "--peft", cwd=tmp_path)
    adapted = E5V.from_pretrained(tmp_path / "ours", adapter=tmp_path / "lora", dtype="float32")
    merged = E5V.from_pretrained(tmp_path / "whole", dtype="float32")
    np.testing.assert_allclose(merged.encode(texts), adapted.encode(texts), atol=1e-5)
