"""Scaled dot-product attention behind one function: XLA, cuDNN's flash kernel, TPU's splash kernel.

The runtime's platform, the dtype and the shape choose while a program is traced; the runtime's
``attn_implementation`` overrides that wherever the one it names computes what is asked. The kernels
take as many queries as keys: attention of the last layer's one query is XLA's on every device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from e5v_jax.nn.layers import Precision
from e5v_jax.runtime import Implementation, Runtime
from e5v_jax.sharding import BATCH_SPEC

SPLASH_BLOCK = 128
"""Splash attention needs a multiple of this many positions and of head features."""
QUERY_BLOCK = 1024  # queries whose logits exist at a time
# On a CPU their logits stay in the cache: 2 to 3 times as fast as all at once. Without a causal
# mask, which shortens small blocks, larger ones of one row at a time are faster.
_QUERY_BLOCK_CPU, _QUERY_BLOCK_CPU_FULL = 128, 256
_CUDNN_MIN_LENGTH = 128  # the logits of shorter texts are small: one fused XLA loop
_SPLASH_MIN_PATCHES = 1024  # of a tower: up to there the logits of one block of queries hold all


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool,
    precision: Precision,
    runtime: Runtime,
    key_lengths: jax.Array | None = None,
    segment: jax.Array | None = None,
) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N, H]; N is a multiple of K.

    Right-padded batches need no mask under the causal one: no real token sees what is right of it.
    Without that, ``key_lengths`` int32 [B] says that keys from there on are not seen; what comes
    out for queries from there on means nothing, but is finite. Under the causal mask, ``segment``
    int32 [B, T] says that a key is seen only from its own segment, or from all if its is 0; XLA
    computes that on every device. Raises ValueError: splash was asked for, and the shape does not
    fit it, causal attention with ``key_lengths``, or attention that is not with ``segment``.
    """
    if is_causal and key_lengths is not None:
        raise ValueError("causal attention takes no key_lengths: pad on the right")
    if segment is not None and not is_causal:
        raise ValueError("segments are for causal attention")
    chosen, platform = runtime.attn_implementation, runtime.platform
    tiles = chosen == "splash" and not is_causal and key_lengths is None  # no multiple of 128
    if q.shape[1] != k.shape[1] or tiles or segment is not None:  # the first: the pooled query
        chosen = "xla"
    elif chosen == "auto":
        chosen = _choose(q, platform, is_causal=is_causal, is_masked=key_lengths is not None)
    if chosen == "splash":
        return _splash(q, k, v, key_lengths, runtime)
    if chosen == "cudnn":
        return _cudnn(q, k, v, key_lengths, is_causal=is_causal)
    on_cpu = platform == "cpu"
    if is_causal:
        block = _QUERY_BLOCK_CPU if on_cpu else QUERY_BLOCK
        return _causal(q, k, v, segment, precision=precision, block=block)
    block = _QUERY_BLOCK_CPU_FULL if on_cpu else QUERY_BLOCK
    full = partial(_full, precision=precision, block=block)
    if not on_cpu or runtime.mesh.size > 1 or 1 in q.shape[:2]:  # one row, or the pooled query
        return full(q, k, v, key_lengths)
    rows = jax.tree.map(lambda x: x[:, None], (q, k, v, key_lengths))  # each a batch of one
    return jax.lax.map(lambda row: full(*row), rows)[:, 0]


def _choose(q: jax.Array, backend: str, *, is_causal: bool, is_masked: bool) -> Implementation:
    """What attention of queries [B, T, N, H] over as many keys runs on."""
    _, t, _, h = q.shape
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # jax 0.11.2 refuses the backward pass of an odd length (CLIP's 577)
    if backend == "gpu" and half and t >= _CUDNN_MIN_LENGTH and t % 2 == 0:
        return "cudnn" if h % 8 == 0 and h <= 128 else "xla"
    if backend == "tpu" and q.dtype != jnp.float16:
        if is_causal and t % SPLASH_BLOCK == 0 == h % SPLASH_BLOCK:
            return "splash"
        if is_masked and t >= _SPLASH_MIN_PATCHES:
            return "splash"
    return "xla"


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, *, is_causal: bool
) -> jax.Array:
    """cuDNN's flash attention, which skips the blocks of padding."""
    run = partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=is_causal)
    if lengths is None:
        return run(q, k, v)
    lengths = jnp.maximum(lengths.astype(jnp.int32), 1)  # a softmax over nothing is not finite
    out = run(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    real = jnp.arange(q.shape[1]) < lengths[:, None]  # [B, T]
    return jnp.where(real[..., None, None], out, 0)  # what cuDNN leaves there is not defined


def _causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array | None,
    *,
    precision: Precision,
    block: int,
) -> jax.Array:
    """Blocks of queries, each with only the keys up to its end."""
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, S, H]
    out = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]  # [T', S']
        if segment is not None:
            own, seen = segment[:, start:end, None], segment[:, None, :end]
            visible = (visible & ((seen == 0) | (seen == own)))[:, None, None]  # [B, 1, 1, T', S']
        out.append(
            attend_block(q[:, start:end], keys[:, :, :end], values[:, :, :end], visible, precision)
        )
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def _full(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_lengths: jax.Array | None,
    *,
    precision: Precision,
    block: int,
) -> jax.Array:
    """Blocks of queries, each with all keys that are no padding."""
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, S, H]
    visible = None
    if key_lengths is not None:
        visible = jnp.arange(k.shape[1]) < key_lengths[:, None, None, None, None]
    return _map_blocks(lambda part: attend_block(part, keys, values, visible, precision), q, block)


