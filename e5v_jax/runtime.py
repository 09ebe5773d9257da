"""Where a program runs: the one value that every module is built with beside its precision."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e5v_jax.sharding import BATCH_SPEC

Implementation = Literal["auto", "xla", "cudnn", "splash"]
"""auto: cudnn on a GPU and splash on a TPU where they apply and pay, else xla."""
_NEEDS = {"cudnn": "gpu", "splash": "tpu"}


@dataclass(frozen=True)
class Runtime:
    """The devices that a program is for, and what its attention runs on there."""

    mesh: Mesh
    platform: str  # "cpu", "gpu" or "tpu"
    attn_implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError on an attention implementation that does not exist on the platform."""
        name, known = self.attn_implementation, get_args(Implementation)
        if name not in known:
            raise ValueError(f"attn_implementation {name!r}: expected one of {', '.join(known)}")
        needed = _NEEDS.get(name, self.platform)
        if self.platform != needed:
            raise ValueError(
                f"attn_implementation {name!r} is for a {needed.upper()}, this runs on a "
                f"{self.platform.upper()}: choose auto or xla"
            )

    @classmethod
    def on(cls, mesh: Mesh, attn_implementation: Implementation = "auto") -> Self:
        """The runtime of a mesh of devices, which say what platform they are."""
        return cls(mesh, mesh.devices.flat[0].platform, attn_implementation)

    @property
    def batch_devices(self) -> int:
        """Devices that share a batch: its number of rows is a multiple of this."""
        return int(self.mesh.shape["data"] * self.mesh.shape["fsdp"])

    def split_batch(self, x: jax.Array) -> jax.Array:
        """Keep activations [B, ...] split along the batch.

        Without it XLA may split the features instead, as ``fsdp`` splits the weights, and add up
        every matmul's result over all devices: four times the traffic of gathering the weights.
        """
        if self.mesh.size == 1:
            return x
        spec = P(*BATCH_SPEC, *[P.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
