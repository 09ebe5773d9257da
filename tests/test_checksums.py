"""Checksums of folders: every flipped bit of a converted folder is noticed, where asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cloud_storage import emulate
from test_restore import flip
from training_runs import config, make_folder

from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.checksums import DamagedFileError, verify_checksums, write_checksums
from e5v_jax.encode.options import Args
from e5v_jax.storage import as_path, upload
from e5v_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


def test_every_file_of_a_converted_folder(folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder / "base", tmp_path / "base"))
    assert verify_checksums(base)
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for seed, file in enumerate(files):
        whole = file.read_bytes()
        flip(file, seed)
        with pytest.raises(ValueError) as info:
            ConvertedFolder(base, verify=True)
        assert "\n" not in str(info.value)
        if file.name not in ("checksums.json", "config.json"):  # which have more to say
            assert str(info.value).startswith(f"{file}: differs from what was written")
            assert str(info.value).endswith("copy it again, or convert the model again")
        file.write_bytes(whole)
    files[-1].unlink()
    with pytest.raises(ValueError, match=r"missing, but checksums\.json names it"):
        ConvertedFolder(base, verify=True)


def test_by_option(folder: Path, tmp_path: Path) -> None:
    """A flip in the embedding table is another vector; whoever asks is told."""
    base = Path(shutil.copytree(folder / "base", tmp_path / "base"))
    E5V.from_pretrained(base, dtype="float32", verify=True)
    largest = max(base.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    flip(largest, 1)
    ConvertedFolder(base)
    with pytest.raises(ValueError, match="differs from what was written"):
        E5V.from_pretrained(base, verify=True)
    with pytest.raises(ValueError, match="differs from what was written"):
        Args(model=str(base), verify=True).load()
    with pytest.raises(ValueError, match="differs from what was written"):
        train(config(folder, tmp_path / "run", model=base, verify=True))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="only a converted folder has checksums"):
        E5V.from_pretrained(folder / "hf", verify=True)
    (base / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"base: no checksums\.json to verify it by"):
        ConvertedFolder(base, verify=True)


def test_a_tokenizer_from_a_bucket_is_always_compared(folder: Path) -> None:
    with emulate("sums"):
        remote = as_path("gs://sums/base")
        upload(folder / "base", remote)
        load_tokenizer(remote)
        file = remote / "tokenizer.json"
        file.write_bytes(file.read_bytes().replace(b"dog", b"god").replace(b"0", b"1", 1))
        with pytest.raises(DamagedFileError, match=r"tokenizer\.json: differs"):
            load_tokenizer(remote)


def test_files_are_shared_out(tmp_path: Path) -> None:
    """Several processes compare a part each, and all of them everything."""
    for i in range(7):
        (tmp_path / f"{i}").write_bytes(np.random.default_rng(i).bytes(100))
    write_checksums(tmp_path)
    (tmp_path / "5").write_bytes(b"")
    found = []
    for part in range(3):
        try:
            assert verify_checksums(tmp_path, part=part, parts=3)
        except DamagedFileError as error:
            found.append(str(error))
    assert len(found) == 1 and "/5: differs" in found[0]
    assert not verify_checksums(tmp_path / "..")