def _map_blocks(f: Callable[[jax.Array], jax.Array], q: jax.Array, block: int) -> jax.Array:
    """``f`` of blocks of queries [B, T, N, H], one after the other: few logits exist at a time.

    XLA is free to compute blocks of an unrolled loop side by side, and does so on CPUs: of an image
    of 7200 patches all logits at once, 5 GB.
    """
    b, t, n, h = q.shape
    count = -(-t // block)
    if count == 1:
        return f(q)
    size = -(-t // count)
    q = jnp.pad(q, ((0, 0), (0, count * size - t), (0, 0), (0, 0)))
    out = jax.lax.map(f, q.reshape(b, count, size, n, h).swapaxes(0, 1))  # [count, B, size, N, H]
    return out.swapaxes(0, 1).reshape(b, count * size, n, h)[:, :t]


def attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None, precision: Precision
) -> jax.Array:
    """Queries [B, T, N, H] over k, v [B, K, S, H]; plain batched matmuls, fast on every device."""
    b, t, n, h = q.shape
    kv_heads, s = k.shape[1], k.shape[2]
    groups = n // kv_heads
    q = q.reshape(b, t, kv_heads, groups, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    q = q.reshape(b, kv_heads, groups * t, h)
    logits = jnp.matmul(
        q, k.swapaxes(2, 3), precision=precision.matmul, preferred_element_type=jnp.float32
    )  # [B, K, G*T, S], fp32 through the softmax
    logits = logits.reshape(b, kv_heads, groups, t, s) * h**-0.5
    if visible is not None:
        logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # divides what comes out: S times less to divide
    weights = weights.reshape(b, kv_heads, groups * t, s).astype(v.dtype)
    out = jnp.matmul(weights, v, precision=precision.matmul, preferred_element_type=jnp.float32)
    out = out.reshape(b, kv_heads, groups, t, h) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(v.dtype)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, runtime: Runtime
) -> jax.Array:
    """Splash attention, causal without ``lengths``; each device does its own rows and heads."""
    t, h = q.shape[1], q.shape[3]
    if lengths is None and (t % SPLASH_BLOCK or h % SPLASH_BLOCK):
        raise ValueError(
            f"attn_implementation splash needs sequences and heads that are multiples of "
            f"{SPLASH_BLOCK}, found {t} positions and heads of {h}: choose auto or xla"
        )
    # on a CPU, where tests follow a program for a TPU, Pallas interprets it
    local = partial(_splash_local, interpret=runtime.mesh.devices.flat[0].platform == "cpu")
    operands = (q, k, v) if lengths is None else (q, k, v, lengths)
    if runtime.mesh.size == 1:
        return local(*operands)
    spec = P(*BATCH_SPEC, None, "tensor", None)
    split = jax.shard_map(
        local,
        mesh=runtime.mesh,
        in_specs=(spec, spec, spec, BATCH_SPEC)[: len(operands)],
        out_specs=spec,
        check_vma=False,
    )
    return split(*operands)


def _splash_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None = None,
    *,
    interpret: bool,
) -> jax.Array:
    # here and not above: only TPU programs need it
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    *_, size, _, h = q.shape
    rest = (-size % SPLASH_BLOCK, -h % SPLASH_BLOCK)  # of patches and tower heads: masked, zeros
    padding = [(0, 0), (0, rest[0]), (0, 0), (0, rest[1])]
    scaled = (q.astype(jnp.float32) * np.float32(h**-0.5)).astype(q.dtype)  # it does not scale
    q, k, v = (jnp.pad(x, padding) for x in (scaled, k, v))
    b, t, n, _ = q.shape
    groups = n // k.shape[2]
    causal, full = splash_attention_mask.CausalMask, splash_attention_mask.FullMask
    mask = (causal if lengths is None else full)((t, t))
    block = next(size for size in (512, 256, SPLASH_BLOCK) if t % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([mask] * groups),
        block_sizes=blocks,
        interpret=interpret,
    )
    grouped = q.reshape(b, t, -1, groups, q.shape[3]).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, T, H]
    segments = None
    if lengths is not None:  # padding sees padding only, and nobody else does
        real = (jnp.arange(t) < lengths[:, None]).astype(jnp.int32)  # [B, T]
        segments = splash_attention_kernel.SegmentIds(real, real)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(heads)(grouped, keys, values, segments)  # [B, K, G, T, H]
    return out[..., :size, :h].transpose(0, 3, 1, 2, 4).reshape(b, size, n, h)
