"""The Qwen-VL towers: patches of one image a row, at its own resolution, to tokens of the decoder.

Reference: transformers' ``Qwen3VLVisionModel``, ``Qwen2_5_VisionTransformerPretrainedModel`` and
``Qwen2VisionTransformerPretrainedModel``. Rows are padded with patches whose place is below zero;
they come last, are no key of any attention, and are merged among themselves.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e5v_jax.families.base import Array
from e5v_jax.families.qwen_vl.vision_blocks import PatchMerger, Seen, VisionBlock
from e5v_jax.families.qwen_vl.vision_config import QWEN3, QwenVisionConfig
from e5v_jax.nn.layers import Build
from e5v_jax.nn.rope import rope_angles, rope_frequencies

FRAMES = 2  # of a patch of the reference; a still image repeats


class Patches(NamedTuple):
    """Images as the tower takes them, one a row."""

    pixels: Array  # uint8 [B, P, 3*p*p]
    place: Array  # int16 [B, P, 2], row and column of each patch; below 0 is padding
    grid: Array  # int32 [B, 2], patches (rows, columns) of the image


class PatchEmbedding(nnx.Module):
    """Pixels to features: one linear map, which the reference has once for each frame."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        inputs, dtype = 3 * FRAMES * cfg.patch_size**2, jnp.dtype(build.precision.param)
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, cfg.hidden_size), dtype))
        self.use_bias = cfg.model_type == QWEN3
        if self.use_bias:
            self.bias = nnx.Param(jnp.zeros((cfg.hidden_size,), dtype))
        self.mean, self.std = cfg.kind.mean, cfg.kind.std
        self.precision = build.precision

    def __call__(self, pixels: Array) -> jax.Array:
        """uint8 [B, P, 3*p*p] -> [B, P, D]."""
        dtype, d = self.precision.compute, self.kernel.shape[1]
        area = pixels.shape[2] // 3  # of a channel
        mean, std = (np.repeat(np.array(x, np.float32), area) for x in (self.mean, self.std))
        values = (jnp.asarray(pixels, jnp.float32) / 255.0 - mean) / std
        frames = self.kernel[...].astype(jnp.float32).reshape(3, FRAMES, -1, d)
        kernel = frames.sum(axis=1).reshape(-1, d)  # both frames are the same pixels: fp32
        y = jnp.matmul(
            values.astype(dtype), kernel.astype(dtype), precision=self.precision.matmul
        )  # [B, P, D]
        return y + self.bias[...].astype(dtype) if self.use_bias else y


