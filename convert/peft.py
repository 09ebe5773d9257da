"""PEFT LoRA adapters: read into stacked factors, written back from them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from convert.names import PREFIXES
from e5v_jax.config import TextConfig
from e5v_jax.model.layers import LoRAConfig
from e5v_jax.storage import as_path

PROJECTIONS: dict[str, str] = {
    **{f"{x}_proj": "self_attn" for x in "qkvo"},
    **{f"{x}_proj": "mlp" for x in ("gate", "up", "down")},
}
"""Every linear map of a decoder layer -> the module that holds it."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_KEY = re.compile(
    rf"base_model\.model\.({'|'.join(map(re.escape, PREFIXES['text']))})"
    r"layers\.(?P<i>\d+)\.(?P<module>[a-z_]+)\.(?P<proj>[a-z]+_proj)"
    r"\.lora_(?P<factor>[AB])(?:\.default)?\.weight"
)

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


def _sizes(cfg: TextConfig) -> dict[str, tuple[int, int]]:
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    q, kv = cfg.num_attention_heads * h, cfg.num_key_value_heads * h
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }


def is_peft(folder: Path) -> bool:
    """Whether ``folder`` holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path, cfg: TextConfig) -> Adapter:
    """Read a PEFT LoRA folder for a decoder of ``cfg``; untouched linear maps get zero factors.

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
    rank = lora.rank
    layers, values = cfg.num_hidden_layers, {}
    shapes: dict[tuple[str, str], tuple[int, int]] = {}
    for proj, (fan_in, fan_out) in _sizes(cfg).items():
        path = f"language_model.layers.{PROJECTIONS[proj]}.{proj}"
        shapes[proj, "A"], shapes[proj, "B"] = (fan_in, rank), (rank, fan_out)
        values[f"{path}.lora_a"] = np.zeros((layers, fan_in, rank), np.float32)
        values[f"{path}.lora_b"] = np.zeros((layers, rank, fan_out), np.float32)
    file = folder / "adapter_model.safetensors"
    try:
        tensors = safetensors.numpy.load(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from error
    seen: dict[tuple[str, int], set[str]] = {}
    for key, array in sorted(tensors.items()):  # read from bytes, they come in any order
        match = _KEY.fullmatch(key)
        if not match or PROJECTIONS.get(match["proj"]) != match["module"]:
            raise ValueError(f"{file}: {key}: only LoRA on the decoder's linear maps is supported")
        proj, factor, i = match["proj"], match["factor"], int(match["i"])
        if i >= layers:
            raise ValueError(f"{file}: {key}: the model has only {layers} layers")
        array = array.astype(np.float32).T  # ours is [in, r] and [r, out]
        if array.shape != shapes[proj, factor]:
            raise ValueError(
                f"{file}: {key}: shape {list(array.shape[::-1])}, "
                f"expected {list(shapes[proj, factor][::-1])}"
            )
        if factor in seen.setdefault((proj, i), set()):
            raise ValueError(f"{file}: {key}: comes twice, under two prefixes")
        seen[proj, i].add(factor)
        path = f"language_model.layers.{PROJECTIONS[proj]}.{proj}.lora_{factor.lower()}"
        values[path][i] = array
    for (proj, i), factors in seen.items():
        if factors != {"A", "B"}:
            raise ValueError(
                f"{file}: layer {i} {proj} has lora_{min(factors)} but not its partner"
            )
    if not seen:
        raise ValueError(f"{file}: holds no LoRA factors")
    return Adapter(lora=lora, values=values)


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
    folder: Path, adapter: Adapter, *, text_only: bool, base_model: str | None = None
) -> None:
    """Write a PEFT LoRA folder that ``PeftModel.from_pretrained`` loads.

    ``text_only``: the base is ``AutoModelForCausalLM``; else LLaVA-NeXT of transformers 5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = "model." if text_only else "model.language_model."
    tensors: dict[str, np.ndarray] = {}
    for path, stacked in adapter.values.items():
        module, factor = path.removeprefix("language_model.layers.").rsplit(".lora_", 1)
        for i, array in enumerate(stacked):
            key = f"base_model.model.{head}layers.{i}.{module}.lora_{factor.upper()}.weight"
            tensors[key] = np.ascontiguousarray(array.T.astype(np.float32))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if text_only else None,
        "base_model_name_or_path": base_model,
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": adapter.lora.dropout,
        # a regular expression, so that the vision tower's q_proj is left alone
        "target_modules": rf".*{re.escape(head)}layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj",
        "bias": "none",
        "inference_mode": True,
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def merge_into(name: str, kernel: np.ndarray, adapter: Adapter) -> np.ndarray:
    """Our per-layer kernel [in, out] plus its LoRA update, fp32, for the caller to round.

    ``name`` is the per-layer parameter name; a parameter without factors comes back as it is.
    """
    match = re.fullmatch(r"language_model\.layers\.(\d+)\.(.*)\.kernel", name)
    if not match:
        return kernel
    path = f"language_model.layers.{match[2]}"
    a = adapter.values[f"{path}.lora_a"][int(match[1])]  # [in, r]
    b = adapter.values[f"{path}.lora_b"][int(match[1])]  # [r, out]
    update = a @ b  # [in, out]
    update *= np.float32(adapter.lora.scale)
    update += kernel
    return update
