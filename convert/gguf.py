"""Read a Llama-architecture GGUF file as if it were a Hugging Face text-only folder.

Three views of one file: its ``config.json`` (:func:`read_config`), its tensors under Hugging Face
names (:class:`GGUFTensors`) and its tokenizer (:func:`build_tokenizer`). torch is never imported.

Sources: the GGUF key and tensor names are llama.cpp's (``gguf.constants``); which key means what in
Hugging Face terms follows transformers' ``modeling_gguf_pytorch_utils`` and ``integrations.gguf``.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from e5v_jax.config import UnsupportedModelError

# GGUF metadata -> config.json, one value each. All are required.
CONFIG_KEYS = {
    "llama.vocab_size": "vocab_size",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.dimension_count": "head_dim",
    "llama.rope.freq_base": "rope_theta",
}
# Keys that ask for another computation unless they hold this value.
NEUTRAL_VALUES = {
    "llama.rope.scaling.type": "none",
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
}
IGNORED_KEYS = {
    "llama.attention.key_length": "compared with llama.rope.dimension_count",
    "llama.attention.value_length": "compared with llama.rope.dimension_count",
    "llama.tensor_data_layout": "names the row order of q and k that every Llama GGUF file has",
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# `tokenizer.ggml.pre` of byte-level vocabularies: transformers splits text by these rules, and
# falls back on GPT-2's rule for any name it does not know, hence the list.
GPT2_SPLITS = ("gpt-2", "smollm")
LLAMA3_SPLITS = ("llama-bpe", "llama3", "llama-v3", "tekken")
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
ROWS_AT_ONCE = 1024  # rows of a matrix dequantised together


class GGUFError(ValueError):
    """The file is not a whole, well-formed GGUF file; the message names it and says what to do."""


class _File:
    """An open GGUF file: metadata and tensor table parsed, tensor data untouched."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        self.keys = list(reader.fields)
        self._reader = reader

    def get(self, key: str) -> Any:
        """The value of a metadata key (scalar, str or list), or None when the file lacks it."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def require(self, key: str) -> Any:
        """The value of a metadata key; a missing one raises :class:`GGUFError` naming it."""
        value = self.get(key)
        if value is None:
            raise GGUFError(
                f"{self.path}: no metadata key {key!r}, which cannot be guessed; convert the model "
                "to GGUF again with a current llama.cpp, or convert its Hugging Face folder instead"
            )
        return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` (``LlamaConfig`` fields) that a GGUF file stands for.

    ``pad_token_id`` is None when the file names no padding token. ``tie_word_embeddings`` is true
    when there is no ``output.weight`` (llama.cpp leaves out a tied one).

    Raises:
        FileNotFoundError: there is no such file.
        GGUFError: not a GGUF file, cut short, or a required metadata key is missing.
        UnsupportedModelError: another architecture, scaled rotary positions, experts, or any
            architecture key or shape that this reader does not know, by its name.
    """
    file = _open(path)
    architecture = file.require("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(
            f"{file.path}: unsupported architecture {architecture!r} (general.architecture): "
            "expected 'llama'"
        )
    _refuse_unknown_options(file)
    config = {name: file.require(key) for key, name in CONFIG_KEYS.items()}
    for key, name in CONFIG_KEYS.items():
        if isinstance(config[name], list):
            raise UnsupportedModelError(f"{file.path}: {key} is a list; expected one value")
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        found = file.get(key)
        if found is not None and found != config["head_dim"]:
            raise UnsupportedModelError(
                f"{file.path}: {key} is {found}, expected llama.rope.dimension_count "
                f"({config['head_dim']})"
            )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **config,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.require("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.require("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


def _refuse_unknown_options(file: _File) -> None:
    """Raise for metadata or tensors that ask for something a plain Llama decoder does not do."""
    for key in file.keys:
        if not key.startswith("llama.") or key in CONFIG_KEYS or key in IGNORED_KEYS:
            continue
        value = file.get(key)
        if key not in NEUTRAL_VALUES or value != NEUTRAL_VALUES[key]:
            what = "scaled rotary positions" if key.startswith("llama.rope.scal") else "this option"
            raise UnsupportedModelError(f"{file.path}: {key} is {value!r}: {what} not supported")
    if "rope_freqs.weight" in file.tensors:
        raise UnsupportedModelError(
            f"{file.path}: tensor rope_freqs.weight: scaled rotary positions (Llama 3.1 and later) "
            "not supported"
        )


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face names, dequantised one at a time.

    Raises what :func:`read_config` raises, and :class:`UnsupportedModelError` for a tensor with
    no counterpart in ``LlamaForCausalLM`` (biases, experts), by its name.
    """

    def __init__(self, path: str | Path) -> None:
        self._config = read_config(path)
        self._layers: int = self._config["num_hidden_layers"]
        self._file = _open(path)
        self._by_key = {self._hf_key(name): t for name, t in self._file.tensors.items()}

    def keys(self) -> list[str]:
        """Hugging Face names such as ``model.layers.0.self_attn.q_proj.weight``, in file order."""
        return list(self._by_key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of ``key`` as torch has it: ``(out, in)`` for matrices, ``(n,)`` for norms."""
        return tuple(int(n) for n in reversed(self._by_key[key].shape))  # GGUF: fastest axis first

    def dtype(self, key: str) -> np.dtype[Any]:
        """Every tensor is read as float32, whatever its GGUF type."""
        return np.dtype(np.float32)

    def read(self, key: str) -> np.ndarray:
        """``key`` as float32 ``[out, in]`` or ``[n]``, with q and k in Hugging Face's row order.

        Peak memory: the float32 array (twice it for q and k) and a slice of stored bytes.

        Raises:
            KeyError: no such tensor.
            GGUFError: the file has become shorter since it was opened.
            UnsupportedModelError: a storage type that the ``gguf`` package cannot dequantise.
        """
        tensor = self._by_key[key]
        stored = tensor.data.reshape(-1, tensor.data.shape[-1])  # a view, only for its shape
        weight = np.empty((len(stored), self.shape(key)[-1]), np.float32)
        # Read from the file, not the memory map, whose pages would pile up layer after layer; and
        # in slices, because dequantize holds its result twice.
        with self._file.path.open("rb") as file:
            file.seek(tensor.data_offset)
            for start in range(0, len(stored), ROWS_AT_ONCE):
                part = stored[start : start + ROWS_AT_ONCE]
                raw = np.fromfile(file, dtype=part.dtype, count=part.size)
                if raw.size != part.size:
                    raise _unreadable(self._file.path, f"tensor {tensor.name} ends early")
                weight[start : start + len(part)] = self._dequantize(
                    raw.reshape(part.shape), tensor
                )
        weight = weight.reshape(self.shape(key))
        if key.endswith("self_attn.q_proj.weight"):
            return self._unpermute(tensor.name, weight, self._config["num_attention_heads"])
        if key.endswith("self_attn.k_proj.weight"):
            return self._unpermute(tensor.name, weight, self._config["num_key_value_heads"])
        return weight

    def _dequantize(self, raw: np.ndarray, tensor: ReaderTensor) -> np.ndarray:
        try:
            return dequantize(raw, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self._file.path}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, "
                "which cannot be dequantised; use a file with another quantisation"
            ) from None

    def _hf_key(self, name: str) -> str:
        if name in TOP_TENSORS:
            return TOP_TENSORS[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in BLOCK_TENSORS and int(match[1]) < self._layers:
            return f"model.layers.{match[1]}.{BLOCK_TENSORS[match[2]]}.weight"
        raise UnsupportedModelError(
            f"{self._file.path}: tensor {name!r} has no place in a Llama model of "
            f"{self._layers} layers"
        )

    def _unpermute(self, name: str, weight: np.ndarray, heads: int) -> np.ndarray:
        """Undo the row order llama.cpp gives q and k.

        Its rotary embedding turns neighbouring rows (2i, 2i + 1) of a head, Hugging Face's turns
        rows i and i + head_dim / 2. Inverse of ``permute`` in llama.cpp's convert_hf_to_gguf.py.
        """
        head_dim = int(self._config["head_dim"])
        rows, columns = weight.shape
        if rows != heads * head_dim:
            raise GGUFError(
                f"{self._file.path}: tensor {name} has {rows} rows, expected {heads} heads x "
                f"head_dim {head_dim} (llama.rope.dimension_count)"
            )
        weight = weight.reshape(heads, head_dim // 2, 2, columns)  # [H, D/2, 2, in]
        return weight.swapaxes(1, 2).reshape(rows, columns)  # [H, 2, D/2, in] -> [H * D, in]


def build_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer a GGUF file describes, ready for ``save_pretrained``.

    Control tokens that are neither bos, eos, unk nor pad become ``extra_special_tokens``. Ids are
    those of ``AutoTokenizer.from_pretrained(folder, gguf_file=...)``, which builds it the same way,
    except for Llama 3's vocabulary, where that departs from the model's own tokenizer.

    Raises:
        GGUFError, FileNotFoundError: as :func:`read_config`.
        UnsupportedModelError: a kind of vocabulary or splitting rule that is not known here.
    """
    file = _open(path)
    kind = file.require("tokenizer.ggml.model")
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    description = {
        "tokenizer_type": kind,
        "tokens": tokens,
        "token_type": file.require("tokenizer.ggml.token_type"),
    }
    split = None
    if kind == "gpt2":
        split = file.require("tokenizer.ggml.pre")
        if split not in GPT2_SPLITS + LLAMA3_SPLITS:
            raise UnsupportedModelError(
                f"{file.path}: tokenizer.ggml.pre is {split!r}: expected one of "
                f"{', '.join(GPT2_SPLITS + LLAMA3_SPLITS)}"
            )
        description["pre_tokenizer_type"] = split
        description["merges"] = file.require("tokenizer.ggml.merges")
    elif kind == "llama":
        description["scores"] = file.require("tokenizer.ggml.scores")  # merges follow from them
        if file.get("tokenizer.ggml.add_space_prefix") is False:
            raise UnsupportedModelError(
                f"{file.path}: tokenizer.ggml.add_space_prefix is False: only sentencepiece "
                "vocabularies with the leading space are supported"
            )
    else:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}: expected 'gpt2' or 'llama'"
        )
    backend, _ = convert_gguf_tokenizer("llama", description)
    backend = _drop_added(backend, len(tokens))
    if split in LLAMA3_SPLITS:
        # A word that is a token stays whole, as in Llama 3's own tokenizer.json and in llama.cpp:
        # some 600 tokens of its vocabulary cannot be reached by merges.
        backend.model.ignore_merges = True
    named = {}
    for name, key in SPECIAL_TOKENS.items():
        index = file.require(key) if name in ("bos_token", "eos_token") else file.get(key)
        if index is not None and index >= len(tokens):
            raise GGUFError(f"{file.path}: {key} is {index}, but there are {len(tokens)} tokens")
        named[name] = None if index is None else tokens[index]
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[t for t in tokens if t in special and t not in named.values()],
        add_bos_token=_adds_bos(file, kind, split),
        add_eos_token=bool(file.get("tokenizer.ggml.add_eos_token")),
        chat_template=file.get("tokenizer.chat_template"),
        **named,
    )
    if len(tokenizer) != len(tokens):  # they were respelled in bytes, then added past the end
        added = [t for t, i in tokenizer.get_added_vocab().items() if i >= len(tokens)]
        raise UnsupportedModelError(
            f"{file.path}: special tokens {added} are not spelled in the alphabet of a byte-level "
            "vocabulary; convert the model's Hugging Face folder instead"
        )
    return tokenizer


def _adds_bos(file: _File, kind: str, split: str | None) -> bool:
    """Whether encoding starts with bos: the file's flag, else llama.cpp's rule (llama-vocab.cpp).

    Files made before the flag was written leave it out, Llama 3's among them, and those need bos.
    """
    flag = file.get("tokenizer.ggml.add_bos_token")
    return (kind == "llama" or split in LLAMA3_SPLITS) if flag is None else bool(flag)


def _drop_added(backend: Tokenizer, size: int) -> Tokenizer:
    """Remove tokens past the file's ``size``: transformers' GPT-2 class adds ``<|endoftext|>``.

    That id has no row in the embedding table, or is the row of ``<image>``.
    """
    if backend.get_vocab_size() == size:
        return backend
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < size]
    return Tokenizer.from_str(json.dumps(state))


def _open(path: str | Path) -> _File:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    stat = path.stat()
    return _parse(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)  # the vocabulary takes seconds to parse, and one conversion asks three times
def _parse(path: Path, _mtime_ns: int, _size: int) -> _File:
    with path.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise GGUFError(f"{path}: not a GGUF file (it starts with {magic!r}, expected b'GGUF')")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise _unreadable(path, str(error)) from error
    if reader.byte_order == "S":
        raise UnsupportedModelError(
            f"{path}: byte order is not this machine's; convert it with gguf's gguf-convert-endian"
        )
    file = _File(path, reader)
    if (file.get("split.count") or 1) > 1:
        raise UnsupportedModelError(
            f"{path}: one part of {file.get('split.count')} (split.count); join them first with "
            "llama-gguf-split --merge"
        )
    return file


def _unreadable(path: Path, detail: str) -> GGUFError:
    return GGUFError(
        f"{path}: cannot be read as GGUF ({detail}); it is cut short or damaged: fetch it again"
    )
