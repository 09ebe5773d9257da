"""Texts that are too long: refused by naming the option, or cut inside the prompt."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from tokenizer_kinds import KINDS, make_processor, make_tokenizer, odd_strings, special_ids

from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.e5v import E5V
from e5v_jax.presets import E5_V
from e5v_jax.prompts import TEMPLATES, TEXT, PromptChoice, fill, special_strings

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_models import Case

PLAIN = E5_V.choose()
LONG = "word " * 600


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_is_the_longest_text_that_fits(
    name: str, truncate: Any, request: pytest.FixtureRequest
) -> None:
    """Its ids are those of a part of the text as it stands there, names of special tokens too."""
    tokenizer = make_tokenizer(name, request)
    processor, template = make_processor(name, tokenizer), TEMPLATES[KINDS[name]]
    names = special_strings(tokenizer, template)
    rng = np.random.default_rng(len(name))
    pieces = odd_strings(names, 30, lambda n: int(rng.integers(n)), whole=True)
    texts = ["x " + "".join(pieces[i : i + 3]) + " y" for i in range(0, 30, 3)]
    plain = processor.measure(["a"], PLAIN)[0].ids
    special = special_ids(tokenizer)
    limits = (len(plain) + 5, len(plain) + 30)
    found = [
        processor.measure(texts, PromptChoice(max_length=limit, truncate=truncate))
        for limit in limits
    ]
    for text, whole, *items in zip(texts, processor.measure(texts, PLAIN), *found, strict=True):
        # every part that may be meant, as the library itself reads it
        parts = [text[:i] if truncate == "end" else text[i:] for i in range(1, len(text))]
        parts = [part for part in parts if part.strip()]
        same = [part.ids for part in processor.measure(parts, PLAIN)]
        for limit, item in zip(limits, items, strict=True):
            assert item.length == len(item.ids) <= limit
            assert item.truncated == (whole.length > limit)
            if not item.truncated:
                assert item.ids == whole.ids
                continue
            assert item.ids in same
            assert [i for i in item.ids if i in special] == [i for i in plain if i in special]
            # none is longer by much: a character may be several tokens
            assert max(len(ids) for ids in same if len(ids) <= limit) - len(item.ids) <= 4
    cut = [sum(item.truncated for item in items) for items in found]
    assert cut[0] == len(texts) and cut[1] > 1


def test_the_prompt_is_never_cut(request: pytest.FixtureRequest) -> None:
    """Nor any character lost between it and the text."""
    tokenizer = make_tokenizer("smollm2", request)
    processor = make_processor("smollm2", tokenizer)
    text = " ".join(f"w{i}" for i in range(500))
    for truncate in ("end", "start"):
        prompts = PromptChoice(max_length=60, truncate=truncate)  # type: ignore[arg-type]
        (item,) = processor.measure([text], prompts)
        read = tokenizer.decode(item.ids)
        head, tail = fill(TEXT, template=TEMPLATES["chatml"], text="{}").split("{}")
        assert read.startswith(head) and read.endswith(tail)
        left = read.removeprefix(head).removesuffix(tail)
        assert left == (text[: len(left)] if truncate == "end" else text[-len(left) :])
        assert len(left) > 50


@pytest.mark.parametrize(
    ("options", "item", "message"),
    [
        ({}, LONG, 'at most 2048: shorten the text, or let truncate="end" or "start" cut it'),
        ({"max_length": 80}, "word " * 20, "tokens, max_length is 80: shorten the text, or let"),
        ({"max_length": 40, "truncate": "end"}, "word", "what stands around the text leaves no"),
        ({"max_length": 70, "truncate": "end"}, " " * 99 + "word", "leaves no room for it"),
        ({"max_length": 80}, Path("a.png"), "max_length is 80: an image is never cut, take a"),
        ({"max_length": 80, "truncate": "end"}, Path("a.png"), "an image is never cut"),
    ],
)
def test_what_does_not_fit_is_named(
    options: dict[str, Any],
    item: Any,
    message: str,
    llava: "Callable[[str], Case]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 30)).save("a.png")
    model = llava("llama-gqa").e5v
    with pytest.raises(ValueError, match=r"^input 0: ") as caught:
        model.encode([item], **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_cannot_be(llava: "Callable[[str], Case]") -> None:
    model = llava("llama-gqa").e5v
    for options, message in (
        ({"truncate": "middle"}, "truncate 'middle': expected none or end or start"),
        ({"max_length": 0}, "max_length 0: expected at least 1"),
        ({"max_length": 2049}, "max_length 2049: the model takes at most 2048"),
        ({"special_tokens": "x"}, "special_tokens 'x': expected text or refuse"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            model.encode(["a"], **options)  # type: ignore[arg-type]


def test_vectors_are_those_of_the_shorter_texts(llava: "Callable[[str], Case]") -> None:
    """Bytes are tokens here; the positions of those cut are told, of equal ones too."""
    model = llava("llama-gqa").e5v
    room = 100 - len(model.processor.measure(["a"], PLAIN)[0].ids) + 1
    text = "".join(chr(97 + i % 26) for i in range(300))
    cut: list[int] = []
    options: dict[str, Any] = {"max_length": 100, "on_truncate": cut.append}
    found = model.encode(["a", text, "b", text, text[:room]], truncate="end", **options)
    expected = model.encode(["a", text[:room], "b"])
    np.testing.assert_allclose(found, expected[[0, 1, 2, 1, 1]], atol=1e-6)
    assert sorted(cut) == [1, 3]
    last = model.encode_query([text], truncate="start", **options)
    np.testing.assert_allclose(last[0], model.encode(text[-room:]), atol=1e-6)


def test_an_image_counts_and_stays(llava: "Callable[[str], Case]") -> None:
    model = llava("llama-gqa").e5v
    picture = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    (short,) = model.processor.measure([{"text": "abc", "image": picture}], PLAIN)
    prompts = PromptChoice(max_length=short.length, truncate="end")
    (item,) = model.processor.measure([{"text": "abcdef", "image": picture}], prompts)
    assert (item.ids, item.length, item.truncated) == (short.ids, short.length, True)


def test_command(
    llava: "Callable[[str], Case]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows that were cut are counted and listed, by a resumed run too; failed ones are not."""
    case = llava("llama-gqa")
    monkeypatch.setattr(E5V, "from_pretrained", lambda *_, **__: case.e5v)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            encode(["--model", str(case.folder), *argv])
        return int(exit_.value.code or 0), *capsys.readouterr()

    rows = ["a", "long " * 30, "b </s>", "", "c", "longer " * 30, "d"]
    Path("a.txt").write_text("\n".join(rows))
    bulk = ["--input", "a.txt", "--output", "out", "--shard-size", "2", "--on-error", "skip"]
    bulk += ["--max-length", "100", "--truncate", "end"]
    code, out, err = run(*bulk)
    assert code == 0, err
    result = {"rows": 7, "embedded": 6, "failed": 1, "truncated": 2, "shards": 4}
    lines = "2 with their text cut to fit: see out/truncated.jsonl\n"
    for _ in range(2):  # whole, and then with one shard to make
        manifest = json.loads(Path("out/manifest.json").read_text())
        assert manifest["result"] == result
        assert [manifest[k] for k in ("max_length", "truncate")] == [100, "end"]
        assert lines in out
        told = [json.loads(line) for line in Path("out/truncated.jsonl").read_text().splitlines()]
        assert [row["where"] for row in told] == ["a.txt:2", "a.txt:6"]
        Path("out/shard-00002.parquet").unlink()
        code, out, err = run(*bulk)
        assert code == 0, err
    code, _, err = run(*bulk[:-1], "start")
    assert code == 1 and "begun with truncate 'end', this run has 'start'" in err
    code, _, err = run("--text", "a", "--text", rows[1], "--max-length", "100", "--truncate", "end")
    assert code == 0 and "1 of 2 inputs: text cut to fit\n" in err
    code, _, err = run("--text", "a", "--text", "b", "--max-length", "9999")
    assert code == 1 and err == "error: max_length 9999: the model takes at most 2048\n"
    code, _, err = run("--text", "a", "--text", "b", "--max-length", "0")
    assert code == 2 and "--max-length: 0, expected at least 1" in err
