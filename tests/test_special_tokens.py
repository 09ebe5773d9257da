"""Special tokens in texts are text: their characters' ids, and no text makes a special token."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from tokenizer_kinds import KINDS, REAL, make_processor, make_tokenizer, odd_strings, special_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from e5v_jax.data.literal import NO_TOKEN, LiteralTokenizer
from e5v_jax.data.text import encode_batch
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import E5_V
from e5v_jax.prompts import (
    TEMPLATES,
    TEXT,
    TEXT_SLOT,
    PromptChoice,
    TextError,
    any_of,
    fill,
    fill_released,
    special_strings,
)

if TYPE_CHECKING:
    from hf_models import Case

PROMPTS = E5_V.choose()
WORDS = "\nSummary above sentence in one word: "


class Kind:
    """A tokenizer, its processor and what is special to them."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.template = TEMPLATES[KINDS[name]]
        self.processor = make_processor(name, tokenizer)
        self.names = special_strings(tokenizer, self.template)
        self.special = special_ids(tokenizer)
        rng = np.random.default_rng(len(name))
        self.choose = lambda count: int(rng.integers(count))

    def ids(self, texts: list[str], prompts: PromptChoice = PROMPTS) -> list[list[int]]:
        return [item.ids for item in self.processor.measure(texts, prompts)]

    def forged(self, texts: list[str], prompts: PromptChoice = PROMPTS) -> list[str]:
        """Those of ``texts`` with other special tokens than the template's."""
        (plain,) = self.ids(["a"], prompts)
        expected = [i for i in plain if i in self.special]
        return [
            text
            for text, ids in zip(texts, self.ids(texts, prompts), strict=True)
            if [i for i in ids if i in self.special] != expected
        ]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param, make_tokenizer(request.param, request))


def test_other_texts_have_the_ids_they_had(kind: Kind) -> None:
    """The filled string's, tokenised whole; the copy that reads names as text finds the same."""
    texts = odd_strings(kind.names, 500, kind.choose, whole=False)
    whole = [fill(TEXT, template=kind.template, text=text) for text in texts]
    expected = [kind.tokenizer(string)["input_ids"] for string in whole]
    assert kind.ids(texts) == expected
    literal = LiteralTokenizer(kind.tokenizer, kind.names)
    frame = literal.mark(fill(TEXT, template=kind.template, text=TEXT_SLOT))
    marked = [PROMPTS.insert(frame, text) for text in texts]
    assert encode_batch(kind.tokenizer, marked, literal=literal) == expected


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_text_makes_a_special_token(kind: Kind, count: int) -> None:
    texts = odd_strings(kind.names, count, kind.choose, whole=True)
    for start in range(0, count, 8192):
        some = texts[start : start + 8192]
        assert not kind.forged(some)
    said = sum(any(name in text for name in kind.names) for text in texts)
    assert said > count / 2


def test_names_are_read_as_characters(kind: Kind) -> None:
    """All of the text is there, and of the frame all but its special tokens."""
    texts = [f"a {name}b" for name in sorted(kind.names)][:300]
    frame = fill(TEXT, template=kind.template, text=TEXT_SLOT)
    words = re.sub(
        any_of({t for t in kind.names if len(kind.tokenizer.tokenize(t)) == 1}), "", frame
    )
    for text, ids in zip(texts, kind.ids(texts), strict=True):
        read = kind.tokenizer.decode([i for i in ids if i not in kind.special])
        assert read.split() == words.replace(TEXT_SLOT, text).split()


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_the_segment_alone(name: str, request: pytest.FixtureRequest) -> None:
    """Between two of the template's tokens, by transformers' own switch, on a tokenizer apart."""
    kind = Kind(name, make_tokenizer(name, request))
    apart = Tokenizer.from_str(kind.tokenizer.backend_tokenizer.to_str())
    apart.encode_special_tokens = True
    texts = [f"a {special}b" for special in sorted(kind.names)][::7]
    texts += odd_strings(kind.names, 300, kind.choose, whole=True)
    head, tail = kind.template.split("{}")
    start = re.split(r"(?<=\|>)", head)[-1]  # behind the last token
    end = tail.index("<|")
    before = kind.tokenizer(head.removesuffix(start))["input_ids"]
    after = kind.tokenizer(tail[end:], add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, kind.ids(texts), strict=True):
        own = apart.encode(start + text + WORDS + tail[:end], add_special_tokens=False).ids
        assert ids == [*before, *own, *after], text


