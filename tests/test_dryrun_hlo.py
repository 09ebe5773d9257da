"""Bytes read from compiled programs: loops counted, slices and on-chip memory told apart."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from e5v_jax.dryrun.hlo import count_traffic, type_bytes

# A loop of three rounds, as libtpu writes it: the bound is in the condition. Each round gathers a
# weight over four devices (shown in two fusions, as an asynchronous collective is), slices one of
# eight rows of a stack, and writes one; `kept` stays on chip.
HLO = """HloModule step, is_scheduled=true

%gather_start (p.1: bf16[4,64]) -> bf16[16,64] {
  %p.1 = WEIGHT parameter(0)
  ROOT %all-gather.1 = GATHERED all-gather(%p.1), channel_id=7, GROUPS
}

%gather_done (p.2: bf16[4,64]) -> bf16[16,64] {
  %p.2 = WEIGHT parameter(0)
  ROOT %all-gather.2 = GATHERED all-gather(%p.2), channel_id=7, GROUPS
}

%take (p.3: f32[8,128], p.4: s32[]) -> f32[1,128] {
  %p.3 = STACK parameter(0)
  %p.4 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,128]{1,0:T(8,128)} dynamic-slice(%p.3, %p.4, %zero)
}

%put (p.5: f32[8,128], p.6: f32[1,128], p.7: s32[]) -> f32[8,128] {
  %p.5 = STACK parameter(0)
  %p.6 = f32[1,128]{1,0:T(8,128)} parameter(1)
  %p.7 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %update = STACK dynamic-update-slice(%p.5, %p.6, %p.7, %zero.1)
}

%body (state: (s32[], f32[8,128], bf16[4,64])) -> (s32[], f32[8,128], bf16[4,64]) {
  %state = (INDEX, STACK, WEIGHT) parameter(0)
  %i = INDEX get-tuple-element(%state), index=0
  %stack = STACK get-tuple-element(%state), index=1
  %weight = WEIGHT get-tuple-element(%state), index=2
  %start = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} fusion(%weight), kind=kCustom, calls=%gather_start
  %done = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} fusion(%weight), kind=kCustom, calls=%gather_done
  %row = f32[1,128]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%take
  %kept = f32[1,128]{1,0:T(8,128)S(1)} negate(%row)
  %new = STACK fusion(%stack, %kept, %i), kind=kLoop, calls=%put
  ROOT %next = (INDEX, STACK, WEIGHT) tuple(%i, %new, %weight)
}

%condition (state.1: (s32[], f32[8,128], bf16[4,64])) -> pred[] {
  %state.1 = (INDEX, STACK, WEIGHT) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %i.1 = INDEX get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: s32[], b: f32[8,128], c: bf16[4,64]) -> f32[8,128] {
  %a = INDEX parameter(0)
  %b = STACK parameter(1)
  %c = WEIGHT parameter(2)
  %in = (INDEX, STACK, WEIGHT) tuple(%a, %b, %c)
  %loop = (INDEX, STACK, WEIGHT) while(%in), condition=%condition, body=%body
  ROOT %out = STACK get-tuple-element(%loop), index=1
}
"""
# The same with each fusion inside another one, as libtpu writes a sliced weight of a matmul on v6e.
NESTED = HLO.replace("calls=%take", "calls=%outer_take").replace("calls=%put", "calls=%outer_put")
NESTED = NESTED.replace(
    "%body (state",
    """%outer_take (p.8: f32[8,128], p.9: s32[]) -> f32[1,128] {
  %p.8 = STACK parameter(0)
  %p.9 = s32[]{:T(128)} parameter(1)
  ROOT %inner = f32[1,128]{1,0:T(8,128)} fusion(%p.8, %p.9), kind=kLoop, calls=%take
}

%outer_put (p.10: f32[8,128], p.11: f32[1,128], p.12: s32[]) -> f32[8,128] {
  %p.10 = STACK parameter(0)
  %p.11 = f32[1,128]{1,0:T(8,128)} parameter(1)
  %p.12 = s32[]{:T(128)} parameter(2)
  ROOT %inner.1 = STACK fusion(%p.10, %p.11, %p.12), kind=kLoop, calls=%put
}

