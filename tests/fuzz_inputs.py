"""Odd and malformed inputs, each made from its kind and a number, and what must come of them.

A case ends well in one of these ways: "refused", in one line of a class whose message the commands
print as it is; "some refused", where rows are refused one by one; "equal", to what csv, json,
Arrow, Pillow or the PyTorch reference make of the same. Otherwise it raises AssertionError.
"""

import csv
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hf_models import TEMPLATES, Case
from odd_images import encode, noise

from e5v_jax import exits
from e5v_jax.data.images import ImageError
from e5v_jax.data.inputs import InputError
from e5v_jax.data.pairs import load_pairs
from e5v_jax.encode.files import IMAGE_SUFFIXES, Item, iterate_items, read_items, scan_items
from e5v_jax.prompts import TEXT, TextError, choose_prompt

Rng = np.random.Generator
PLAIN_CLASSES = (ValueError, TextError, InputError, ImageError, exits.UsageError)


def one_line(error: Exception) -> str:
    """The line a command prints for ``error``; it must be of a class with a message for people."""
    message = exits.one_line(error)
    assert type(error) in PLAIN_CLASSES or isinstance(error, OSError), repr(error)
    assert message.splitlines() == [message] and "--traceback" not in message, repr(message)
    return message


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


# --- damage


def damaged(rng: Rng, data: bytes) -> bytes:
    """``data`` with bits flipped, cut off, doubled, or with bytes put in or taken out."""
    if not data:
        return data
    for _ in range(int(rng.integers(1, 4))):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 9))
        way = pick(rng, ["flip", "flip", "flip", "cut", "insert", "remove", "zero", "double"])
        if way == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        elif way == "cut":
            data = data[: at + 1]
        elif way == "insert":
            data = data[:at] + rng.bytes(size) + data[at:]
        elif way == "remove":
            data = data[:at] + data[at + size :] or b"-"
        elif way == "zero":
            data = data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
        else:
            data = data[: at + size] + data[at:]
    return data


# --- texts

HUGE = "a number of 5001 digits"  # in json
SPECIAL = ("<s>", "</s>", "<image>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_PIECES = (
    *(
        "a dog",
        " two  spaces ",
        "café",
        "cafe\u0301",
        "\u202eright to left",
        "שלום",
        "مرحبا",
        "漢字",
    ),
    *(
        "👩\u200d👩\u200d👧",
        "\U0001f1e9\U0001f1ea",
        "\u200b",
        "\ufeff",
        "\x85",
        "\u2028",
        "\t",
        "\x00",
    ),
    *(
        "\x1b[31m",
        "\x07",
        "\r\n",
        "\n\n",
        "<sent>",
        "{}",
        "{type}",
        "[INST]",
        "<|im_start|>",
        "\\n",
    ),
    *(
        "<IMAGE>",
        "< image>",
        "<|eot_id",
        "%s",
        "'\"`",
        "../../etc",
        "\uffff",
        "\U0010ffff",
        "\ufb01",
    ),
)


def odd_text(rng: Rng) -> str:
    """A few odd pieces; sometimes blank, a special token, half a character, or very long."""
    way = pick(rng, ["pieces"] * 8 + ["special", "half", "blank", "long", "too long"])
    text = "".join(pick(rng, _PIECES) for _ in range(int(rng.integers(1, 6))))
    if way == "blank":
        return pick(rng, ["", " ", "\n", "\u3000", "\t \x85"])
    if way in ("long", "too long"):  # of the 2048 tokens that the model takes, a byte each
        return ("word " * 400)[: 900 if way == "long" else 2000] + text
    more = {"special": pick(rng, SPECIAL), "half": pick(rng, ["\ud800", "\udfff", "\udce9"])}
    at = int(rng.integers(len(text) + 1))
    return text[:at] + more.get(way, "") + text[at:]


def reference_ids(case: Case, prompt: str, text: str) -> list[int]:
    """One token a byte, so that parts may stand alone; names of special tokens in ``text`` too."""
    head, tail = TEMPLATES[case.template].split("{}")
    letters = [
        i for letter in text for i in case.tokenizer.encode(letter, add_special_tokens=False)
    ]
    first, *more = (head + prompt + tail).split("<sent>")
    ids = case.tokenizer.encode(first)
    for part in more:
        ids += [*letters, *case.tokenizer.encode(part, add_special_tokens=False)]
    return ids


