"""What is said to the model: chat templates, instructions, and filling them with user text.

Sources: the authors' retrieval.py, eval_sts.py, ft_llm.py and run.sh (repository kongds/E5-V). The
strings are byte-exact, misspellings included: a changed byte is another embedding.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # which takes a second: what only names presets does not wait for it
    from transformers import PreTrainedTokenizerBase

# Chat templates: the instruction goes where `{}` stands.
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
)
MISTRAL = "[INST] {} [/INST]"
PHI3 = "<|user|>\n{}<|end|>\n<|assistant|>\n"
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# The authors ran no Vicuna: this is its format in transformers' LLaVA-NeXT documentation (v4.46).
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: {} ASSISTANT:"
)
TEMPLATES = dict(llama3=LLAMA3, mistral=MISTRAL, phi3=PHI3, chatml=CHATML, vicuna=VICUNA)

# Prompts: `<sent>` is the user's text, `{type}` a kind of garment, `<image>` the image itself.
TEXT = "<sent>\nSummary above sentence in one word: "
IMAGE = "<image>\nSummary above image in one word: "
STS = " <sent>\nSummary above sentence in one word:"
FASHIONIQ_GALLERY = "<image>\n Describe this {type} in one word based on its style:"
FASHIONIQ_QUERY = (
    "<image> change the style of this {type} to <sent>\n"
    " Desribe this modified {type} in one word based on its style:"
)
CIRR_GALLERY = "<image>\n Describe this image in one word:"
CIRR_QUERY = '<image>Modify this image with "<sent>", desribe modified image in one word:'
PLAIN = "<sent>\nSummary above sentence in one word:"  # run.sh: TEXT without its last space
PROMPTS = {
    "text": TEXT,
    "image": IMAGE,
    "sts": STS,
    "text_image": CIRR_QUERY,  # the authors' one instruction for any image with any text
    "fashioniq_gallery": FASHIONIQ_GALLERY,
    "fashioniq_query": FASHIONIQ_QUERY,
    "cirr_gallery": CIRR_GALLERY,
    "cirr_query": CIRR_QUERY,
    "plain": PLAIN,
}

IMAGE_PLACEHOLDER = "<image>"
_SLOTS = {
    "<sent>": "text",
    IMAGE_PLACEHOLDER: "image",
    "{type}": "type",
    "<instruction>": "instruction",
}
_SLOT = re.compile("|".join(map(re.escape, _SLOTS)))
_CONTROL = re.compile(r"<\|[^|]+\|>|\[/?INST\]")
_SURROGATE = r"[\ud800-\udfff]"
UNREADABLE = re.compile(_SURROGATE)
"""What :func:`check_text` refuses in any text."""
TEXT_SLOT = "\ud800"
"""What stands for a text in a frame (:meth:`PromptChoice.fill` with it): no text can hold it."""

SpecialTokens = Literal["text", "refuse"]
"""What a special token's name in a text is: its characters, or the reason to refuse the text."""
Truncate = Literal["none", "end", "start"]
"""Where a text is cut that is too long: nowhere, as it is refused; or what is cut off."""


class TextError(ValueError):
    """A text that cannot be embedded; the message says why, the caller adds file and row."""


def slots(prompt: str) -> frozenset[str]:
    """What ``prompt`` asks for: any of "text", "image", "type" and "instruction"."""
    return frozenset(_SLOTS[slot] for slot in _SLOT.findall(prompt))


@dataclass(frozen=True)
class Prompts:
    """What is said with a text, with an image, and with a text and an image."""

    text: str
    image: str
    text_image: str | None
    """None: text and image are embedded apart, and their vectors are added."""


E5V_PROMPTS = Prompts(TEXT, IMAGE, CIRR_QUERY)


