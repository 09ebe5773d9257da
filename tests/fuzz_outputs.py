"""Damaged output folders and odd flags of the encode command, each made from a number.

A case ends well in one of these ways: "refused", in one line and exit code 1 or 2; "whole", where
the output is byte for byte that of an undisturbed run; "equal", where the vectors are those that
the class E5V gives. Otherwise it raises AssertionError.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from fuzz_inputs import Rng, damaged, one_line, pick
from hf_models import picture

from e5v_jax import E5V
from e5v_jax.encode.bulk import read_embeddings

Run = Callable[..., tuple[int, str, str]]
"""The command in this process: its words to exit code, stdout and stderr."""
ROWS = 11


@dataclass(frozen=True)
class Undisturbed:
    """The command's words but for ``--output``, and the folder that it makes of them."""

    words: tuple[str, ...]
    folder: Path


def write_inputs(folder: Path) -> None:
    """Rows of every kind, two of them bad; a folder of images; what is no input."""
    (folder / "photos").mkdir()
    for i in range(2):
        picture(40, 60, seed=i).save(folder / "photos" / f"{i}.png")
    rows: list[dict[str, Any]] = [{"text": f"Text {i}."} for i in range(ROWS)]
    rows[2] = {"id": "an image", "image": "photos/0.png"}
    rows[5] = {"text": "my <image> of"}
    rows[9] = {"text": " "}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("".join(f"Text {i}.\n" for i in range(ROWS)))
    (folder / "empty.txt").touch()


def undisturbed_runs(run: Run, folder: Path) -> list[Undisturbed]:
    """Runs to damage the outputs of: both formats, with rows that fail and without."""
    made = []
    for name, words in {
        "skip-npy": ("rows.jsonl", "--format", "npy", "--on-error", "skip"),
        "skip-parquet": ("rows.jsonl", "--on-error", "skip", "--embedding-dtype", "float16"),
        "texts": ("texts.txt", "--prompt-name", "sts"),
    }.items():
        words = ("--input", str(folder / words[0]), "--shard-size", "4", *words[1:])
        code, _, err = run(*words, "--output", str(folder / name))
        assert code == 0, err
        made.append(Undisturbed(words, folder / name))
    return made