def fuzz_text(rng: Rng, folder: Path, case: Case) -> str:
    """Some texts through the model, one prompt: each refused for a reason, or PyTorch's vector."""
    prompt = pick(rng, [None, None, "<sent>: ", "\x00<sent>", "<sent>{} <s>", "é<sent>é "])
    texts = [odd_text(rng) for _ in range(pick(rng, [1, 2, 12]))]
    refused: dict[int, str] = {}
    vectors = case.e5v.encode(
        list(texts),
        prompt=prompt,
        on_error=lambda error: refused.__setitem__(error.position, one_line(error)),
    )
    assert np.isfinite(vectors).all()
    for position, text in enumerate(texts):
        bad = not text.strip() or any(0xD800 <= ord(c) < 0xE000 for c in text)
        bad = bad or len(reference_ids(case, prompt or TEXT, text)) > 2048
        assert (position in refused) == bad, (text[:99], len(text), refused.get(position))
    good = [position for position in range(len(texts)) if position not in refused]
    measured = case.e5v.processor.measure([texts[i] for i in good], choose_prompt(None, prompt))
    for item, i in zip(measured, good, strict=True):
        assert item.ids == reference_ids(case, prompt or TEXT, texts[i])
    good = [i for i in good if not any(token in texts[i] for token in SPECIAL)]
    if good and prompt is None:  # the one that the reference's helper knows
        expected = case.torch_embed([texts[position] for position in good])
        np.testing.assert_allclose(vectors[good], expected, atol=1e-5)
    return "some refused" if refused else "equal"


def fuzz_prompt(rng: Rng, folder: Path, case: Case) -> str:
    """A prompt that is refused before any text, or one that makes the tokens of the reference."""
    pieces = ["<sent>", "<image>", "{type}", "", "\ud800", "\udce9", *_PIECES]
    prompt = "".join(pick(rng, pieces) for _ in range(int(rng.integers(1, 5))))
    try:
        choice = choose_prompt(None, prompt)
        (item,) = case.e5v.processor.measure(["a dog"], choice)
    except ValueError as error:
        one_line(error)
        return "refused"
    assert item.ids == reference_ids(case, prompt, "a dog")
    return "equal"


# --- rows


def odd_folder(folder: Path) -> None:
    """Images, and what only looks like one: a pipe, a socket, a device, a folder, loops."""
    folder.mkdir(exist_ok=True)
    noise(9, 12).save(folder / "a.png")
    noise(12, 9).save(folder / "b.JPG")
    (folder / "empty.png").write_bytes(b"")
    (folder / "inner.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere.png", folder / "broken.png")
    os.symlink("/dev/zero", folder / "device.png")
    os.symlink("a.png", folder / "link.png")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
    finally:
        os.chdir(here)


def odd_value(rng: Rng, column: str) -> Any:
    if column == "image":
        names = ["a.png", "a.png", "b.JPG", "link.png", "pipe.png", "loop.png", "inner.png", ""]
        names += ["device.png", "socket.png", "a\x00.png", "a\n.png", "x" * 300, "https://a/b.png"]
        return pick(rng, [*names, None, 5, ["a.png"], "\udce9.png", "..", "/"])
    if column == "id":
        return pick(rng, [None, 7, "x", "x", "", " ", "\ud800", 1.5, True, "é", "a\nb", 10**30])
    odd = [None, 5, 1.5, float("nan"), True, [], {}, ["a"], {"a": 1}, HUGE]
    return pick(rng, odd) if rng.random() < 0.2 else odd_text(rng)


def odd_rows(rng: Rng) -> list[dict[str, Any]]:
    columns = pick(rng, [["text"], ["text"], ["id", "text"], ["text", "image"], ["image", "id"]])
    columns = [*columns, *pick(rng, [[]] * 6 + [["caption"], ["Text"]])]
    rows = [{c: odd_value(rng, c) for c in columns} for _ in range(int(rng.integers(0, 6)))]
    return [{"text": "a dog"}, *rows] if rng.random() < 0.5 else rows


