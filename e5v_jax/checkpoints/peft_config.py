"""adapter_config.json of a PEFT LoRA folder: what is followed, refused, or cannot matter."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.nn.layers import LoRAConfig

# Values of options under which a peft adapter computes x + scale * x A B and nothing else.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (None, [])),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "use_bdlora"), (None,)),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), (None,)),
    **dict.fromkeys(("velora_config", "monteclora_config", "enable_lora"), (None,)),
    # the other initialisations change the base weights as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_rslora": (True, False, None),
}
_IGNORED = {
    **dict.fromkeys(
        ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"),
        "what it was made with; whether it fits, its keys and shapes say",
    ),
    **dict.fromkeys(("inference_mode", "merge_weights", "runtime_config"), "how peft runs it"),
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        "of init_lora_weights: how training began",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "how training was split over devices"),
    "qalora_group_size": "of use_qalora, which is refused",
    "ensure_weight_tying": "of embeddings and heads, which are refused",
}
_FOLLOWED = ("r", "lora_alpha", "lora_dropout")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_MAX_ALPHA = 1e6  # beyond, fp32 has no digits left for the base weights


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter's factors mean, and which modules have them."""

    lora: LoRAConfig
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def targets(self, module: str) -> bool:
        """Whether peft puts factors at ``module`` (``check_target_module_exists`` there)."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if not _matches(self.target_modules, module):
            return False
        layers = self.layers_to_transform
        if isinstance(self.target_modules, str) or layers is None or layers == []:
            return True
        # without a pattern, any; then peft wants something before it
        patterns = self.layers_pattern or [r".*?\.[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            start = rf"(?:^|.*?\.){pattern}" if self.layers_pattern else pattern
            if found := re.match(rf"{start}\.(?P<layer>\d+)\.", module):
                layer = int(found["layer"])
                return layer in ([layers] if isinstance(layers, int) else layers)
        return False


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_peft_config(file: Path) -> PeftConfig:
    """Read adapter_config.json.

    Raises FileNotFoundError: it is not there; ValueError: no such file, or a key by its name that
    is missing, unknown or asks for something else.
    """
    config = read_json(file)
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise ValueError(f"{file}: no {key!r}; expected a PEFT LoRA config")
    for key, value in config.items():
        if key in _ACCEPTED and (value, type(value)) not in [(x, type(x)) for x in _ACCEPTED[key]]:
            raise ValueError(f"{file}: {key} {value!r} is not supported")
        if key not in (*_ACCEPTED, *_IGNORED, *_FOLLOWED, *_TARGETS):
            raise ValueError(f"{file}: {key} is {value!r}: this option is not known")
    rank, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r is {rank!r}: expected a whole number from 1")
    for key, number, low, high in (
        ("lora_alpha", alpha, -_MAX_ALPHA, _MAX_ALPHA),
        ("lora_dropout", dropout, 0, 1),
    ):
        if type(number) not in (int, float) or not low <= number <= high:
            raise ValueError(f"{file}: {key} is {number!r}: expected a number, {low:g} to {high:g}")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rank-stabilised: scale is alpha / sqrt(r)
    lora = LoRAConfig(rank=rank, alpha=float(alpha), dropout=float(dropout))
    found = PeftConfig(lora, **{key: config[key] for key in _TARGETS if key in config})
    _check_targets(found, file)
    return found


def _check_targets(config: PeftConfig, file: Path) -> None:
    for key in _TARGETS:
        value = getattr(config, key)
        kind = int if key == "layers_to_transform" else str
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(item) is not kind for item in items):
            raise ValueError(f"{file}: {key} is {value!r}: expected a {kind.__name__} or a list")
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if isinstance(config.target_modules, str) and (layers is not None or pattern is not None):
        raise ValueError(f"{file}: layers_to_transform and layers_pattern need a list of modules")
    if pattern and layers is None:
        raise ValueError(f"{file}: layers_pattern is {pattern!r} without layers_to_transform")
    try:
        config.targets("model.layers.0.self_attn.q_proj")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{file}: a pattern cannot be read: {error}") from error