@dataclass(frozen=True)
class PromptChoice:
    """Which prompt each input of a call gets, by kind or one for all, and how texts go into it."""

    prompt: str | None = None
    """One for all; None takes that of the input's kind from ``prompts``."""
    released: bool = False
    """Fill it as the authors' training script does (:func:`fill_released`); for texts only."""
    prompts: Prompts = E5V_PROMPTS
    instruction: str | None = None
    """What stands at ``<instruction>``; None takes ``default_instruction``, where there is one."""
    default_instruction: str | None = None
    special_tokens: SpecialTokens = "text"
    max_length: int | None = None
    """Most tokens of an input, its prompt, template and image included; None: what fits."""
    truncate: Truncate = "none"

    def __post_init__(self) -> None:
        """Raise ValueError on a bad option, or a prompt with a lone surrogate, which is no text."""
        choices = {"special_tokens": SpecialTokens, "truncate": Truncate}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name} {value!r}: expected {' or '.join(get_args(known))}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length {self.max_length}: expected at least 1")
        if self.prompt is not None and (half := re.search(_SURROGATE, self.prompt)):
            raise ValueError(f"prompt {self.prompt!a}: not Unicode at character {half.start()}")

    @property
    def adds(self) -> bool:
        """Whether an input with text and image is embedded as two, whose vectors are added."""
        return self.prompt is None and self.prompts.text_image is None

    def fill(self, text: str | None, *, has_image: bool, template: str, image: str) -> str:
        """The string to tokenise for one input; ``image`` is what stands for an image in it.

        Raises ValueError: the prompt has no place for what the input has, or lacks it.
        """
        prompt = self.prompt
        if prompt is None:
            kind = "text" if not has_image else "image" if text is None else "text_image"
            prompt = getattr(self.prompts, kind)
        if prompt is None:
            raise ValueError("the prompts have none for a text with an image: embed them apart")
        if has_image != ("image" in slots(prompt)):
            have, want = ("an image", "none") if has_image else ("no image", "one")
            raise ValueError(f"the input has {have}, the prompt {prompt!r} takes {want}")
        if self.released:
            return fill_released(prompt, template=template, text=text or "")
        instruction = self.instruction
        if instruction is None and "instruction" in slots(template + prompt):
            instruction = self.default_instruction
        return fill(prompt, template=template, text=text, image=image, instruction=instruction)

    def insert(self, frame: str, text: str) -> str:
        """What :meth:`fill` makes of ``text``, from what it made of :data:`TEXT_SLOT`."""
        filled = frame.replace(TEXT_SLOT, text)
        return filled.strip() if self.released else filled


def choose_prompt(prompt_name: str | None, prompt: str | None) -> PromptChoice:
    """The prompt of a call: by name, by text with ``<sent>``/``<image>`` slots, or by item kind.

    Raises ValueError: both given, an unknown name, or a text without any slot or with ``{type}``.
    """
    if prompt_name is not None and prompt is not None:
        raise ValueError("give prompt_name or prompt, not both")
    if prompt_name is not None and prompt_name not in PROMPTS:
        names = sorted({*PROMPTS, "query", "document"})  # the last two are a preset's
        raise ValueError(f"prompt_name {prompt_name!r}: expected one of {names}")
    prompt = prompt if prompt_name is None else PROMPTS[prompt_name]
    if prompt is not None and not slots(prompt) & {"text", "image"}:
        raise ValueError(f"prompt {prompt!r} has no slot: put <sent> for the text, <image> or both")
    if prompt is not None and "type" in slots(prompt):
        raise ValueError(
            f"prompt {prompt!r}: put a kind of garment for {{type}}, give it as prompt"
        )
    return PromptChoice(prompt)


def fill(
    prompt: str,
    *,
    template: str,
    text: str | None = None,
    type: str | None = None,
    image: str = IMAGE_PLACEHOLDER,
    instruction: str | None = None,
) -> str:
    """The string to tokenise: ``prompt`` inside ``template`` with the slots of both filled.

    ``image`` is what a model family puts where an image goes. Filling is one pass: ``<sent>``,
    ``{type}`` or ``{}`` inside ``text`` and ``instruction``, which must have passed
    :func:`check_text`, stay.

    Raises ValueError: a slot without value, a value without slot, a template without one ``{}``.
    """
    if (count := template.count("{}")) != 1:
        raise ValueError(f"template {template!r} has {count} slots {{}}, expected exactly one")
    head, tail = template.split("{}")
    if prompt.endswith(" ") and tail.startswith(" "):
        tail = tail[1:]  # the authors write "word: [/INST]", with one space
    values = {"text": text, "type": type, "image": image, "instruction": instruction}
    whole = head + prompt + tail
    wanted = slots(whole)
    for name in ("text", "type", "instruction"):
        if name in wanted and values[name] is None:
            article = "an" if name == "instruction" else "a"
            raise ValueError(f"the prompt {prompt!r} needs {article} {name}, but none was given")
        if name not in wanted and values[name] is not None:
            raise ValueError(f"the prompt {prompt!r} has no place for the {name} {values[name]!r}")
    return _SLOT.sub(lambda match: values[_SLOTS[match.group()]] or "", whole)