def json_line(rng: Rng, row: dict[str, Any]) -> bytes:
    line = json.dumps(row, ensure_ascii=bool(rng.integers(2))).encode(errors="surrogatepass")
    line = line.replace(json.dumps(HUGE).encode(), b"1" + b"0" * 5000)
    deep = b"[" * 5000 + b"]" * 5000
    odd = [b"", b" \r", b"[]", b"null", b'{"text": "a", "text": "b"}', b"{", deep, b"\xff", b"\x00"]
    odd += [b'{"text": ' + deep + b"}", b'{"text": "a"} {}', b"5" * 5000, b'{"text": Infinity}']
    return pick(rng, odd) if rng.random() < 0.15 else line


def write_rows(rng: Rng, file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows in the file's format, perhaps with a BOM, other line ends, or damaged."""
    if file.suffix == ".parquet":
        data = parquet(rng, rows)
    elif file.suffix == ".csv":
        buffer = io.StringIO()
        header = list(rows[0]) if rows else ["text"]
        writer = csv.writer(buffer, lineterminator=pick(rng, ["\n", "\r\n"]))
        writer.writerow(header)
        for row in rows:
            cells = ["" if value is None else str(value)[:4000] for value in row.values()]
            writer.writerow(cells if rng.random() < 0.9 else cells[1:])
        data = buffer.getvalue().encode(errors="surrogatepass")
    elif file.suffix == ".jsonl":
        data = pick(rng, [b"\n", b"\r\n"]).join(json_line(rng, row) for row in rows)
    else:
        lines = (str(row.get("text"))[:4000].encode(errors="surrogatepass") for row in rows)
        data = b"\n".join(lines)
    if rng.random() < 0.2:
        data = b"\xef\xbb\xbf" + data
    file.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)


def parquet(rng: Rng, rows: list[dict[str, Any]]) -> bytes:
    """Columns of every type that may be meant, and of some that cannot."""
    png = encode(noise(5, 6), "PNG")
    values: list[Any] = [str(row.get("text"))[:4000] for row in rows]
    texts = [text.encode(errors="replace").decode() for text in values]
    half = [None if i % 2 else text for i, text in enumerate(texts)]
    columns = {
        "text": pick(
            rng,
            [
                pa.array(texts, pa.string()),
                pa.array(texts, pa.large_string()),
                pa.array(half, pa.string()),
                pa.array(texts, pa.string()).dictionary_encode(),
                pa.array(range(len(texts)), pa.int64()),
                pa.array([None] * len(texts), pa.null()),
                pa.array([[text] for text in texts], pa.list_(pa.string())),
                pa.array([{"a": text} for text in texts], pa.struct([("a", pa.string())])),
                pa.array([b"\xff" + t.encode() for t in texts], pa.binary()).view(pa.string()),
                pa.array([1.5] * len(texts), pa.float64()),
            ],
        )
    }
    if rng.random() < 0.5:
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        count = len(texts)
        columns["image"] = pick(
            rng,
            [
                pa.array([png] * count, pa.binary()),
                pa.array([{"bytes": png, "path": "a.png"}] * count, image),
                pa.array([{"bytes": None, "path": "a.png"}] * count, image),
                pa.array([None] * count, image),
                pa.array(["a.png"] * count, pa.string()),
                pa.array([{"bytes": png}] * count, pa.struct([("bytes", pa.binary())])),
                pa.array([[png]] * count, pa.list_(pa.binary())),
            ],
        )
    names = [*columns] if rng.random() < 0.9 else ["text"] * len(columns)
    table = pa.table(list(columns.values()), names=names)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=int(rng.integers(1, 5)))
    data = buffer.getvalue()
    return data[:-4] + b"PARE" if rng.random() < 0.05 else data  # as if it were encrypted


