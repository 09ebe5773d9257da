"""PEFT LoRA adapters: read into stacked factors, written back from them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.parameters import ParameterTable, Slot, name_pattern
from e5v_jax.storage import as_path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")

# Options under which a peft adapter computes something else than x + scale * x A B.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # the other initialisations change the base weights as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """LoRA factors of every decoder linear map, stacked over layers."""

    lora: LoRAConfig
    values: dict[str, np.ndarray]  # dotted path -> fp32 [L, in, r] (lora_a) or [L, r, out] (lora_b)


def zero_factors(table: ParameterTable, lora: LoRAConfig) -> dict[str, np.ndarray]:
    """Factors of zero, fp32 [L, in, r] and [L, r, out], for every linear map that takes them."""
    values: dict[str, np.ndarray] = {}
    for row in table.adapted:
        (fan_in, fan_out), base = row.shape, row.path.removesuffix("kernel")
        values[f"{base}lora_a"] = np.zeros((row.layers or 0, fan_in, lora.rank), np.float32)
        values[f"{base}lora_b"] = np.zeros((row.layers or 0, lora.rank, fan_out), np.float32)
    return values


def is_peft(folder: Path) -> bool:
    """Whether ``folder`` holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


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
    seen: dict[tuple[str, int], set[str]] = {}
    for key, array in sorted(tensors.items()):  # read from bytes, they come in any order
        match = _KEY.fullmatch(key)
        slot = None if match is None else _adapted_slot(match["name"], table)
        if match is None or slot is None:
            raise ValueError(f"{file}: {key}: only LoRA on the decoder's linear maps is supported")
        i, factor, base = slot.layer or 0, match["factor"], slot.row.path.removesuffix("kernel")
        if i >= (slot.row.layers or 0):
            raise ValueError(f"{file}: {key}: the model has only {slot.row.layers} layers")
        target = values[f"{base}lora_{factor.lower()}"][i]
        array = array.astype(np.float32).T  # ours is [in, r] and [r, out]
        if array.shape != target.shape:
            raise ValueError(
                f"{file}: {key}: shape {list(array.shape[::-1])}, "
                f"expected {list(target.shape[::-1])}"
            )
        if factor in seen.setdefault((base, i), set()):
            raise ValueError(f"{file}: {key}: comes twice, under two prefixes")
        seen[base, i].add(factor)
        target[...] = array
    for (base, i), factors in seen.items():
        if factors != {"A", "B"}:
            name = base.rstrip(".").rpartition(".")[2]
            raise ValueError(
                f"{file}: layer {i} {name} has lora_{min(factors)} but not its partner"
            )
    if not seen:
        raise ValueError(f"{file}: holds no LoRA factors")
    return Adapter(lora=lora, values=values)


def _adapted_slot(name: str, table: ParameterTable) -> Slot | None:
    """The kernel that factors of this Hugging Face module stand beside, under any known prefix."""
    for row in table.adapted:
        pattern = name_pattern(row.hf.removesuffix(".weight"))
        for prefix in table.sections[row.section].prefixes:
            match = pattern.fullmatch(name.removeprefix(prefix))
            if match and name.startswith(prefix):
                return Slot(row, int(match["i"]))
    return None


def _read_config(file: Path) -> LoRAConfig:
    try:
        config = json.loads(file.read_text())
        options = {key: config[key] for key in _REFUSED if key in config}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
    except KeyError as error:
        raise ValueError(f"{file}: no {error.args[0]!r}; expected a PEFT LoRA config") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a PEFT LoRA config ({error})") from error
    for key, value in options.items():
        if value not in _REFUSED[key]:
            raise ValueError(f"{file}: {key} {value!r} is not supported")
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
            path = row.path.removesuffix("kernel") + f"lora_{factor.lower()}"
            for i, array in enumerate(adapter.values[path]):
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


def merge_into(slot: Slot, kernel: np.ndarray, adapter: Adapter) -> np.ndarray:
    """A stored array plus its LoRA update, fp32, for the caller to round.

    An array that takes no factors comes back as it is.
    """
    if not slot.row.lora or slot.layer is None:
        return kernel
    base = slot.row.path.removesuffix("kernel")
    a, b = (adapter.values[f"{base}lora_{x}"][slot.layer] for x in "ab")  # [in, r], [r, out]
    update: np.ndarray = a @ b  # [in, out]
    update *= np.float32(adapter.lora.scale)
    update += kernel
    return update
