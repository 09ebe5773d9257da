"""Sharding changes where arrays are, not what comes out: 8 virtual devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hf_models import Recipe, build_text

from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.presets import ARCHITECTURES
from e5v_jax.sharding import make_mesh

TABLE = LLAVA_NEXT.parameters(ARCHITECTURES["llava-next-llama3-8b"])

TESTS = Path(__file__).parent
# every axis divides by 8; scales of nf4 have 128 / 64 = 2 rows
RECIPE = Recipe(
    template="chatml",
    text={
        "vocab_size": 264,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "initializer_range": 0.1,
    },
    seed=21,
)


@pytest.mark.parametrize(
    ("meshes", "count"), [("some", 5), pytest.param("all", 12, marks=pytest.mark.slow)]
)
def test_every_mesh_of_eight_devices_gives_the_step_of_one(
    meshes: str, count: int, tmp_path: Path
) -> None:
    build_text(RECIPE, tmp_path / "hf")
    # level 0: many programs are compiled, and hardly run
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    done = subprocess.run(
        [sys.executable, TESTS / "mesh_shapes.py", tmp_path / "hf", meshes],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == count
    for result in results:
        assert abs(result["loss"]) <= 1e-5, result
        assert result["gradients"] <= 1e-5, result
        assert result["misplaced"] == [], result
        if "quantization" in result["options"]:
            assert result["gathered"] == ["u8"], result  # codes of nf4, a byte each on CPUs


def test_mesh_fills_in_one_size() -> None:
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {
        "data": 1,
        "fsdp": len(jax.devices()),
        "tensor": 1,
    }
    with pytest.raises(ValueError, match=r"mesh data=3 fsdp=1 tensor=1 does not fit"):
        make_mesh(data=3, fsdp=1)


def test_a_parameter_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lm_head\.kernel: no row in the family's parameters"):
        TABLE.spec("lm_head.kernel", 2)
    with pytest.raises(ValueError, match=r"has 1 axes, array has 2"):
        TABLE.spec("language_model.norm.scale", 2)


def test_an_axis_of_size_one_is_never_split() -> None:
    """The scales of int8 kernels: [layers, 1, out]."""
    mesh = make_mesh()
    name = "language_model.layers.mlp.up_proj.kernel"
    assert TABLE.sharding(name, (2, 1, 128), mesh).spec == jax.P(None, None, "tensor")
    assert TABLE.sharding(name, (2, 128, 128), mesh).spec == jax.P(None, "fsdp", "tensor")
