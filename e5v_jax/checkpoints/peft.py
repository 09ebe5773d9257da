"""PEFT LoRA adapters: read into stacked factors, written back from them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from e5v_jax.checkpoints.converted import WeightSource
from e5v_jax.checkpoints.finite import cast, check_finite
from e5v_jax.checkpoints.names import find_slot
from e5v_jax.checkpoints.peft_config import PeftConfig, read_peft_config
from e5v_jax.checkpoints.safetensors_file import read_tensors
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.parameters import Parameter, ParameterTable, Slot
from e5v_jax.storage import as_path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_HEAD = "base_model.model."  # of peft, before the model's own names
_KEY = re.compile(
    re.escape(_HEAD) + r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.(?P<of>[^.]+))?\.weight"
)
_UNNAMED = (None, "default")  # what an adapter that is alone in its file may be called


@dataclass(frozen=True)
class Adapter:
    """LoRA factors of every decoder linear map, stacked over layers."""

    lora: LoRAConfig
    values: dict[str, np.ndarray]  # dotted path -> fp32 [L, in, r] (lora_a) or [L, r, out] (lora_b)


def _path(row: Parameter, factor: str) -> str:
    """Where the module has the factor "a" or "b" beside the kernel of ``row``."""
    return f"{row.path.removesuffix('kernel')}lora_{factor.lower()}"


def zero_factors(table: ParameterTable, lora: LoRAConfig) -> dict[str, np.ndarray]:
    """Factors of zero, fp32 [L, in, r] and [L, r, out], for every linear map that takes them."""
    values: dict[str, np.ndarray] = {}
    for row in table.adapted:
        fan_in, fan_out = row.shape
        values[_path(row, "a")] = np.zeros((row.layers or 0, fan_in, lora.rank), np.float32)
        values[_path(row, "b")] = np.zeros((row.layers or 0, lora.rank, fan_out), np.float32)
    return values


def read_adapter(folder: Path, table: ParameterTable, wanted: str | None = None) -> Adapter:
    """Read a PEFT LoRA folder for a model of ``table``; untouched linear maps get zero factors.

    Of a file with several adapters by name, as jina-embeddings-v4's, ``wanted`` is the one to take.
    A key that peft would leave out, or a module that it would look for in vain, is an error: peft
    warns of the second at most.

    Raises:
        ValueError: an option, key, shape or value that does not fit, by name.
        FileNotFoundError: no adapter_config.json or adapter_model.safetensors.
    """
    folder = as_path(folder)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: missing; expected a PEFT LoRA adapter folder (safetensors)"
            )
    config = read_peft_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    tensors = _one_adapter(read_tensors(file), wanted, table, file)
    found = _find_factors(tensors, config, table, file)
    values = zero_factors(table, config.lora)  # only now: their size is known to be the file's
    for (slot, factor), array in found.items():
        values[_path(slot.row, factor)][slot.layer or 0] = array
    return Adapter(config.lora, values)


def _one_adapter(
    tensors: Mapping[str, np.ndarray], wanted: str | None, table: ParameterTable, file: Path
) -> dict[str, np.ndarray]:
    """The tensors of one adapter under keys without its name, but for parts that nobody needs."""
    kept: dict[str, np.ndarray] = {}
    names: set[str] = set()
    for key, array in tensors.items():
        if any(re.fullmatch(pattern, key.removeprefix(_HEAD)) for pattern in table.ignored):
            continue
        match = _KEY.fullmatch(key)
        if match and match["of"] not in _UNNAMED:
            names.add(match["of"])
            if match["of"] != wanted:
                continue
        plain = f"{key[: match.end('factor')]}.weight" if match else key
        if plain in kept:
            raise ValueError(f"{file}: {key}: comes twice, under two names of adapters")
        kept[plain] = array
    if names and wanted not in names:
        raise ValueError(
            f"{file}: has adapters by name ({', '.join(sorted(names))}): choose one by its preset, "
            "such as --preset jina-embeddings-v4"
        )
    return kept


def _find_factors(
    tensors: Mapping[str, np.ndarray], config: PeftConfig, table: ParameterTable, file: Path
) -> dict[tuple[Slot, str], np.ndarray]:
    """The factors "A" [in, r] and "B" [r, out] of each linear map that the adapter has."""
    found: dict[tuple[Slot, str], np.ndarray] = {}
    prefixes: dict[str, str] = {}  # and the first key of each
    for key, array in tensors.items():
        slot, factor = _read_key(key, table, file)
        prefix = key.removeprefix(_HEAD).partition(_module(slot))[0]
        if (slot, factor) in found:
            raise ValueError(f"{file}: {key}: comes twice, under two prefixes or names")
        prefixes.setdefault(prefix, key)
        rank, (fan_in, fan_out) = config.lora.rank, slot.row.shape
        expected = [rank, fan_in] if factor == "A" else [fan_out, rank]
        if list(array.shape) != expected:
            raise ValueError(f"{file}: {key}: shape {list(array.shape)}, expected {expected}")
        found[slot, factor] = check_finite(array, f"{file}: {key}").T
    if not found:
        raise ValueError(f"{file}: holds no LoRA factors")
    if len(prefixes) > 1:
        some, other = list(prefixes.values())[:2]
        raise ValueError(f"{file}: {some} and {other} are of two kinds of model")
    (prefix,) = prefixes
    for slot in table.slots:
        if not slot.row.lora:
            continue
        have = [factor for factor in "AB" if (slot, factor) in found]
        module = prefix + _module(slot)
        if len(have) == 1:
            where = f"layer {slot.layer} {slot.row.path.split('.')[-2]}"
            raise ValueError(f"{file}: {where} has lora_{have[0]} but not its partner")
        if have and not config.targets(module):
            raise ValueError(
                f"{file}: {_HEAD}{module} has factors, but is not among the modules that "
                "adapter_config.json targets: peft would leave them out"
            )
        if not have and config.targets(module):
            raise ValueError(
                f"{file}: no factors of {_HEAD}{module}, which adapter_config.json targets: the "
                "file is not whole; fetch it again"
            )
    return found


def _read_key(key: str, table: ParameterTable, file: Path) -> tuple[Slot, str]:
    """The linear map and the factor, "A" or "B", that a key of an adapter names."""
    match = _KEY.fullmatch(key)
    places = [(row.section, prefix) for row in table.adapted for prefix in table.adapter_prefixes]
    slot = match and find_slot(f"{match['name']}.weight", table, dict.fromkeys(places))
    if not match or not slot or not slot.row.lora:
        known = f"{_HEAD}{table.adapter_prefix}layers.0.mlp.up_proj.lora_A.weight"
        raise ValueError(
            f"{file}: {key}: only LoRA on the decoder's linear maps is supported, such as {known}; "
            "merge this one with peft first (merge_and_unload) and convert the result"
        )
    if (slot.layer or 0) >= (slot.row.layers or 0):
        raise ValueError(f"{file}: {key}: the model has only {slot.row.layers} layers")
    return slot, match["factor"]


def _module(slot: Slot) -> str:
    """The module of a kernel: its name inside its section, such as layers.0.mlp.up_proj."""
    return slot.row.hf.removesuffix(".weight").replace("{i}", str(slot.layer))


def target_modules(table: ParameterTable) -> str:
    """peft's name for the decoder's linear maps: a pattern, which leaves the tower's alone."""
    return rf".*{re.escape(table.adapter_prefix)}layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"