%body (state""",
)
# And the stack in another layout before the slice, in place, as libtpu has it of 4-bit weights.
RELAID = HLO.replace("dynamic-slice(%p.3", "dynamic-slice(%relaid")
RELAID = RELAID.replace(
    "  %zero = s32[]",
    """  %relaid = STACK fusion(%p.3), kind=kLoop, calls=%relay
  %zero = s32[]""",
).replace(
    "%take (p.3",
    """%relay (p.13: f32[8,128]) -> f32[8,128] {
  %p.13 = STACK parameter(0)
  ROOT %copied = STACK copy(%p.13)
}

%take (p.3""",
)
_NAMES = {
    "STACK": "f32[8,128]{1,0:T(8,128)}",
    "WEIGHT": "bf16[4,64]{1,0:T(8,128)(2,1)}",
    "INDEX": "s32[]{:T(128)S(6)}",
    "GATHERED": "bf16[16,64]{1,0:T(8,128)(2,1)}",
    "GROUPS": "replica_groups=mesh['a'=4,'b'=2] {'a'}",
}


@pytest.mark.parametrize("hlo", [HLO, NESTED, RELAID], ids=["fused", "fused twice", "relaid"])
def test_loops_slices_and_collectives(hlo: str) -> None:
    for name, text in _NAMES.items():
        hlo = hlo.replace(name, text)
    traffic = count_traffic(hlo, devices=8)
    weight, row = 4 * 64 * 2, 128 * 4
    # three rounds: the weight read by both fusions; a row read, written, read again, written
    assert traffic.hbm_bytes == 3 * (2 * weight + row + row + row + row)
    # a ring of the four devices of axis a: each receives what the three others have, once
    assert traffic.collective_bytes == {"all-gather": 3 * 3 * weight}


def test_transfers_to_the_host() -> None:
    """Three rounds send a row and fetch one; the loop has three left of four, and counts from 1."""
    hlo = (
        HLO.replace(
            "  %row = f32[1,128]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%take",
            """  %fetch = ((STACK, s32[]), f32[1,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
dynamic-slice-start(%stack, %i)
  %row = f32[1,128]{1,0:T(8,128)} dynamic-slice-done(%fetch)""",
        )
        .replace(
            "  %new = STACK fusion(%stack, %kept, %i), kind=kLoop, calls=%put",
            """  %send = ((STACK, f32[1,128]{1,0:T(8,128)S(1)}, s32[]), STACK, u32[]{:S(2)}) \
dynamic-update-slice-start(%stack, %kept, %i)
  %new = STACK dynamic-update-slice-done(%send)""",
        )
        .replace("%bound = s32[]{:T(128)} constant(3)", "%bound = s32[]{:T(128)} constant(4)")
        .replace(
            "%in = (INDEX", "%one = INDEX constant(1)\n  %from = INDEX copy(%one)\n  %in = (INDEX"
        )
        .replace("tuple(%a, %b, %c)", "tuple(%from, %b, %c)")
    )
    names = {**_NAMES, "STACK": "f32[8,128]{1,0:T(8,128)S(5)}"}
    for name, text in names.items():
        hlo = hlo.replace(name, text)
    traffic = count_traffic(hlo, devices=8)
    weight, row = 4 * 64 * 2, 128 * 4
    assert traffic.host_bytes == 3 * 2 * row
    # the weight read twice, a row written here and read by negate; what is sent was on chip
    assert traffic.hbm_bytes == 3 * (2 * weight + 2 * row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[2,3]{1,0}", 12),
        ("u4[32,64]{1,0:T(8,128)(8,1)E(4)}", 1024),
        ("(f32[], /*index=1*/pred[8]{0})", 12),
        ("token[]", 0),
    ],
)
def test_sizes_of_types(text: str, expected: int) -> None:
    assert type_bytes(text) == expected


def test_bytes_of_a_program_without_loops_are_xlas() -> None:
    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tanh(x @ y) + 1

    x = jnp.ones((256, 256))
    compiled = jax.jit(f).lower(x, x).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert count_traffic(compiled.as_text(), devices=1).hbm_bytes == pytest.approx(
        expected, rel=0.01
    )


SHARDED = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from e5v_jax.dryrun.hlo import count_traffic
from e5v_jax.sharding import make_mesh
mesh = make_mesh()
def put(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
x, w = put((64, 128), P("fsdp")), put((5, 128, 128), P(None, "fsdp"))
def f(x, w):
    def body(h, w):
        whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.tanh(h @ whole), None
    return jax.lax.scan(body, x, w)[0]
text = jax.jit(f).lower(x, w).compile().as_text()
print(json.dumps(count_traffic(text, devices=8).collective_bytes))
"""


def test_gathered_weights_of_a_real_program() -> None:
    """Five layers, each gathered over eight devices, in a loop."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"all-gather": 5 * 128 * 128 * 4 * 7 / 8}
