"""Prompts: the published bytes, one-pass filling, the choice of template, refused texts."""

import re
import time

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from e5v_jax.prompts import (
    PLAIN,
    PROMPTS,
    TEMPLATES,
    PromptChoice,
    TextError,
    check_text,
    choose_prompt,
    detect_template,
    fill,
    fill_released,
    forbidden_pattern,
    slots,
)

VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)
LLAMA3_HEAD = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA3_TAIL = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"


def tokenizer_with(*special: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", chat_template=chat_template
    )


# --- the strings themselves, written out once more as a reader of the authors' code sees them


@pytest.mark.parametrize(
    ("template", "prompt", "values", "expected"),
    [
        (
            "llama3",
            "text",
            {"text": "A dog sits."},
            f"{LLAMA3_HEAD}A dog sits.\nSummary above sentence in one word: {LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "image",
            {},
            f"{LLAMA3_HEAD}<image>\nSummary above image in one word: {LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "sts",
            {"text": "A dog sits."},
            f"{LLAMA3_HEAD} A dog sits.\nSummary above sentence in one word:{LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "fashioniq_gallery",
            {"type": "shirt"},
            f"{LLAMA3_HEAD}<image>\n Describe this shirt in one word based on its style:"
            f"{LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "fashioniq_query",
            {"type": "dress", "text": "is red, has sleeves"},
            f"{LLAMA3_HEAD}<image> change the style of this dress to is red, has sleeves\n"
            f" Desribe this modified dress in one word based on its style:{LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "cirr_gallery",
            {},
            f"{LLAMA3_HEAD}<image>\n Describe this image in one word:{LLAMA3_TAIL}",
        ),
        (
            "llama3",
            "cirr_query",
            {"text": "two dogs"},
            f'{LLAMA3_HEAD}<image>Modify this image with "two dogs", desribe modified image in one '
            f"word:{LLAMA3_TAIL}",
        ),
        # Mistral: one space before [/INST], whether or not the prompt ends in one
        ("mistral", "image", {}, "[INST] <image>\nSummary above image in one word: [/INST]"),
        (
            "mistral",
            "text",
            {"text": "hi"},
            "[INST] hi\nSummary above sentence in one word: [/INST]",
        ),
        (
            "mistral",
            "sts",
            {"text": "hi"},
            "[INST]  hi\nSummary above sentence in one word: [/INST]",
        ),
        (
            "mistral",
            "cirr_gallery",
            {},
            "[INST] <image>\n Describe this image in one word: [/INST]",
        ),
        (
            "phi3",
            "image",
            {},
            "<|user|>\n<image>\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        ),
        (
            "chatml",
            "text",
            {"text": "hi"},
            "<|im_start|>user\nhi\nSummary above sentence in one word: <|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "vicuna",
            "image",
            {},
            VICUNA_SYSTEM + "USER: <image>\nSummary above image in one word: ASSISTANT:",
        ),
    ],
)
def test_filled_prompts_are_byte_exact(
    template: str, prompt: str, values: dict[str, str], expected: str
) -> None:
    assert fill(PROMPTS[prompt], template=TEMPLATES[template], **values) == expected


def test_every_template_and_prompt_is_covered_above() -> None:
    assert set(TEMPLATES) == {"llama3", "mistral", "phi3", "chatml", "vicuna"}
    assert PROMPTS["text_image"] == PROMPTS["cirr_query"]
    assert set(PROMPTS) == {
        *("text", "image", "sts", "text_image", "plain"),
        *("fashioniq_gallery", "fashioniq_query", "cirr_gallery", "cirr_query"),
    }


def test_slots() -> None:
    found = {name: set(slots(prompt)) for name, prompt in PROMPTS.items()}
    assert found == {
        "text": {"text"},
        "image": {"image"},
        "sts": {"text"},
        "text_image": {"text", "image"},
        "fashioniq_gallery": {"image", "type"},
        "fashioniq_query": {"text", "image", "type"},
        "cirr_gallery": {"image"},
        "cirr_query": {"text", "image"},
        "plain": {"text"},
    }


# --- filling


@pytest.mark.parametrize(
    "text", ["{}", "<sent>", "{type}", "{0} {text} %s \\1 \\g<0>", "a {} <sent>"]
)
def test_text_is_never_filled_again(text: str) -> None:
    filled = fill("<sent> / {type} / <sent>", template="[{}]", text=text, type="<sent>{}")
    assert filled == f"[{text} / <sent>{{}} / {text}]"
    assert fill_released("<sent>", template="[{}]", text=text) == f"[{text}]"


def test_user_text_keeps_its_spaces() -> None:
    assert fill("<sent>", template="[INST] {} [/INST]", text=" hi ") == "[INST]  hi  [/INST]"


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ("text", {}, "needs a text"),
        ("image", {"text": "hi"}, "no place for the text 'hi'"),
        ("image", {"text": ""}, "no place for the text"),
        ("fashioniq_gallery", {}, "needs a type"),
        ("text", {"text": "hi", "type": "dress"}, "no place for the type 'dress'"),
    ],
)
def test_slots_and_values_must_agree(prompt: str, values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(PROMPTS[prompt], template=TEMPLATES["llama3"], **values)


@pytest.mark.parametrize("template", ["llama3", "", "{} {}"])
def test_template_needs_exactly_one_slot(template: str) -> None:
    with pytest.raises(ValueError, match="expected exactly one"):
        fill("<sent>", template=template, text="hi")


def test_released_variant_breaks_the_template_as_the_authors_did() -> None:
    # underscores of the sentence stay: the authors replace before they put the sentence in
    filled = fill_released(PLAIN, template=TEMPLATES["llama3"], text="A snake_case dog.")
    assert filled == (
        "<|start header id|>user<|end header id|>\n\nA snake_case dog.\n"
        "Summary above sentence in one word:"
        "<|eot id|><|start header id|>assistant<|end header id|>"
    )


# --- choosing the template


@pytest.mark.parametrize(
    ("special", "model_type", "chat_template", "expected"),
    [
        (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama", None, "llama3"),
        (["<|im_start|>", "<|im_end|>"], "llama", None, "chatml"),
        (["<|im_start|>", "<|im_end|>"], "mistral", None, "chatml"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"], "qwen3", None, "chatml"),
        (["<|user|>", "<|end|>", "<|assistant|>"], "phi3", None, "phi3"),
        (["[INST]", "[/INST]"], "llama", None, "mistral"),
        (["<s>", "</s>"], "mistral", None, "mistral"),
        (["<s>", "</s>"], "llama", "{{ m['role'].upper() }}: ... ASSISTANT:", "vicuna"),
    ],
)
def test_detect_template(
    special: list[str], model_type: str, chat_template: str | None, expected: str
) -> None:
    tokenizer = tokenizer_with(*special, chat_template=chat_template)
    assert detect_template(tokenizer, model_type) == expected
    assert detect_template(tokenizer, model_type, override="phi3") == "phi3"


@pytest.mark.parametrize(
    "special",
    [
        ["<s>", "</s>"],  # Llama 2, chat or Vicuna or neither
        ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"],
    ],
)
def test_detect_template_says_when_it_cannot_tell(special: list[str]) -> None:
    with pytest.raises(ValueError, match="name one of llama3, mistral, phi3, chatml, vicuna"):
        detect_template(tokenizer_with(*special), "llama")


def test_detect_template_refuses_an_unknown_override() -> None:
    with pytest.raises(ValueError, match="'llama-3': expected one of llama3, mistral"):
        detect_template(tokenizer_with("<|im_start|>"), "llama", override="llama-3")


def test_detect_template_of_the_real_tokenizer(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    assert detect_template(llama3_tokenizer, "llama") == "llama3"


# --- refused texts


@pytest.mark.parametrize(
    "token", ["<image>", "<|im_start|>", "<|im_end|>", "<unk>", "[/INST]", "[INST]"]
)
def test_special_strings_are_refused_by_name(token: str) -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>")
    forbidden = forbidden_pattern(tokenizer, TEMPLATES["mistral"])
    for text in (token, f"a dog{token}", f"{token} a dog", f"two\nlines{token}{token}"):
        with pytest.raises(TextError, match=re.escape(repr(token))) as caught:
            check_text(text, forbidden)
        assert "\n" not in str(caught.value)


def test_every_control_string_of_a_template_is_refused_whatever_the_tokenizer() -> None:
    tokenizer = tokenizer_with()
    expected = {
        "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "mistral": ["[INST]", "[/INST]"],
        "phi3": ["<|user|>", "<|end|>", "<|assistant|>"],
        "chatml": ["<|im_start|>", "<|im_end|>"],
        "vicuna": [],
    }
    for name, tokens in expected.items():
        forbidden = forbidden_pattern(tokenizer, TEMPLATES[name])
        for token in [*tokens, "<image>", "<unk>"]:
            with pytest.raises(TextError, match=re.escape(token)):
                check_text(f"a {token} b", forbidden)


@pytest.mark.parametrize(
    "text",
    [
        "<sent> {} {type} %s",
        "< image > <Image> <image <|im_start |im_end|>",
        "a < b and c > d | [inst] USER: ASSISTANT:",
        "Füße, 犬, 🐕, \u200d\x00",
    ],
)
def test_ordinary_text_passes(text: str) -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>")
    check_text(text, forbidden_pattern(tokenizer, TEMPLATES["chatml"]))


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000\xa0"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(TextError, match="empty"):
        check_text(text, forbidden_pattern(tokenizer_with(), TEMPLATES["chatml"]))


def test_a_prompt_with_half_a_character_is_refused_before_any_text() -> None:
    for make in (PromptChoice, lambda prompt: choose_prompt(None, prompt)):
        with pytest.raises(
            ValueError, match=r"^prompt '<sent>\\udce9': not Unicode at character 6$"
        ):
            make("<sent>\udce9")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TextError, match=r"'\\ud83d'") as caught:
        check_text("a dog \ud83d", forbidden_pattern(tokenizer_with(), TEMPLATES["chatml"]))
    str(caught.value).encode()  # printable


def test_all_special_tokens_of_the_real_tokenizer_are_refused(
    llama3_tokenizer: PreTrainedTokenizerFast,
) -> None:
    forbidden = forbidden_pattern(llama3_tokenizer, TEMPLATES["llama3"])
    special = list(llama3_tokenizer.get_added_vocab())
    assert len(special) == 257
    for token in special:
        with pytest.raises(TextError, match=re.escape(repr(token))):
            check_text(f"x{token}y", forbidden)


def test_checking_is_fast_with_a_thousand_special_tokens() -> None:
    tokenizer = tokenizer_with(
        *(f"[control_{i}]" for i in range(700)), *map("<|{}|>".format, range(300))
    )
    forbidden = forbidden_pattern(tokenizer, TEMPLATES["mistral"])
    text = "A group of people are standing in front of a large building with a < sign in the city."
    start = time.perf_counter()
    for _ in range(10_000):
        check_text(text, forbidden)
    assert time.perf_counter() - start < 0.5  # 0.02 s; a flat alternation takes 1.5 s
