"""The tokenizer that a GGUF file describes, without torch.

Which key means what follows transformers' ``integrations.gguf``, llama.cpp where that departs.
"""

import json
import textwrap
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from e5v_jax.checkpoints.gguf import GGUFError, open_gguf

# `tokenizer.ggml.pre` of byte-level vocabularies: transformers splits text by these rules, and
# falls back on GPT-2's rule for any name it does not know, hence the list.
GPT2_SPLITS = ("gpt-2", "smollm")
LLAMA3_SPLITS = ("llama-bpe", "llama3", "llama-v3", "tekken")
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def build_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer a GGUF file describes, ready for ``save_pretrained``.

    Ids are those of ``AutoTokenizer.from_pretrained(folder, gguf_file=...)``, which builds it the
    same way, except for Llama 3's vocabulary, where that departs from the model's own tokenizer.

    Raises:
        GGUFError, FileNotFoundError: as :func:`e5v_jax.checkpoints.gguf.open_gguf`.
        UnsupportedModelError: a kind of vocabulary or splitting rule that is not known here.
    """
    file = open_gguf(path)
    kind = file.require("tokenizer.ggml.model", str)
    tokens: list[str] = file.require("tokenizer.ggml.tokens", list, str)
    token_types = file.require("tokenizer.ggml.token_type", list, int)
    description = {"tokenizer_type": kind, "tokens": tokens, "token_type": token_types}
    split = None
    if kind == "gpt2":
        split = file.require("tokenizer.ggml.pre")
        if split not in GPT2_SPLITS + LLAMA3_SPLITS:
            known = ", ".join(GPT2_SPLITS + LLAMA3_SPLITS)
            file.refuse(f"tokenizer.ggml.pre is {split!r}: expected one of {known}")
        description["pre_tokenizer_type"] = split
        description["merges"] = file.require("tokenizer.ggml.merges", list, str)
    elif kind == "llama":
        description["scores"] = file.require(
            "tokenizer.ggml.scores", list, float
        )  # merges follow from them
        if file.get("tokenizer.ggml.add_space_prefix") is False:
            file.refuse(
                "tokenizer.ggml.add_space_prefix is False: only sentencepiece vocabularies with "
                "the leading space are supported"
            )
    else:
        file.refuse(f"tokenizer.ggml.model is {kind!r}: expected 'gpt2' or 'llama'")
    for name in ("token_type", "scores"):
        if len(description.get(name, tokens)) != len(tokens):
            count = f"{len(description[name])} values for {len(tokens)} tokens"
            raise GGUFError(f"{file.path}: tokenizer.ggml.{name} has {count}")
    try:
        backend, _ = convert_gguf_tokenizer("llama", description)
    except Exception as error:  # of transformers and tokenizers: many types
        reason = textwrap.shorten(str(error), 200)
        raise GGUFError(f"{file.path}: tokenizer.ggml.*: no tokenizer ({reason})") from error
    if backend.get_vocab_size() != len(tokens):
        # transformers' GPT-2 class adds <|endoftext|>, whose id would have no row in the embedding
        # table, or the row of <image>
        state = json.loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < len(tokens)]
        backend = Tokenizer.from_str(json.dumps(state))
    add_bos, add_eos = (file.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    for name, flag in (("bos", add_bos), ("eos", add_eos)):
        if flag not in (None, True, False):
            key = f"tokenizer.ggml.add_{name}_token"
            raise GGUFError(f"{file.path}: {key} is {flag!r}: expected true or false")
    if add_bos is None:
        # llama.cpp's rule (llama-vocab.cpp): files made before the flag was written leave it out,
        # Llama 3's among them, and those need bos
        add_bos = kind == "llama" or split in LLAMA3_SPLITS
    if split in LLAMA3_SPLITS:
        # A word that is a token stays whole, as in Llama 3's own tokenizer.json and in llama.cpp:
        # some 600 tokens of its vocabulary cannot be reached by merges.
        backend.model.ignore_merges = True
    named = {}
    for name, theirs in SPECIAL_TOKENS.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        optional = name in ("unk", "pad") and file.get(key) is None
        index = None if optional else file.require(key, int)
        if index is not None and not 0 <= index < len(tokens):
            raise GGUFError(f"{file.path}: {key} is {index}, but there are {len(tokens)} tokens")
        named[f"{name}_token"] = None if index is None else tokens[index]
    control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[t for t in tokens if t in control and t not in named.values()],
        add_bos_token=bool(add_bos),
        add_eos_token=bool(add_eos),
        chat_template=file.get("tokenizer.chat_template"),
        **named,
    )
    if len(tokenizer) != len(tokens):  # they were respelled in bytes, then added past the end
        added = [t for t, i in tokenizer.get_added_vocab().items() if i >= len(tokens)]
        file.refuse(
            f"special tokens {added} are not spelled in the alphabet of a byte-level vocabulary; "
            "convert the model's Hugging Face folder instead"
        )
    return tokenizer