def write_adapter(
    folder: Path, adapter: Adapter, table: ParameterTable, *, base_model: str | None = None
) -> None:
    """Write a PEFT LoRA folder that ``PeftModel.from_pretrained`` loads on transformers 5."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{_HEAD}{table.adapter_prefix}"
    tensors: dict[str, np.ndarray] = {}
    for row in table.adapted:
        for factor in "AB":
            for i, array in enumerate(adapter.values[_path(row, factor)]):
                key = f"{head}{_module(Slot(row, i))}.lora_{factor}.weight"
                tensors[key] = np.ascontiguousarray(array.T.astype(np.float32))
    config = {
        "peft_type": "LORA",
        "task_type": table.adapter_task,
        "base_model_name_or_path": base_model,
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": target_modules(table),
        "bias": "none",
        "inference_mode": True,
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_merged(
    source: WeightSource, names: Sequence[str], adapter: Adapter | None, dtype: np.dtype[Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays in ``dtype``, with their update if there is an adapter, added in fp32.

    Raises ValueError: a value is too large for ``dtype``; names the array.
    """
    for name, array in zip(names, source.read(names), strict=True):
        row, layer = source.table.stored[name]
        if adapter is not None and row.lora:
            a, b = (adapter.values[_path(row, factor)][layer] for factor in "ab")
            kernel, array = array, a @ b  # [in, r] @ [r, out]
            array *= np.float32(adapter.lora.scale)
            array += kernel
            del kernel
        yield name, cast(array, dtype, name)
        del array  # before the next one is read
