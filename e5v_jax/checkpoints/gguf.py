"""A Llama-architecture GGUF file as a Hugging Face text-only folder: its config and its tensors.

torch is never imported. The GGUF key and tensor names are llama.cpp's (``gguf.constants``); which
key means what in Hugging Face terms follows transformers' ``modeling_gguf_pytorch_utils`` and
``integrations.gguf``.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize

from e5v_jax.families import find_family
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.storage import size_and_time

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
# Keys that ask for another computation unless they hold this value, or that of this key.
NEUTRAL_VALUES = {
    "llama.rope.scaling.type": "none",
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
}
SAME_VALUES = {
    "llama.attention.key_length": "llama.rope.dimension_count",
    "llama.attention.value_length": "llama.rope.dimension_count",
}
IGNORED_KEY = "llama.tensor_data_layout"  # the row order of q and k, the same in every file
ROWS_AT_ONCE = 1024  # rows of a matrix dequantised together


class GGUFError(ValueError):
    """The file is not a whole, well-formed GGUF file; the message names it and says what to do."""


class GGUFFile(GGUFReader):
    """An open GGUF file: metadata and tensor table parsed, tensor data untouched."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def get(self, key: str) -> Any:
        """The value of a metadata key (scalar, str or list), or None when the file lacks it."""
        field = self.get_field(key)
        return None if field is None else field.contents()

    def refuse(self, reason: str) -> NoReturn:
        """Raise :class:`UnsupportedModelError`, naming the file."""
        raise UnsupportedModelError(f"{self.path}: {reason}")

    def require(self, key: str, kind: type = object, items: type = object) -> Any:
        """The value of a metadata key, of type ``kind``, a list of ``items``.

        Raises GGUFError, naming the key: it is missing, or its value has another type.
        """
        if (value := self.get(key)) is None:
            raise GGUFError(
                f"{self.path}: no metadata key {key!r}, which cannot be guessed; convert the model "
                "to GGUF again with a current llama.cpp, or convert its Hugging Face folder instead"
            )
        listed = value if isinstance(value, list) else []
        # a bool is an int to Python
        if not isinstance(value, kind) or isinstance(value, bool) or not _all(listed, items):
            found, expected = type(value).__name__, kind.__name__
            of = f" of {items.__name__}" if kind is list else ""
            raise GGUFError(f"{self.path}: {key} is a {found}: expected a {expected}{of}")
        return value


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def open_gguf(path: str | Path) -> GGUFFile:
    """Parse a GGUF file's metadata; the last one is cached.

    Raises:
        FileNotFoundError, GGUFError: no such file; not GGUF, cut short or damaged.
        UnsupportedModelError: the other byte order, or one part of several.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _parse(Path(path), *size_and_time(Path(path)))


@lru_cache(maxsize=1)  # the vocabulary takes seconds to parse, and one conversion asks three times
def _parse(path: Path, _size: int, _written: str) -> GGUFFile:
    with path.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise GGUFError(f"{path}: not a GGUF file (it starts with {magic!r}, expected b'GGUF')")
    try:
        file = GGUFFile(path)
    except (ValueError, IndexError, KeyError) as error:
        raise unreadable(path, str(error)) from error
    if file.byte_order == "S":
        file.refuse("byte order is not this machine's; convert it with gguf's gguf-convert-endian")
    if (parts := file.get("split.count")) not in (None, 0, 1):
        todo = "join them first with llama-gguf-split --merge"
        file.refuse(f"one part of {parts} (split.count); {todo}")
    return file


def unreadable(path: Path, detail: str) -> GGUFError:
    """The error for a file whose contents cannot be read, with the cause ``detail``."""
    return GGUFError(
        f"{path}: cannot be read as GGUF ({detail}); it is cut short or damaged: fetch it again"
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` (``LlamaConfig`` fields) that a GGUF file stands for.

    Raises:
        FileNotFoundError, GGUFError: as :func:`open_gguf`, or a required metadata key is missing.
        UnsupportedModelError: another architecture, scaled rotary positions, experts, or any
            architecture key or shape that this reader does not know, by its name.
    """
    file = open_gguf(path)
    if (name := file.require("general.architecture")) != "llama":
        file.refuse(f"unsupported architecture {name!r} (general.architecture): expected 'llama'")
    for key in file.fields:
        if not key.startswith("llama.") or key in CONFIG_KEYS or key == IGNORED_KEY:
            continue
        value = file.get(key)
        if same := SAME_VALUES.get(key):
            if value != file.require(same):
                file.refuse(f"{key} is {value}, expected {same} ({file.get(same)})")
        elif key not in NEUTRAL_VALUES or value != NEUTRAL_VALUES[key]:
            what = "scaled rotary positions" if key.startswith("llama.rope.scal") else "this option"
            file.refuse(f"{key} is {value!r}: {what} not supported")
    tensors = {tensor.name for tensor in file.tensors}
    if "rope_freqs.weight" in tensors:
        what = "scaled rotary positions (Llama 3.1 and later)"
        file.refuse(f"tensor rope_freqs.weight: {what} not supported")
    config = {}
    for key, name in CONFIG_KEYS.items():
        config[name] = file.require(key)
        if isinstance(config[name], list):
            file.refuse(f"{key} is a list; expected one value")
    try:
        TextConfig(**config, model_type="llama")
    except ValueError as error:  # which has the names of config.json
        reason = str(error)
        for key, name in CONFIG_KEYS.items():
            reason = reason.replace(name, key)
        raise GGUFError(f"{file.path}: {reason}") from error
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **config,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,  # llama.cpp leaves out a tied one
        "bos_token_id": file.require("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": file.require("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face names, dequantised one at a time."""

    def __init__(self, path: str | Path) -> None:
        """Find the place of every tensor in ``LlamaForCausalLM``.

        Raises:
            UnsupportedModelError: a tensor without one (biases, experts), by its name.
            GGUFError, FileNotFoundError: as :func:`read_config`.
        """
        self._config = read_config(path)
        self._file = open_gguf(path)
        layers = self._config["num_hidden_layers"]
        text = {name: self._config[name] for name in ("model_type", *CONFIG_KEYS.values())}
        family = find_family(self._config)
        table = family.parameters(family.config_from_dict({"text": text}))
        theirs = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
        keys = [slot.key(table.export_prefixes) for slot in table.slots]
        names = {theirs.get_name(key, try_suffixes=(".weight",)): key for key in keys}
        self._by_key: dict[str, ReaderTensor] = {}
        for tensor in self._file.tensors:
            if tensor.name not in names:
                place = f"no place in a Llama model of {layers} layers"
                self._file.refuse(f"tensor {tensor.name!r} has {place}")
            self._by_key[names[tensor.name]] = tensor

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
                    raise unreadable(self._file.path, f"tensor {tensor.name} ends early")
                try:
                    rows = dequantize(raw.reshape(part.shape), tensor.tensor_type)
                except NotImplementedError:
                    self._file.refuse(
                        f"tensor {tensor.name} is stored as {tensor.tensor_type.name}, which "
                        "cannot be dequantised; use a file with another quantisation"
                    )
                weight[start : start + len(part)] = rows
        head_counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if (heads := head_counts.get(key.split(".")[-2])) is None:
            return weight.reshape(self.shape(key))
        # Undo the row order llama.cpp gives q and k, whose rotary embedding turns neighbouring rows
        # (2i, 2i + 1) of a head; Hugging Face's turns rows i and i + head_dim / 2. Inverse of
        # ``permute`` in llama.cpp's convert_hf_to_gguf.py.
        count, head_dim = self._config[heads], self._config["head_dim"]
        if len(weight) != count * head_dim:
            raise GGUFError(
                f"{self._file.path}: tensor {tensor.name} has {len(weight)} rows, expected {count} "
                f"heads x head_dim {head_dim} (llama.rope.dimension_count)"
            )
        split = weight.reshape(count, head_dim // 2, 2, -1)  # [H, D/2, 2, in]
        return split.swapaxes(1, 2).reshape(weight.shape)  # [H, 2, D/2, in] -> [H * D, in]
