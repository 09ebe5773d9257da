"""What a backward pass keeps of each decoder layer, and where; the rest is computed again."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal[
    "none",
    "dots",
    "dots_except_o",
    "dots_except_mlp",
    "full",
    "offload_dots",
    "offload_dots_except_mlp",
    "offload_full",
]
"""What is kept of each layer: everything, what its linear maps give (all of them, or without the
attention's last, or without the MLP's), or its input; with ``offload`` in the host's memory, and
the layer's input with it."""

# what jax.ad_checkpoint.checkpoint_name calls them
INPUT, QKV_PROJ, O_PROJ, MLP = "layer_input", "qkv_proj", "o_proj", "mlp"
LOW_RANK = "low_rank"  # LoRA's inner vectors
KEPT: dict[Remat, tuple[str, ...]] = {
    "dots": (LOW_RANK, QKV_PROJ, O_PROJ, MLP),
    "dots_except_o": (LOW_RANK, QKV_PROJ, MLP),
    "dots_except_mlp": (LOW_RANK, QKV_PROJ, O_PROJ),
}
"""Names of what is kept of a layer, where it is neither everything nor its input alone."""
OFFLOADED: dict[Remat, tuple[str, ...]] = {
    "offload_dots": (INPUT, *KEPT["dots"]),
    "offload_dots_except_mlp": (INPUT, *KEPT["dots_except_mlp"]),
    "offload_full": (INPUT,),
}
"""Names of what goes to the host's memory, from where the backward pass fetches it."""


def rematerialise(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Make a backward pass through ``layer``, the body of a scan, keep what ``remat`` says."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = None  # its inputs
    if remat in KEPT:
        policy = policies.save_only_these_names(*KEPT[remat])
    elif remat in OFFLOADED:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(OFFLOADED[remat]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)
