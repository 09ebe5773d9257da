"""PEFT LoRA adapters: read into stacked factors, written back from them."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from e5v_jax.checkpoints.converted import WeightSource
from e5v_jax.checkpoints.names import find_slot
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.parameters import Parameter, ParameterTable, Slot
from e5v_jax.storage import as_path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")

# Values of options under which a peft adapter computes x + scale * x A B and nothing else.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (None, [])),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "use_bdlora"), (None,)),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), (None,)),
    **dict.fromkeys(("velora_config", "monteclora_config"), (None,)),
    # the other initialisations change the base weights as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


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


def read_adapter(folder: Path, table: ParameterTable) -> Adapter:
    """Read a PEFT LoRA folder for a model of ``table``; untouched linear maps get zero factors.

    Raises:
        ValueError: an option, key or shape that does not fit, by name.
        FileNotFoundError: no adapter_config.json or adapter_model.safetensors.
    """
    folder = as_path(folder)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: missing; expected a PEFT LoRA adapter folder (safetensors)"
            )
    lora = _read_config(folder / "adapter_config.json")
    values = zero_factors(table, lora)
    file = folder / "adapter_model.safetensors"
    try:
        tensors = safetensors.numpy.load(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from error
    seen: dict[Slot, set[str]] = {}
    for key, array in sorted(tensors.items()):  # read from bytes, they come in any order
        match = _KEY.fullmatch(key)
        slot = match and find_slot(f"{match['name']}.weight", table)
        if not match or not slot or not slot.row.lora:
            raise ValueError(f"{file}: {key}: only LoRA on the decoder's linear maps is supported")
        i, factor = slot.layer or 0, match["factor"]
        if i >= (slot.row.layers or 0):
            raise ValueError(f"{file}: {key}: the model has only {slot.row.layers} layers")
        target = values[_path(slot.row, factor)][i]
        array = array.astype(np.float32).T  # ours is [in, r] and [r, out]
        if array.shape != target.shape:
            found, expected = list(array.shape[::-1]), list(target.shape[::-1])
            raise ValueError(f"{file}: {key}: shape {found}, expected {expected}")
        if factor in seen.setdefault(slot, set()):
            raise ValueError(f"{file}: {key}: comes twice, under two prefixes")
        seen[slot].add(factor)
        target[...] = array
    for slot, factors in seen.items():
        if factors != {"A", "B"}:
            where = f"layer {slot.layer} {slot.row.path.split('.')[-2]}"
            raise ValueError(f"{file}: {where} has lora_{min(factors)} but not its partner")
    if not seen:
        raise ValueError(f"{file}: holds no LoRA factors")
    return Adapter(lora, values)


def _read_config(file: Path) -> LoRAConfig:
    try:
        config = json.loads(file.read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
    except KeyError as error:
        raise ValueError(f"{file}: no {error.args[0]!r}; expected a PEFT LoRA config") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a PEFT LoRA config ({error})") from error
    for key, accepted in _ACCEPTED.items():
        if key in config and config[key] not in accepted:
            raise ValueError(f"{file}: {key} {config[key]!r} is not supported")
    if config.get("use_rslora"):
        alpha *= rank**0.5  # rank-stabilised: scale is alpha / sqrt(r)
    return LoRAConfig(rank=rank, alpha=alpha, dropout=dropout)


def write_adapter(
    folder: Path, adapter: Adapter, table: ParameterTable, *, base_model: str | None = None
) -> None:
    """Write a PEFT LoRA folder that ``PeftModel.from_pretrained`` loads on transformers 5."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"base_model.model.{table.adapter_prefix}"
    tensors: dict[str, np.ndarray] = {}
    for row in table.adapted:
        module = row.hf.removesuffix(".weight")
        for factor in "AB":
            for i, array in enumerate(adapter.values[_path(row, factor)]):
                key = f"{head}{module.replace('{i}', str(i))}.lora_{factor}.weight"
                tensors[key] = np.ascontiguousarray(array.T.astype(np.float32))
    config = {
        "peft_type": "LORA",
        "task_type": table.adapter_task,
        "base_model_name_or_path": base_model,
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": adapter.lora.dropout,
        # a regular expression, so that the vision tower's q_proj is left alone
        "target_modules": (
            rf".*{re.escape(table.adapter_prefix)}layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
        ),
        "bias": "none",
        "inference_mode": True,
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_merged(
    source: WeightSource, names: Sequence[str], adapter: Adapter | None, dtype: np.dtype[Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays in ``dtype``, with their update if there is an adapter, added in fp32."""
    for name, array in zip(names, source.read(names), strict=True):
        row, layer = source.table.stored[name]
        if adapter is not None and row.lora:
            a, b = (adapter.values[_path(row, factor)][layer] for factor in "ab")
            kernel, array = array, a @ b  # [in, r] @ [r, out]
            array *= np.float32(adapter.lora.scale)
            array += kernel
            del kernel
        yield name, array.astype(dtype, copy=False)
        del array  # before the next one is read