def fuzz_output(rng: Rng, folder: Path, run: Run, undisturbed: list[Undisturbed]) -> str:
    """Damage the output of a run, read it, and start the same command again."""
    known = pick(rng, undisturbed)
    output, expected = folder / "out", contents(known.folder)
    shutil.copytree(known.folder, output)
    for _ in range(int(rng.integers(1, 4))):
        pick(rng, DAMAGES)(rng, output)
    foreign = {name: data for name, data in contents(output).items() if name not in expected}
    try:
        ids, vectors = read_embeddings(output)
        all_ids, all_vectors = read_embeddings(known.folder)
        rows = [all_ids.index(id) for id in ids]
        assert rows == sorted(rows), "read in another order"
        np.testing.assert_array_equal(vectors, all_vectors[rows])
    except (ValueError, OSError) as error:
        one_line(error)
    code, _, err = run(*known.words, "--output", str(output))
    if code:
        refused(code, err)
        return "refused"
    found = contents(output)
    changed = [name for name in foreign if found.pop(name, None) != foreign[name]]
    assert all(name.startswith("shard-") or name.endswith(".tmp") for name in changed), (
        f"{changed}: not ours, and changed"
    )
    for files in (found, expected):  # versions are told, not compared
        files["manifest.json"] = _without_versions(files["manifest.json"])
    different = [x for x in sorted({*found, *expected}) if found.get(x) != expected.get(x)]
    assert not different, f"{different}: not as undisturbed"
    return "whole"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; of what is none, nothing."""
    return {
        path.name: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.iterdir())
    }


def _without_versions(manifest: bytes) -> bytes:
    return json.dumps({**json.loads(manifest), "versions": None}, sort_keys=True).encode()


def refused(code: int, err: str) -> None:
    """Check that a command ended in one line; what it logged before does not count."""
    lines = [line for line in err.splitlines() if not line.startswith("compiled ")]
    lines = [line for line in lines if not line.endswith((": not whole, made again", "image file"))]
    assert code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), err
    assert "--traceback" not in lines[0], err


# --- damages to an output folder ------------------------------------------------------------------


def _file(rng: Rng, output: Path) -> Path:
    return Path(pick(rng, [path for path in sorted(output.iterdir()) if path.is_file()]))


def spoil(rng: Rng, output: Path) -> None:
    """Bits flipped, bytes cut off or put in."""
    file = _file(rng, output)
    file.write_bytes(damaged(rng, file.read_bytes()))


def remove(rng: Rng, output: Path) -> None:
    """A file gone, or empty, or a folder in its place, or a link to nothing."""
    file = _file(rng, output)
    file.unlink()
    way = pick(rng, ["gone", "gone", "empty", "folder", "link"])
    if way == "empty":
        file.touch()
    elif way == "folder":
        file.mkdir()
    elif way == "link":
        file.symlink_to("nothing")


def swap(rng: Rng, output: Path) -> None:
    """The contents of two files, one in place of the other."""
    one, other = _file(rng, output), _file(rng, output)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def add(rng: Rng, output: Path) -> None:
    """Files of others, some with names as ours."""
    names = ["notes.txt", ".hidden", ".x.tmp", ".repeated.tmp", "shard-00007.parquet"]
    names += ["shard-00000.failed.jsonl", "shard-00001.npy", "shard-00001.ids.json", "failed.jsonl"]
    name = pick(rng, names)
    data = pick(rng, [b"", b"mine", b"[]", b'[1, "x"]\n', bytes(range(256))])
    if not (output / name).exists():
        (output / name).write_bytes(data)


def rewrite(rng: Rng, output: Path) -> None:
    """Another manifest: of another run, or with fields of other types or none."""
    file = output / "manifest.json"
    odd = [None, True, 0, -1, 3, 1e999, "", "x", [], [1], {}, {"shards": 1}, {"rows": "x"}]
    try:
        manifest: Any = json.loads(file.read_bytes())
        key = pick(rng, sorted(manifest))
    except (OSError, ValueError, TypeError, AttributeError):
        return
    way = pick(rng, ["change", "change", "drop", "add", "replace", "unfinished"])
    if way == "change":
        manifest[key] = pick(rng, odd)
    elif way == "drop":
        del manifest[key]
    elif way == "add":
        manifest["other"] = pick(rng, odd)
    elif way == "unfinished":
        manifest.pop("result", None)
    else:
        manifest = pick(rng, odd)
    if file.is_file():
        file.write_text(json.dumps(manifest))


DAMAGES = (spoil, spoil, remove, remove, swap, add, rewrite)

# --- odd flags ------------------------------------------------------------------------------------


FLAGS: dict[str, tuple[list[str], list[str]]] = {  # values that may do, and those that never do
    "--prompt-name": (["sts", "plain", "text"], ["image", "x", ""]),
    "--prompt": (["<sent> means", "<sent> <sent>"], ["no slot", "", "<image>", "\ud800<sent>"]),
    "--truncate-dim": (["1", "7", "64"], ["65", "0", "-3", "9" * 30]),
    "--batch-size": (["1", "3", "9" * 30], ["0", "-1"]),
    "--max-num-batched-tokens": (["1", "300"], ["0", "-5"]),
    "--format": (["npy", "parquet"], []),
    "--embedding-dtype": (["float16", "float32"], []),
    "--shard-size": (["1", "4", "100"], ["0", "-1", "9" * 30]),
    "--on-error": (["skip", "raise"], []),
    "--num-workers": (["0"], ["-1"]),
    "--template": (["llama3"], ["", "x"]),
    "--fsdp": (["1"], ["0", "3"]),
    "--attn-implementation": (["auto", "xla"], ["cudnn", "splash"]),
}
OUTPUTS = ["a.npy", "a.parquet", "out", "deep/er", "here", "br[a]ck", "new\nline", "é\udcff.npy"]
NO_OUTPUTS = ["old.npy", "a.txt", "none/a.npy", "plain", "plain/a.npy", "plain/out"]


def fuzz_flags(rng: Rng, folder: Path, run: Run, model: E5V, inputs: Path) -> str:
    """Any flags together; what is not refused gives the vectors of the class with the same."""
    words, items, options = _choose_inputs(rng, inputs), None, {}
    if words and words[0] == "--text" and "" not in words:
        items = list(words[1:])
    elif words[-1:] == [str(inputs / "texts.txt")]:
        items = [f"Text {i}." for i in range(ROWS)]
    for flag, values in FLAGS.items():
        if rng.random() < 0.15:
            good, odd = values
            options[flag] = str(pick(rng, odd if odd and rng.random() < 0.2 else good))
            words += [flag, options[flag]]
    if rng.random() < 0.2:
        words.append("--no-normalize")
        options["--no-normalize"] = ""
    (folder / "old.npy").write_bytes(b"old")
    (folder / "here").mkdir()
    (folder / "plain").touch()
    output = folder / str(pick(rng, NO_OUTPUTS if rng.random() < 0.2 else OUTPUTS))
    if rng.random() < 0.95:
        words += ["--output", str(output)]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, _, err = run(*words)
    if code:
        refused(code, err)
        if "no row could be embedded" in err:
            assert (output / "failed.jsonl").read_bytes()
            return "all failed"
        left = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert left == {path: time for path, time in before.items() if path.is_file()}, "left"
        return "refused"
    if not output.exists() or items is None:
        return "shown" if not output.exists() else "written"
    found = _read(output)
    expected = model.encode(
        items,
        prompt_name=options.get("--prompt-name"),
        prompt=options.get("--prompt"),
        normalize_embeddings="--no-normalize" not in options,
        truncate_dim=int(options["--truncate-dim"]) if "--truncate-dim" in options else None,
    )
    half = options.get("--embedding-dtype") == "float16"
    np.testing.assert_allclose(found, expected, atol=2e-3 if half else 2e-6, rtol=1e-3 * half)
    return "equal"


def _choose_inputs(rng: Rng, inputs: Path) -> list[str]:
    texts = ["--text", "Text 0.", "Text 1."]
    files = {
        name: ["--input", str(inputs / name)] for name in ("texts.txt", "rows.jsonl", "photos")
    }
    odd = [["--text", ""], ["--image", "none.png"], [], [*texts, *files["photos"]], ["--input", ""]]
    odd += [["--input", str(inputs / name)] for name in ("empty.txt", "none.jsonl", "*.txt")]
    good = [texts, files["texts.txt"], files["texts.txt"], files["rows.jsonl"], files["photos"]]
    return list(pick(rng, odd if rng.random() < 0.15 else good))


def _read(output: Path) -> np.ndarray:
    if output.is_dir():
        return read_embeddings(output)[1]
    if output.suffix == ".npy":
        return np.asarray(np.load(output))
    return np.array(pq.read_table(output)["embedding"].to_pylist())
