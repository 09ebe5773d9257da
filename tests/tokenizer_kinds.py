"""Tokenizers of every kind that the models have, with the template that each is asked in."""

from collections.abc import Callable, Iterable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.families.text.processor import TextProcessor

REAL = {"llama3": "llama3", "qwen": "chatml", "smollm2": "chatml"}
METASPACE = {"first": "mistral", "always": "mistral", "legacy": "vicuna", "phi3": "phi3"}
KINDS = {**REAL, **METASPACE}
_SENTENCES = [
    "A dog sits on a sofa. The stock market fell sharply, and a puppy naps on a couch.",
    "Summary above sentence in one word: [INST] a cat [/INST] USER: ASSISTANT: image end start",
]


def metaspace_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's way: spaces are a letter, bytes are tokens of what is not in the vocabulary.

    The space before a text is put before the first piece, before any, or by the normaliser; special
    tokens may take the spaces around them along, and be looked for after the normaliser.
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    legacy = kind in ("legacy", "phi3")
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    special = ["<unk>", "<s>", "</s>"]
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    texts = _SENTENCES if not legacy else [text.replace(" ", "▁") for text in _SENTENCES]
    backend.train_from_iterator(texts, trainer)
    more = ["<image>", "<|user|>", "<|end|>", "<|assistant|>"] if kind == "phi3" else ["<image>"]
    trained = PreTrainedTokenizerFast(tokenizer_object=backend)
    state = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    bare = Tokenizer(state.model)  # whose bytes are no added tokens
    bare.normalizer, bare.pre_tokenizer = state.normalizer, state.pre_tokenizer
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    strip = {"lstrip": kind == "legacy", "rstrip": kind == "phi3"}
    bare.add_special_tokens([AddedToken(t, normalized=kind == "legacy", **strip) for t in special])
    bare.add_special_tokens([AddedToken(t, normalized=False, **strip) for t in more])
    bare.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_tokenizer(kind: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The real ones are the session's."""
    if kind == "smollm2":
        return build_tokenizer(request.getfixturevalue("smollm2_gguf"))
    if kind in REAL:
        return request.getfixturevalue(f"{kind}_tokenizer")
    return metaspace_tokenizer(kind)


def make_processor(kind: str, tokenizer: PreTrainedTokenizerFast) -> TextProcessor:
    """For a text model with the longest embedding table that there is."""
    config = TextModelConfig(ARCHITECTURES["qwen3-vl-2b"].text)
    return TextProcessor(config, tokenizer, KINDS[kind])


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """All but that of what has no token."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, t in added if t.special and i != tokenizer.unk_token_id)


def odd_strings(
    names: Iterable[str], count: int, choose: Callable[[int], int], *, whole: bool
) -> list[str]:
    """Strings of words, odd characters and pieces of ``names``, some whole if ``whole``."""
    names = sorted(names)
    words = [
        "a dog",
        " sits",
        "  ",
        "\n",
        "\n\n",
        ".",
        " .",
        "café",
        "cafe\u0301",
        "漢字",
        "🐕",
        "\t",
    ]
    words += ["<", ">", "|", "<|", "|>", "[", "]", "/", "▁", "<0x0A>", "\ufeff", "é", " "]
    words += [name[: len(name) // 2] for name in names] + [name[1:] for name in names]
    words += [name.upper() if name.upper() not in names else "X" for name in names]
    if whole:
        words += 3 * [*names, *(f" {name} " for name in names)]

    def make() -> str:
        return "".join(words[choose(len(words))] for _ in range(1 + choose(8)))

    found: list[str] = []
    while len(found) < count:
        text = make()
        if text.strip() and (whole or not any(name in text for name in names)):
            found.append(text)
    return found