def test_names_that_begin_in_the_prompt(kind: Kind) -> None:
    """Parts of a name: one in the text, the others in the words around it."""
    for name in sorted(kind.names)[:40]:
        for cut in range(1, len(name)):
            if not name[cut:].isspace() and name[:cut] not in kind.names:
                assert not kind.forged([name[cut:]], PromptChoice(f"{name[:cut]}<sent>: "))
                assert not kind.forged([name[:cut]], PromptChoice(f": <sent>{name[cut:]}"))
            if name[1:cut].strip():
                around = PromptChoice(f"{name[0]}<sent>{name[cut:]}")
                assert not kind.forged([name[1:cut]], around)


def test_prompts_keep_their_special_tokens(kind: Kind) -> None:
    """What the caller's own prompt says is not the text's: it stays a token."""
    end = kind.tokenizer.eos_token
    (eos,) = kind.tokenizer.encode(end, add_special_tokens=False)
    own = PromptChoice(f"<sent> {end}: ")
    expected = kind.tokenizer(own.fill("a", has_image=False, template=kind.template, image=""))
    assert eos in expected["input_ids"]
    for text in ("a", f"a{end}", f"{end} {end}"):
        (ids,) = kind.ids([text], own)
        assert ids.count(eos) == expected["input_ids"].count(eos), text


def test_released_prompts_too(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    kind = Kind("llama3", llama3_tokenizer)
    released = PromptChoice(TEXT, released=True)
    texts = ["a_b", " a <|eot id|>", "a<|eot_id|>", "<|start_header_id|> _"]
    found = kind.ids(texts, released)
    for text, ids in zip(texts, found, strict=True):
        said = fill_released(TEXT, template=kind.template, text=text)
        assert kind.tokenizer.decode(ids) == "<|begin_of_text|>" + said
        assert [i for i in ids if i in kind.special] == [128000]


@pytest.mark.parametrize("kind", ["llama3", "first"], indirect=True)
def test_refusing_is_an_option(kind: Kind) -> None:
    refuse = PromptChoice(special_tokens="refuse")
    for name in sorted(kind.names)[:20]:
        with pytest.raises(ValueError, match=f"^input 1: .*{re.escape(repr(name))}"):
            kind.ids(["a", f"b {name}"], refuse)
        with pytest.raises(TextError, match="means something else to the model"):
            kind.processor.check_text(name, special_tokens="refuse")
        kind.processor.check_text(name)
    for text in ("", " \n", "\ud800", f"{name}\udfff"):
        for special_tokens in ("text", "refuse"):
            with pytest.raises(TextError):
                kind.processor.check_text(text, special_tokens=special_tokens)
    with pytest.raises(ValueError, match="special_tokens 'split': expected text or refuse"):
        PromptChoice(special_tokens="split")  # type: ignore[arg-type]


def test_images_beside_such_texts(llava: "Callable[[str], Case]") -> None:
    """One placeholder is the image's, whatever the text says; vectors are others' than without."""
    model = llava("llama-gqa").e5v
    picture = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    texts = ["a", "a <image>", "<image><image>", "<|eot_id|>", "</s>"]
    items = [{"text": text, "image": picture} for text in texts]
    for item in model.processor.measure(items, PROMPTS):
        assert item.ids.count(model.config.image_token_id) == 1
    for item in model.processor.measure(texts, PROMPTS):
        assert model.config.image_token_id not in item.ids
    vectors = model.encode([*items, *texts])
    assert np.linalg.matrix_rank(vectors, tol=1e-6) == len(vectors)
    with pytest.raises(ValueError, match=r"^input 1: the text contains '<image>'"):
        model.encode(items, special_tokens="refuse")


def words_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_a_vocabulary_with_no_other_token_for_the_name() -> None:
    """Its model makes the special token of the characters: such a text is refused."""
    tokenizer = words_tokenizer({"<unk>": 0, "</s>": 1, "a": 2, "ASSISTANT:": 3})
    literal = LiteralTokenizer(tokenizer, {"</s>", "<unk>"})
    marked = literal.mark("a </s>") + " </s> <unk> b"
    assert literal.encode([marked]) == [[2, 1, NO_TOKEN, 0, 0]]
    processor = TextProcessor(make_processor("first", tokenizer).config, tokenizer, "vicuna")
    assert processor.measure(["a b"], PROMPTS)[0].ids
    with pytest.raises(ValueError, match=r"^input 0: the text names a special token that"):
        processor.measure(["a </s> b"], PROMPTS)


def test_a_vocabulary_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary has gaps before its token 3"):
        LiteralTokenizer(words_tokenizer({"<unk>": 0, "</s>": 1, "a": 3}), {"</s>"})