def fill_released(prompt: str, *, template: str, text: str) -> str:
    """:func:`fill` as the authors' training script does it; its prompt was ``PLAIN``.

    ft_llm.py replaces ``_`` by a space in the template, before it puts the sentence in, and strips
    the result. ``<|start_header_id|>`` becomes the plain text ``<|start header id|>`` and the
    pooled token of the Llama-3 template a literal ``>``. Raises ValueError: as :func:`fill`.
    """
    filled = fill(prompt, template=template, text="<sent>", image="")
    return filled.replace("_", " ").replace("<sent>", text).strip()


def detect_template(
    tokenizer: "PreTrainedTokenizerBase", model_type: str, *, override: str | None = None
) -> str:
    """The name in :data:`TEMPLATES` of the template that a checkpoint was trained on.

    Told from the tokenizer's chat tokens; without any, from ``model_type`` (of the text model, as
    in ``config.json``) or a Vicuna chat template. ``override`` is checked and returned. Raises
    ValueError: an unknown ``override``, or it cannot be told; lists the names.
    """
    names = ", ".join(TEMPLATES)
    if override in TEMPLATES:
        return override
    if override is not None:
        raise ValueError(f"unknown template {override!r}: expected one of {names}")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # only a model trained on a template has its tokens; without them it is plain text
    signatures = {name: _CONTROL.findall(template) for name, template in TEMPLATES.items()}
    matches = [name for name, tokens in signatures.items() if tokens and added.issuperset(tokens)]
    if not matches and model_type == "mistral":
        matches = ["mistral"]  # before v0.3, [INST] is not a token of its own
    if not matches and "ASSISTANT:" in str(tokenizer.chat_template):
        matches = ["vicuna"]
    if len(matches) == 1:
        return matches[0]
    known = f"it has the tokens of {' and '.join(matches)}"
    reason = known if matches else "no chat token is known"
    raise ValueError(
        f"cannot tell the prompt template from the tokenizer ({reason}; model_type "
        f"{model_type!r}): name one of {names}"
    )


def special_strings(tokenizer: "PreTrainedTokenizerBase", template: str) -> frozenset[str]:
    """The strings that mean something else to the model than their characters.

    They are ``<image>``, every special token of ``tokenizer`` and the control strings of
    ``template``, even where the tokenizer does not know them.
    """
    special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return frozenset({IMAGE_PLACEHOLDER, *_CONTROL.findall(template), *special} - {""})


def forbidden_pattern(tokenizer: "PreTrainedTokenizerBase", template: str) -> re.Pattern[str]:
    """What no text may contain where special tokens are refused: compiled for :func:`check_text`.

    That is :func:`special_strings` and lone surrogates, which no tokenizer can read.
    """
    return re.compile(f"{any_of(special_strings(tokenizer, template))}|{_SURROGATE}")


def any_of(strings: Collection[str]) -> str:
    """A regular expression for the longest of ``strings`` at the first place that has one.

    It has a branch per first character: a flat list of 1000 tokens is tried at every position of a
    text and searched a hundred times slower.
    """
    branches: dict[str, list[str]] = {}
    for string in sorted(strings, key=lambda s: (-len(s), s)):  # longest first
        branches.setdefault(string[0], []).append(re.escape(string[1:]))
    return "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in branches.items())


def check_text(text: str, forbidden: re.Pattern[str]) -> None:
    """Refuse a text that is empty or holds what is ``forbidden``.

    The string filled with one that passes can be tokenised as a whole, as the reference does, with
    merges across the seams (".\\n" is one Llama-3 token). Raises TextError: names the string.
    """
    if not text or text.isspace():
        raise TextError("the text is empty: expected at least one character that is not a space")
    found = forbidden.search(text)
    if found and re.fullmatch(_SURROGATE, string := found.group()):
        raise TextError(f"the text contains the lone surrogate {string!a}: expected valid Unicode")
    if found:
        raise TextError(
            f"the text contains {string!r} (at character {found.start()}), which means something "
            "else to the model: remove or respell it"
        )