def interpolation(place: jax.Array, grid: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Which rows of a table [side * side] each patch takes, and how much: int32, fp32 [B, P, 4].

    The table is stretched over the image, corner on corner, and read bilinearly (reference:
    ``get_vision_interpolation_indices_and_weights`` with align_corners).
    """
    steps = jnp.maximum(grid - 1, 1)[:, None].astype(jnp.float32)  # [B, 1, 2]
    at = place.astype(jnp.float32) * (side - 1) / steps  # [B, P, 2]
    low = jnp.floor(at)
    part = at - low
    taps = jnp.clip(jnp.stack([low, low + 1], axis=-1), 0, side - 1).astype(jnp.int32)
    weights = jnp.stack([1 - part, part], axis=-1)  # [B, P, 2 axes, 2 taps]
    index = taps[:, :, 0, :, None] * side + taps[:, :, 1, None]  # [B, P, 2, 2]
    weight = weights[:, :, 0, :, None] * weights[:, :, 1, None]
    return index.reshape(*index.shape[:2], 4), weight.reshape(*weight.shape[:2], 4)


class QwenVision(nnx.Module):
    """The tower with all its mergers."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        init, dtype = jax.nn.initializers.normal(0.02), jnp.dtype(build.precision.param)
        self.patch_embed = PatchEmbedding(cfg, build, rngs=rngs)
        if cfg.num_position_embeddings is not None:
            table = (cfg.num_position_embeddings, cfg.hidden_size)
            self.pos_embed = nnx.Param(init(rngs.params(), table, dtype))
        self.blocks = jax.vmap(lambda key: VisionBlock(cfg, build, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), cfg.depth)
        )
        plain = Build(build.precision.unquantized, build.runtime)  # beside the blocks
        self.merger = PatchMerger(cfg, plain, rngs=rngs, norm_merged=False)
        self.num_deep = len(cfg.deepstack_visual_indexes)
        if self.num_deep:
            deep = partial(PatchMerger, cfg, plain, norm_merged=True)
            self.deepstack_merger_list = jax.vmap(lambda key: deep(rngs=nnx.Rngs(params=key)))(
                jax.random.split(rngs.params(), self.num_deep)
            )
        self.cfg, self.precision, self.runtime = cfg, build.precision, build.runtime

    def __call__(self, patches: Patches) -> tuple[jax.Array, jax.Array | None]:
        """Tokens of each image [B, N, out]; also [B, J, N, out] for the decoder's first J layers.

        N is P over the patches of a token; those of padding are no image's.
        """
        place = jnp.asarray(patches.place, jnp.int32)
        seen = self.seen(place)
        x = self.embed(patches.pixels, place, jnp.asarray(patches.grid))  # [B, P, D]
        angles = self.angles(place)
        blocks = self.cfg.deepstack_visual_indexes
        # where each block's output is kept; the last place is for those that nobody asks for
        slots = np.full(self.cfg.depth, self.num_deep, np.int32)
        slots[list(blocks)] = np.arange(self.num_deep)
        is_full = np.isin(np.arange(self.cfg.depth), self.cfg.fullatt_block_indexes)
        kept = jnp.zeros((self.num_deep + 1, *x.shape), x.dtype) if self.num_deep else None

        def body(
            carry: tuple[jax.Array, jax.Array | None],
            xs: tuple[VisionBlock, jax.Array, jax.Array],
        ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
            (h, kept), (block, slot, full) = carry, xs
            split = self.runtime.split_batch
            h = split(block(split(h), angles, seen, full))
            if kept is not None:
                kept = jax.lax.dynamic_update_index_in_dim(kept, h, slot, 0)
            return (h, kept), None

        # full or not is a scanned flag: slices of the stacked blocks would be copies of them
        xs = (self.blocks, jnp.asarray(slots), jnp.asarray(is_full))
        (x, kept), _ = jax.lax.scan(body, (x, kept), xs)
        features = self.merger(x)  # [B, N, out]
        if kept is None:
            return features, None

        def merge(
            _: None, merger_and_kept: tuple[PatchMerger, jax.Array]
        ) -> tuple[None, jax.Array]:
            merger, h = merger_and_kept
            return None, merger(h)

        _, deep = jax.lax.scan(merge, None, (self.deepstack_merger_list, kept[: self.num_deep]))
        return features, jnp.moveaxis(deep, 0, 1)  # [B, J, N, out]

    def embed(self, pixels: Array, place: jax.Array, grid: jax.Array) -> jax.Array:
        """Patches [B, P, D], with their learned position where the kind has any."""
        x = self.patch_embed(pixels)
        if self.cfg.num_position_embeddings is None:
            return x
        index, weight = interpolation(place, grid, self.cfg.position_side)  # [B, P, 4]
        table = self.pos_embed[...]
        # tap by tap: all four at once would be four times the activations, in fp32
        taps = (table[index[..., t]].astype(jnp.float32) * weight[..., t, None] for t in range(4))
        return x + sum(taps, jnp.float32(0)).astype(x.dtype)

    def seen(self, place: jax.Array) -> Seen:
        """What each patch attends to: the whole image, and its window where the kind has those."""
        lengths = jnp.sum(place[..., 0] >= 0, axis=1)  # [B]
        if not (side := self.cfg.window_side * self.cfg.spatial_merge_size):
            return Seen(lengths, None)
        at = place // side  # [B, P, 2]; of padding -1 in both
        wide = jnp.iinfo(jnp.int16).max  # more windows than a row of patches can have
        return Seen(lengths, jnp.where(at[..., 0] < 0, -1, at[..., 0] * wide + at[..., 1]))

    def angles(self, place: jax.Array) -> jax.Array:
        """fp32 [B, P, H/2]: the row turns one half of them, the column the other."""
        frequency = rope_frequencies(
            head_dim=self.cfg.hidden_size // self.cfg.num_heads // 2, theta=self.cfg.rope_theta
        )  # [H/4]
        return rope_angles(place, frequency).reshape(*place.shape[:2], -1)