def numbered(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows that Python's own readers find in a whole file, by our numbers."""
    if file.suffix == ".parquet":
        yield from enumerate(pq.read_table(file).to_pylist(), start=1)
        return
    text = file.read_bytes().decode("utf-8-sig")
    if file.suffix == ".csv":
        reader = csv.reader(io.StringIO(text, newline="\n"))
        rows = [(row, reader.line_num) for row in reader]
        starts = [1, *(end + 1 for _, end in rows)]
        found = [(start, row) for start, (row, _) in zip(starts, rows, strict=False) if row]
        yield from ((start, dict(zip(found[0][1], row, strict=False))) for start, row in found[1:])
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if file.suffix == ".txt":
            yield number, {"text": line.removesuffix("\r")}
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, {}


def check_items(file: Path, items: list[Item]) -> str:
    """Rows that were accepted say what the file says there."""
    good = [item for item in items if item.error is None]
    for item in items:
        if item.error is not None:
            assert item.error.splitlines() == [item.error], item.error
            item.id.encode()
    expected = dict(numbered(file)) if good else {}
    for item in good:
        row = expected[int(item.where.rpartition(":")[2])]
        given = {key: value for key, value in row.items() if value not in (None, "")}
        if isinstance(image := given.get("image"), dict):
            given["image"] = image["bytes"] or image["path"]
        if isinstance(given.get("image"), str):
            given["image"] = file.parent / given["image"]
        assert item.id == str(given.pop("id", item.id))
        assert item.value == given, (item, given)
    return "equal" if len(good) == len(items) else "some refused" if good else "refused"


def fuzz_rows(rng: Rng, folder: Path, case: Case) -> str:
    """A file for the encode command, read with bad rows and without."""
    odd_folder(folder)
    file = folder / f"rows{pick(rng, ['.txt', '.jsonl', '.csv', '.parquet'])}"
    write_rows(rng, file, odd_rows(rng))
    try:
        with scan_items(file, allow_errors=True).repeated as repeated:
            repeated.seek(0)
            taken = repeated.read()
        items = [item for item in iterate_items(file) if item is not None]
    except (ValueError, OSError) as error:
        assert str(file) in one_line(error)
        return "refused"
    outcome = check_items(file, items)
    try:
        strict, _ = read_items(file)
        assert strict == items and not taken
    except ValueError as error:
        assert str(file) in one_line(error)
        assert taken or outcome != "equal"
    return outcome


def fuzz_pairs(rng: Rng, folder: Path, case: Case) -> str:
    """A file of training pairs."""
    names = pick(rng, [["sent0", "sent1"], ["sent0", "sent1", "hard_neg"], ["sent0"]])
    file = folder / f"pairs{pick(rng, ['.jsonl', '.csv', '.parquet'])}"
    rows = [{c: odd_value(rng, "text") for c in names} for _ in range(int(rng.integers(0, 5)))]
    if rng.random() < 0.6:
        rows = [{c: f"{c} {i}" for c in names} for i in range(3)]
    if file.suffix == ".parquet":
        texts = [
            {c: str(v)[:99].encode(errors="replace").decode() for c, v in r.items()} for r in rows
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(texts), buffer)
        data = buffer.getvalue()
        file.write_bytes(damaged(rng, data) if rng.random() < 0.5 else data)
    else:
        write_rows(rng, file, rows)
    try:
        pairs = load_pairs(file)
    except (ValueError, OSError) as error:
        assert str(file) in one_line(error)
        return "refused"
    expected = [row for _, row in numbered(file)]
    assert [side.column for side in pairs.sides] == names
    for side in pairs.sides:
        assert side.texts == [row[side.column] for row in expected]
    return "equal"


def fuzz_folder(rng: Rng, folder: Path, case: Case) -> str:
    """A folder, or a pattern in it, with names and entries of every kind."""
    root = folder / pick(rng, ["photos", "photos[1]", "photos*", "a b", "é", "[!a]", "x.jsonl"])
    odd_folder(root)
    for name in ("[a].png", "a\nb.png", " .png", ".hidden.png", "c.PNG", "*.png", "d.webp.txt"):
        if rng.random() < 0.4:
            noise(4, 5).save(root / name, "PNG")
    if rng.random() < 0.3:
        noise(4, 5).save(os.path.join(os.fsencode(root), b"caf\xe9.png"), "PNG")
    pattern = pick(rng, [None, None, "*.png", "[ab].*", "**", "*.jsonl", "[[]a].png"])
    source = root if pattern is None else root / pattern
    try:
        items = [item for item in iterate_items(source) if item is not None]
        scan_items(source, allow_errors=True)
    except (ValueError, OSError) as error:
        one_line(error)
        return "refused"
    names = sorted(Path(item.id).name for item in items)
    here = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    if pattern is None:
        files = [name for name in here if os.path.isfile(root / name)]
        wanted = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        wanted = [name.encode(errors="backslashreplace").decode() for name in wanted]
        assert names == sorted(wanted)
    assert items
    for item in items:
        if item.error is not None:
            assert item.error.splitlines() == [item.error]
            item.id.encode()
        else:
            assert os.path.isfile(item.value["image"]) and item.id.encode()
    return "some refused" if any(item.error for item in items) else "equal"
