"""SmolLM2-135M on the triplets that ship with the project: minutes on two CPU cores, about 4 GB."""

from e5v_jax.demo.config import get_config

__all__ = ["get_config"]
