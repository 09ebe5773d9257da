"""Floating-point operations: counted in the traced program, and by hand from the parameters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Var

from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.nf4_tiles import KERNEL
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.nn.remat import Remat


def traced_flops(
    jaxpr: Any, known: Mapping[Any, Any] | None = None, *, operands: Any = None
) -> float:
    """FLOPs of all matmuls and convolutions of a jaxpr, each as often as its loops run it.

    Of the whole program, over all devices: 2 per multiply-add. Element-wise work is left out, as in
    the hand count. (XLA's own cost analysis counts the body of a loop once.) Of a choice between
    branches the mean of those taken counts where a loop runs over constants that say which, as over
    a tower's blocks with windows and without; else the larger one. ``known`` are values of the
    jaxpr's variables, in a loop those of all turns. ``operands`` is a dtype: only matmuls of it
    count.
    Raises ValueError: a matmul in a loop of unknown length, or an unknown kernel.
    """
    total, known = 0.0, {**(known or {}), **_constants(jaxpr)}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            if operands is not None and eqn.invars[0].aval.dtype != operands:
                continue
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
            total += 2.0 * summed * math.prod(eqn.outvars[0].aval.shape)
        elif name in ("conv_general_dilated", "pallas_call"):
            if operands is None:
                total += _kernel_flops(eqn) if name == "pallas_call" else _convolution_flops(eqn)
        elif name == "shard_map":  # its shapes are those of one device
            total += eqn.params["mesh"].size * traced_flops(eqn.params["jaxpr"], operands=operands)
        elif name == "cond":
            costs = [traced_flops(branch, operands=operands) for branch in eqn.params["branches"]]
            taken = _value(eqn.invars[0], known)
            total += max(costs) if taken is None else float(np.mean(np.take(costs, taken)))
        elif name == "convert_element_type":  # of the flag that chooses a branch
            if (value := _value(eqn.invars[0], known)) is not None:
                known[eqn.outvars[0]] = np.asarray(value, eqn.params["new_dtype"])
        elif name == "while":
            if traced_flops(eqn.params["body_jaxpr"], operands=operands):
                raise ValueError("matmuls in a loop of unknown length")
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inside in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
                if (found := eqn.params.get(inside)) is not None:
                    inner = found.jaxpr if isinstance(found, ClosedJaxpr) else found
                    # what a loop carries changes: of its inputs those that it runs over are known
                    first = eqn.params["num_consts"] + eqn.params["num_carry"] if times > 1 else 0
                    values = {
                        own: value
                        for given, own in zip(
                            eqn.invars[first:], inner.invars[first:], strict=False
                        )
                        if (value := _value(given, known)) is not None
                    }
                    total += times * traced_flops(found, values, operands=operands)
    return total


def _constants(jaxpr: Any) -> dict[Any, Any]:
    """The values of the variables of a jaxpr that are constants: small ones, as flags are."""
    if not isinstance(jaxpr, ClosedJaxpr):
        return {}
    pairs = zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    return {var: value for var, value in pairs if var.aval.ndim == 1}


def _value(var: Any, known: Mapping[Any, Any]) -> Any:
    return known.get(var) if isinstance(var, Var) else None  # a literal is no key


_SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}  # the backward kernels compute the scores again


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    per_output = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * per_output * math.prod(eqn.outvars[0].aval.shape)


def _kernel_flops(eqn: Any) -> float:
    """Count a kernel of splash attention, which skips what a causal mask hides: half.

    A tower's is not causal but told from segments, padding's and the image's. One that dequantises
    has no matmul.
    """
    name = eqn.params["name"]
    if name == KERNEL:
        return 0.0
    matmuls = next((n for kind, n in _SPLASH_MATMULS.items() if f"_{kind}" in name), None)
    if "splash" not in name or matmuls is None:
        raise ValueError(f"unknown Pallas kernel {name}: give its FLOPs here")
    # queries or their like, [..., T, H]: no operand is larger
    queries = max((v.aval.shape for v in (*eqn.invars, *eqn.outvars)), key=math.prod)
    seen = 1.0 if "segmented" in name else 0.5
    return seen * matmuls * 2.0 * math.prod(queries) * queries[-2]


@dataclass(frozen=True)
class HandCount:
    """FLOPs of one forward pass by formula: 2 per weight and token, and the attention's."""

    decoder: float  # all linear maps of the decoder
    lora: float
    attention: float  # scores and their product with the values; half of it under the causal mask
    vision: float  # tower and projector
    down: float  # the base's part of decoder in the last linear map of each layer
    o: float  # and in the attention's last one
    gate_up: float  # and in the MLP's first two

    @property
    def forward(self) -> float:
        """All of it."""
        return self.decoder + self.lora + self.attention + self.vision


def matmul_parameters(table: ParameterTable, *names: str) -> int:
    """Weights of the decoder's linear maps (6.98e9 in Llama-3-8B), or of those called ``names``."""
    return sum(
        math.prod(row.shape) * (row.layers or 1)
        for row in table.adapted
        if not names or row.path.split(".")[-2] in names
    )


def lora_parameters(table: ParameterTable, lora: LoRAConfig) -> int:
    """Weights of the factors of all linear maps of every layer."""
    return sum(lora.rank * sum(row.shape) * (row.layers or 1) for row in table.adapted)


def count_forward(
    family: Family,
    config: ModelConfig,
    *,
    rows: int,
    length: int,
    lora: LoRAConfig | None = None,
    shape_key: int = 0,
    causal_half: bool = False,
    pooled_only: bool = False,
) -> HandCount:
    """One forward pass over ``rows`` sequences of ``length`` positions, padding included.

    ``shape_key`` is that of each one's image, 0 without. ``causal_half`` counts only the scores
    that the mask lets through, as a kernel that skips blocks does; a plain matmul computes all.
    ``pooled_only`` leaves out of the last layer what only other tokens than the pooled one need, as
    the encoder does: all but its keys and values.
    """
    table, text, tokens = family.parameters(config), config.text, rows * length
    decoder = 2.0 * matmul_parameters(table) * tokens
    layers = text.num_hidden_layers
    if pooled_only:
        others = matmul_parameters(table) - matmul_parameters(table, "k_proj", "v_proj")
        decoder -= 2.0 * (others // layers) * (tokens - rows)
        layers -= 1  # one query costs next to nothing
    scores = 4.0 * layers * text.num_attention_heads * text.head_dim
    return HandCount(
        decoder=decoder,
        lora=0.0 if lora is None else 2.0 * lora_parameters(table, lora) * tokens,
        attention=scores * tokens * length * (0.5 if causal_half else 1.0),
        vision=family.image_cost(config, rows if shape_key else 0, shape_key, 2).flops,
        down=2.0 * matmul_parameters(table, "down_proj") * tokens,
        o=2.0 * matmul_parameters(table, "o_proj") * tokens,
        gate_up=2.0 * matmul_parameters(table, "gate_proj", "up_proj") * tokens,
    )


def train_flops(forward: HandCount, *, frozen_base: bool, remat: Remat, chunked: bool) -> float:
    """A step by hand: forward, backward, and what is computed again.

    The backward pass costs one forward for the activations' gradients and one for those of trained
    weights: of a frozen base only its LoRA factors. Attention has two operands, both with a
    gradient. Full rematerialisation computes each layer once more, up to its last linear map, whose
    output no gradient needs, and of what ``dots`` keeps what is left out; gradient caching computes
    each chunk once more before that.
    """
    trained = forward.decoder * (2 if frozen_base else 3) + 3 * (forward.lora + forward.attention)
    again = forward.forward if chunked else 0.0
    if remat in ("full", "offload_full"):
        again += forward.forward - forward.down
    elif remat == "dots_except_o":
        again += forward.o
    elif remat in ("dots_except_mlp", "offload_dots_except_mlp"):
        again += forward.gate_up
    return trained + again
