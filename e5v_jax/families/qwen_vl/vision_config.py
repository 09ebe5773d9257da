"""The architecture of a Qwen-VL tower, read from transformers' configurations of the kinds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from e5v_jax.nn.config import UnsupportedModelError, check_multiple, check_numbers, from_fields
from e5v_jax.nn.vision_config import IMAGE_MEAN, IMAGE_STD

QWEN2, QWEN2_5, OMNI, QWEN3 = (
    "qwen2_vl_vision",
    "qwen2_5_vl_vision",
    "qwen2_5_omni_vision_encoder",
    "qwen3_vl_vision",
)
"""The kinds, as transformers calls them; Omni's is Qwen2.5-VL's with three maps for one."""


class _Kind(NamedTuple):
    """What a ``model_type`` says of the computation that is no field of its configuration."""

    hidden_act: str  # the only one that is computed
    is_gated: bool = False  # RMSNorm and SwiGLU, for LayerNorm and two linear maps
    splits_qkv: bool = False  # three linear maps for q, k and v
    mean: tuple[float, ...] = IMAGE_MEAN  # of pixels, and their deviation
    std: tuple[float, ...] = IMAGE_STD


_KINDS = {
    QWEN2: _Kind("quick_gelu"),
    QWEN2_5: _Kind("silu", is_gated=True),
    OMNI: _Kind("silu", is_gated=True, splits_qkv=True),
    QWEN3: _Kind("gelu_pytorch_tanh", mean=(0.5,) * 3, std=(0.5,) * 3),
}
_OWN_FIELDS = {
    QWEN3: ("num_position_embeddings", "deepstack_visual_indexes"),
    QWEN2_5: ("window_size", "fullatt_block_indexes"),
    OMNI: ("window_size", "fullatt_block_indexes"),
    QWEN2: (),
}
_FIXED = {"in_channels": 3, "temporal_patch_size": 2}
_NOT_NEEDED = {
    "model_type": "it chose the kind",
    "transformers_version": "who wrote the file",
    "architectures": "the class, which model_type says too",
    "dtype": "chosen when the model is loaded",
    "torch_dtype": "the same, of transformers 4",
    "initializer_range": "nothing is initialised",
    "tokens_per_second": "there are no videos",
    "_name_or_path": "where the file came from",
    "attn_implementation": "how transformers computes the same",
    "_attn_implementation_autoset": "how transformers computes the same",
}
"""Fields that no embedding depends on, and why; any other must be known."""


@dataclass(frozen=True)
class QwenVisionConfig:
    """The architecture of a tower; the last five fields are those of some kinds."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int  # pixels
    spatial_merge_size: int  # patches of a side of a block that is one token
    out_hidden_size: int
    rope_theta: float
    hidden_act: str
    model_type: str = QWEN3
    num_position_embeddings: int | None = None  # a square table of learned positions
    deepstack_visual_indexes: tuple[int, ...] = ()  # blocks that the decoder's layers see
    window_size: int | None = None  # pixels; blocks attend within squares of that side
    fullatt_block_indexes: tuple[int, ...] = ()  # blocks that attend everywhere nevertheless

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        section = "vision_config."
        if self.model_type not in _KINDS:
            raise UnsupportedModelError(
                f"{section}model_type {self.model_type!r}: expected one of {', '.join(_KINDS)}"
            )
        check_numbers(self, section)
        check_multiple(self, "hidden_size", "num_heads", section)
        if (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"{section}hidden_size {self.hidden_size} over num_heads {self.num_heads}: expected"
                " a multiple of 4, for a row and a column turn half of each head each"
            )
        if self.hidden_act != self.kind.hidden_act:
            raise UnsupportedModelError(
                f"{section}hidden_act {self.hidden_act!r}: only {self.kind.hidden_act!r} is "
                "supported"
            )
        for name in ("num_position_embeddings", "window_size"):
            if (getattr(self, name) is not None) != (name in _OWN_FIELDS[self.model_type]):
                raise ValueError(
                    f"{section}{name} is {getattr(self, name)!r}, which {self.model_type} has not"
                )
        if self.position_side**2 != (self.num_position_embeddings or 0):
            raise ValueError(
                f"{section}num_position_embeddings is {self.num_position_embeddings}: expected a "
                "square number"
            )
        if self.window_size is not None and not self.window_side:
            raise ValueError(
                f"{section}window_size is {self.window_size}: expected at least the "
                f"{self.factor} pixels of a token"
            )
        for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            blocks = getattr(self, name)
            right = isinstance(blocks, tuple) and all(type(i) is int for i in blocks)
            if not right or list(blocks) != sorted({i for i in blocks if 0 <= i < self.depth}):
                found = list(blocks) if isinstance(blocks, tuple) else blocks
                raise ValueError(
                    f"{section}{name} is {found!r}: expected blocks from 0 to {self.depth - 1}, "
                    "each once, in order"
                )

    @property
    def kind(self) -> _Kind:
        """What the ``model_type`` says of the computation."""
        return _KINDS[self.model_type]

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return int((self.num_position_embeddings or 0) ** 0.5)

    @property
    def factor(self) -> int:
        """Pixels of a side of what becomes one token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Tokens of a side of a window; 0 without windows."""
        return (self.window_size or 0) // self.factor

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], hf: Any) -> Self:
        """Read ``vision_config`` and transformers' own reading of it.

        Raises UnsupportedModelError: a field that is not computed here, or not known.
        """
        kind = hf.model_type
        if kind not in _KINDS:
            raise UnsupportedModelError(
                f"vision_config.model_type {kind!r}: expected one of {', '.join(_KINDS)}"
            )
        # Qwen2-VL calls the tower's width embed_dim and the decoder's hidden_size
        theirs = {"hidden_size": "embed_dim", "out_hidden_size": "hidden_size"}
        names = {
            name: theirs.get(name, name) if kind == QWEN2 else name
            for name in (*_COMMON, *_OWN_FIELDS[kind])
            if (kind, name) != (QWEN2, "intermediate_size")
        }
        fixed = {**_FIXED, "in_chans": 3, "spatial_patch_size": hf.patch_size}  # the hub's files
        ratio = ("mlp_ratio",) if kind == QWEN2 else ()
        for name in raw:
            if name not in {*names.values(), *ratio, *fixed, "rope_parameters", *_NOT_NEEDED}:
                raise UnsupportedModelError(
                    f"vision_config.{name} is {raw[name]!r}: this field is not known, and may "
                    "matter"
                )
        for name, value in fixed.items():
            if (found := getattr(hf, name, value)) != value:
                raise UnsupportedModelError(
                    f"vision_config.{name} is {found!r}: only {value} is supported"
                )
        rope = hf.rope_parameters
        if set(rope) - {"rope_type", "rope_theta"} or rope["rope_type"] != "axial":
            raise UnsupportedModelError(
                f"vision_config.rope_parameters is {rope!r}: only rope_type 'axial' is supported"
            )
        fields: dict[str, Any] = {ours: getattr(hf, name) for ours, name in names.items()}
        if ratio:
            fields["intermediate_size"] = int(hf.embed_dim * hf.mlp_ratio)
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields, rope_theta=float(rope["rope_theta"]), model_type=kind)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        if isinstance(data, dict):
            data = {key: tuple(x) if isinstance(x, list) else x for key, x in data.items()}
        return from_fields(cls, data, "model.vision")


_COMMON = (*list(QwenVisionConfig.__dataclass_fields__)[:7], "hidden_act")
