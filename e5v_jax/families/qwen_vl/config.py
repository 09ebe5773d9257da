"""The architecture of a Qwen-VL model: a tower for any resolution, mergers, a Qwen decoder."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.families.qwen_vl.vision_config import OMNI, QwenVisionConfig
from e5v_jax.nn.config import LARGEST, UnsupportedModelError, from_fields, transformers_config
from e5v_jax.nn.text_config import TextConfig

THINKER = "qwen2_5_omni_thinker"
"""What of Qwen2.5-Omni sees, hears and reads; it hears nothing here."""
_VIDEO, _AUDIO = "there are no videos", "there is no sound"
_TOLD_ELSEWHERE = "prompts are those of the preset"
_NOT_NEEDED = {
    "model_type": "it chose this family",
    "transformers_version": "who wrote the file",
    "architectures": "the class, which model_type says too",
    "dtype": "chosen when the model is loaded",
    "torch_dtype": "the same, of transformers 4",
    "initializer_range": "nothing is initialised",
    "auto_map": "code that is never run",
    "_name_or_path": "where the file came from",
    "attn_implementation": "how transformers computes the same",
    "_attn_implementation_autoset": "how transformers computes the same",
    "video_token_id": _VIDEO,
    "vision_token_id": _TOLD_ELSEWHERE,
    "tie_word_embeddings": "there is no head",
    "use_cache": "nothing is generated",
    "bos_token_id": _TOLD_ELSEWHERE,
    "eos_token_id": _TOLD_ELSEWHERE,
    "pad_token_id": "no token ever sees padding",
}
"""Fields that no embedding depends on, and why; any other must be known."""
_OMNI_NOT_NEEDED = {
    "audio_config": _AUDIO,
    "audio_token_index": _AUDIO,
    "audio_start_token_id": _AUDIO,
    "audio_end_token_id": _AUDIO,
    "position_id_per_seconds": _VIDEO,
    "seconds_per_chunk": _VIDEO,
    "video_token_index": _VIDEO,
    "ignore_index": "nothing is trained with labels",
    "user_token_id": _TOLD_ELSEWHERE,
}
"""The same of Qwen2.5-Omni's thinker."""
_AROUND_THINKER = {
    "thinker_config": "read alone",
    "talker_config": "nothing is said aloud",
    "token2wav_config": "nothing is said aloud",
    "enable_audio_output": "nothing is said aloud",
    "enable_talker": "nothing is said aloud",
}
"""The same of all of Qwen2.5-Omni."""
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
_OLD_ROPE = ("rope_scaling", "rope_theta")  # of a decoder, in files of transformers 4


@dataclass(frozen=True)
class QwenVLConfig:
    """A tower and a decoder."""

    text: TextConfig
    vision: QwenVisionConfig
    image_token_id: int  # of `<|image_pad|>`, which stands for a token of an image
    vision_start_token_id: int
    vision_end_token_id: int
    min_pixels: int | None = None  # of an image, as the model folder's image processor has it
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        for name in _TOKENS:
            token = getattr(self, name)
            if type(token) is not int or not 0 <= token <= LARGEST:
                raise ValueError(f"{name} is {token!r}: expected the id of a token")
        if (self.min_pixels, self.max_pixels) != (None, None):
            check_limits({"min_pixels": self.min_pixels, "max_pixels": self.max_pixels})
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size is {self.vision.out_hidden_size}: expected "
                f"text_config.hidden_size, {self.text.hidden_size}"
            )
        deep = len(self.vision.deepstack_visual_indexes)
        if deep > self.text.num_hidden_layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes has {deep} blocks for "
                f"{self.text.num_hidden_layers} layers of the decoder: expected no more than those"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds."""
        return ("text", "image")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        parts: dict[str, Callable[[Any], Any]] = {
            "text": TextConfig.from_dict,
            "vision": QwenVisionConfig.from_dict,
        }
        return from_fields(cls, data, "model", parts)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``. Raises UnsupportedModelError: it is not computed here."""
        raw = thinker_alone(raw)
        kind = raw["model_type"]
        known = {*_TOKENS, "text_config", "vision_config", *_NOT_NEEDED}
        if kind == THINKER:
            known |= {*_OMNI_NOT_NEEDED, "image_token_index"}
        if "text_config" in raw:
            _check_object(raw, "text_config")
        elif kind in ("qwen2_vl", "qwen2_5_vl"):  # the hub's files have its fields at the top
            text = transformers_config({}, f"{kind}_text").to_dict()
            known |= {*text, *_OLD_ROPE}
        else:
            _check_object(raw, "text_config")
        _check_object(raw, "vision_config")
        _check_known(raw, known)
        hf = transformers_config(raw, kind)
        tokens: dict[str, Any] = {name: getattr(hf, name, None) for name in _TOKENS}
        return cls(
            text=TextConfig.from_hf(hf.text_config),
            vision=QwenVisionConfig.from_hf(raw["vision_config"], hf.vision_config),
            **tokens,
        )


def check_limits(limits: Mapping[str, Any]) -> None:
    """Check the least and the most pixels of an image, by the names that a file has for them.

    Raises ValueError: names the one that is no count of pixels, or both.
    """
    for name, value in limits.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{name} is {value!r}: expected a number of pixels, 1 to {LARGEST}")
    (low, least), (high, most) = limits.items()
    if least > most:
        raise ValueError(f"{low} is {least}: expected at most {high}, {most}")


def thinker_alone(raw: dict[str, Any]) -> dict[str, Any]:
    """Of all of Qwen2.5-Omni's ``config.json`` the thinker's part; another as it is.

    Raises UnsupportedModelError: a field beside it is not known.
    """
    if raw["model_type"] != "qwen2_5_omni":
        return raw
    _check_known(raw, {*_AROUND_THINKER, *_NOT_NEEDED})
    _check_object(raw, "thinker_config")
    return {"model_type": THINKER, **raw["thinker_config"]}


def exported_config(raw: dict[str, Any], config: QwenVLConfig) -> dict[str, Any]:
    """See :attr:`e5v_jax.families.base.Family.hf_config`: of Qwen2.5-Omni the thinker alone."""
    found = copy.deepcopy(thinker_alone(raw))
    if config.vision.model_type == OMNI:
        found["architectures"] = ["Qwen2_5OmniThinkerForConditionalGeneration"]
    return found


def _check_object(raw: Mapping[str, Any], name: str) -> None:
    if not isinstance(raw.get(name), dict):
        raise ValueError(f"{name} is {raw.get(name)!r}: expected an object")


def _check_known(raw: Mapping[str, Any], known: set[str]) -> None:
    for name in raw:
        if name not in known:
            raise UnsupportedModelError(
                f"{name} is {raw[name]!r}: this field is not known, and may matter"
            )
