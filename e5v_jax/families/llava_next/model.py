"""LLaVA-NeXT as an embedding model: tower, projector, anyres merge, decoder, pooled last token."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from e5v_jax.families.base import Array, Batch, BatchShape, ImageCost
from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.families.llava_next.parameters import parameters
from e5v_jax.families.text.model import TextModel
from e5v_jax.families.text.model import example_batch as example_texts
from e5v_jax.nn.layers import Build, Linear
from e5v_jax.nn.vision_tower import VisionTower, exact_gelu


class ImageBatch(NamedTuple):
    """Token sequences in which some positions are image features."""

    input_ids: Array  # int32 [B, L]; 0 where image_index >= 0
    last_index: Array  # int32 [B]
    image_index: Array  # int32 [B, L]: -1 = text, i < K*P = feature i of its tiles, K*P = newline
    # uint8 [B*K, S, S, 3], K for each row; or what `tile_features` made of them, [B*K, P, Dv]
    tiles: Array
    # Where maps are made smaller, a position is a sum of four features; of one, with weight 1, else
    blend_index: Array | None = None  # int32 [B, L, 4], as image_index, which is the first
    weights: Array | None = None  # fp32 [B, L, 4]


class Projector(nnx.Module):
    """Two linear maps with bias around an exact GELU."""

    def __init__(self, config: LlavaNextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        v = config.vision.hidden_size * len(config.feature_depths)
        d = config.text.hidden_size
        self.linear_1 = Linear(v, d, build, use_bias=True, rngs=rngs)
        self.linear_2 = Linear(d, d, build, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, Dv] -> [T, P, D]."""
        return self.linear_2(exact_gelu(self.linear_1(x)))


class LlavaNext(TextModel):
    """The whole model; a batch of texts alone does not touch the tower."""

    def __init__(self, config: LlavaNextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, build, rngs=rngs)
        # only the decoder is adapted
        tower = Build(build.precision.of_tower, build.runtime)
        build = Build(build.precision.unquantized, build.runtime)
        self.spatial_pool_stride = config.spatial_pool_stride
        self.vision_tower = VisionTower(config.vision, config.feature_depths, tower, rngs=rngs)
        self.multi_modal_projector = Projector(config, build, rngs=rngs)
        newline = jax.nn.initializers.normal(0.02)(
            rngs.params(), (config.text.hidden_size,), jnp.dtype(build.precision.param)
        )
        self.image_newline = nnx.Param(newline)

    def tile_features(self, tiles: Array) -> jax.Array:
        """uint8 tiles [T, S, S, 3] -> what the projector gets, [T, P, Dv], in the compute dtype."""
        features = self.vision_tower(tiles)  # [T, patches, Dv]
        if (stride := self.spatial_pool_stride) == 1:
            return features
        count, patches, width = features.shape
        side = math.isqrt(patches) // stride
        squares = features.reshape(count, side, stride, side, stride, width)
        pooled = squares.astype(jnp.float32).mean(axis=(2, 4))  # [T, side, side, Dv]
        return pooled.astype(features.dtype).reshape(count, side**2, width)

    def image_features(self, tiles: Array, batch_size: int) -> jax.Array:
        """Tiles as in the batch -> [B, K*P + 1, D]: projected patches, then the newline."""
        features = jnp.asarray(tiles) if tiles.ndim == 3 else self.tile_features(tiles)
        features = self.multi_modal_projector(features)  # [B*K, P, D]
        features = features.reshape(batch_size, -1, features.shape[-1])  # [B, K*P, D]
        newline = self.image_newline[...].astype(features.dtype)  # [D]
        newline = jnp.broadcast_to(newline, (batch_size, 1, newline.shape[0]))
        return jnp.concatenate([features, newline], axis=1)

    def merge(self, batch: ImageBatch) -> jax.Array:
        """Decoder inputs [B, L, D]: a gather from token embeddings and image features."""
        x = self.language_model.embed(batch.input_ids)  # [B, L, D]
        features = self.image_features(batch.tiles, x.shape[0])  # [B, K*P + 1, D]

        def gather(index: Array) -> jax.Array:
            # row by row: on several devices each gathers from its own images only
            return jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)

        if batch.blend_index is None or batch.weights is None:
            image = gather(batch.image_index)  # [B, L, D]
        else:  # summed in fp32, as PyTorch does it inside
            weights = jnp.asarray(batch.weights)[..., None]  # [B, L, 4, 1]
            parts = [weights[:, :, i] * gather(batch.blend_index[..., i]) for i in range(4)]
            image = sum(parts[1:], parts[0]).astype(x.dtype)  # [B, L, D]
        return jnp.where((batch.image_index >= 0)[..., None], image, x)

    def decoder_inputs(self, batch: Any) -> jax.Array:
        """What the decoder runs over, [B, L, D]: merged with image features if there are any."""
        return self.merge(batch) if isinstance(batch, ImageBatch) else super().decoder_inputs(batch)


def build(
    config: LlavaNextConfig, how: Build, *, rngs: nnx.Rngs, load_vision: bool = True
) -> TextModel:
    """The module; without ``load_vision``, as text pairs need it, the decoder alone."""
    return (LlavaNext if load_vision else TextModel)(config, how, rngs=rngs)


def example_batch(config: LlavaNextConfig, shape: BatchShape) -> Batch:
    """See :attr:`e5v_jax.families.base.Family.example_batch`."""
    texts = example_texts(config, shape)
    if not shape.shape_key:
        return texts
    side = config.vision.image_size
    tiles = jnp.zeros((shape.rows * shape.shape_key, side, side, 3), jnp.uint8)
    index = jnp.full_like(texts.input_ids, -1)
    batch = ImageBatch(*texts[:2], image_index=index, tiles=tiles)
    if not config.can_shrink(shape.shape_key):
        return batch
    four = (*index.shape, 4)
    return batch._replace(blend_index=jnp.full(four, -1), weights=jnp.zeros(four))


def image_cost(config: LlavaNextConfig, images: int, tiles: int, itemsize: int) -> ImageCost:
    """See :attr:`e5v_jax.families.base.Family.image_cost`; it grows with the tiles of all images.

    The blocks of the tower see each patch and the class token, all else the patches only. Beside
    the inside of an MLP, four vectors of each position are alive, and those of earlier features.
    """
    tiles *= images
    vision = config.vision
    d, positions = vision.hidden_size, vision.num_positions
    flops = 4.0 * config.num_vision_layers * d * positions**2  # attention
    for row in parameters(config).rows:
        if row.name.endswith(".kernel") and row.section != "text":
            seen = config.tile_tokens if row.section == "projector" else vision.num_patches
            seen = seen if row.layers is None else row.layers * positions
            flops += 2.0 * math.prod(row.shape) * seen
    scores = 2 * 4 * vision.num_attention_heads * positions
    inside = vision.intermediate_size * (2 if vision.use_swiglu_ffn else 1)
    kept = (4 + len(set(config.feature_depths)) - 1) * d + inside
    return ImageCost(tiles * flops, tiles * positions * (kept * itemsize + scores))
