"""The ``config.json`` that people have of Qwen-VL: every field known, and what of it is read.

Fields of the tower are looked at in vision_config.py.
"""

import copy
from collections.abc import Mapping
from typing import Any

from e5v_jax.nn.config import UnsupportedModelError, transformers_config
from e5v_jax.nn.text_config import TextConfig

JINA = "JinaEmbeddingsV4Model"
"""A Qwen2.5-VL with adapters for several tasks, which its authors' code always applies."""
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
    "_attn_implementation": "how transformers computes the same",
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
_JINA_NOT_NEEDED = {
    "matryoshka_dims": "any prefix of a vector may be taken",
    "multi_vector_projector_dim": "tokens get no vectors of their own",
    "pretrained_peft_model_name_or_path": "the authors' code applies the folder's own adapters",
    "task_names": "the keys of the adapters say them",
    "verbosity": "what the authors' code prints",
}
_JINA_FIXED = {"single_vector_pool_strategy": "mean", "truncate_dim": None}
"""The same of jina-embeddings-v4, and what has one value only."""
TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
_SILENT = "nothing is generated"
_COMMON = "every configuration of transformers has it, Qwen's code reads it nowhere"
_TEXT_NOT_NEEDED = {
    "attention_dropout": "nothing is dropped",
    **dict.fromkeys(TOKENS, "those at the top count"),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), _COMMON),
    **dict.fromkeys(("is_encoder_decoder", "id2label", "label2id", "problem_type"), _COMMON),
    "chunk_size_feed_forward": _COMMON,
    **dict.fromkeys(("max_length", "min_length", "do_sample", "early_stopping"), _SILENT),
    **dict.fromkeys(("num_beams", "num_beam_groups", "temperature", "top_k", "top_p"), _SILENT),
    **dict.fromkeys(("typical_p", "diversity_penalty", "repetition_penalty"), _SILENT),
    **dict.fromkeys(("length_penalty", "no_repeat_ngram_size"), _SILENT),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "bad_words_ids"), _SILENT),
    **dict.fromkeys(("num_return_sequences", "output_scores", "return_dict_in_generate"), _SILENT),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _SILENT),
    **dict.fromkeys(("remove_invalid_values", "exponential_decay_length_penalty"), _SILENT),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _SILENT),
    **dict.fromkeys(("torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads"), _COMMON),
    **dict.fromkeys(("is_decoder", "finetuning_task", "prefix"), _COMMON),
    **dict.fromkeys(("cross_attention_hidden_size", "add_cross_attention"), _COMMON),
    **dict.fromkeys(("tie_encoder_decoder", "tokenizer_class", "sep_token_id"), _COMMON),
    **dict.fromkeys(("decoder_start_token_id", "task_specific_params"), _COMMON),
}
"""The same of a decoder."""
_TEXT_READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}
"""What :meth:`TextConfig.from_hf` follows or refuses, be it through transformers' class."""
_TEXT_CHECKED = {"head_dim", "attention_bias", "mlp_bias", "is_causal"}
"""The same; no file has them at the top."""
_FLAT = ("qwen2_vl", "qwen2_5_vl")  # whose files may have the decoder's fields at the top


def read_layout(raw: dict[str, Any]) -> dict[str, Any]:
    """What is read of a ``config.json``: Qwen2.5-Omni's thinker, jina's without its own fields.

    Another is as it is. Raises UnsupportedModelError: a field that is left out is not known, or
    asks for something else than is computed here.
    """
    if _is_jina(raw):
        for name, value in _JINA_FIXED.items():
            if (found := raw.get(name, value)) != value:
                raise UnsupportedModelError(f"{name} is {found!r}: only {value!r} is supported")
        own = {*_JINA_NOT_NEEDED, *_JINA_FIXED}
        return {name: value for name, value in raw.items() if name not in own}
    if raw["model_type"] != "qwen2_5_omni":
        return raw
    _check_known(raw, {*_AROUND_THINKER, *_NOT_NEEDED})
    _check_object(raw, "thinker_config")
    return {"model_type": THINKER, **raw["thinker_config"]}


def exported_config(raw: dict[str, Any], _: Any) -> dict[str, Any]:
    """See :attr:`e5v_jax.families.base.Family.hf_config`: for classes that transformers has."""
    found = copy.deepcopy(read_layout(raw))
    if found["model_type"] == THINKER:
        found["architectures"] = ["Qwen2_5OmniThinkerForConditionalGeneration"]
    if _is_jina(raw):
        found["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        found.pop("auto_map", None)
    return found


def check_fields(raw: dict[str, Any]) -> None:
    """Check that every field of a ``config.json`` is known, but for its tower's.

    Raises UnsupportedModelError: names one that is not. Raises ValueError: a part is missing.
    """
    kind, known = raw["model_type"], {*TOKENS, "text_config", "vision_config", *_NOT_NEEDED}
    if kind == THINKER:
        known |= {*_OMNI_NOT_NEEDED, "image_token_index"}
    if kind in _FLAT:
        known |= {*_TEXT_READ, *_TEXT_NOT_NEEDED}
    if "text_config" in raw or kind not in _FLAT:
        _check_object(raw, "text_config")
        known_text = {*_TEXT_READ, *_TEXT_CHECKED, *_TEXT_NOT_NEEDED, *_NOT_NEEDED}
        _check_known(raw["text_config"], known_text, "text_config.")
    _check_object(raw, "vision_config")
    _check_known(raw, known)


def split_copies(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A ``config.json`` without the decoder's fields that stand both there and in text_config.

    transformers 4.52 and later wrote both, and reads the second. Also what is left out.
    """
    copies = {}
    if "text_config" in raw and raw["model_type"] in _FLAT:
        names = {*_TEXT_READ, *_TEXT_NOT_NEEDED}.difference(TOKENS)
        copies = {name: raw[name] for name in raw if name in names}
    return {name: value for name, value in raw.items() if name not in copies}, copies


def check_copies(copies: dict[str, Any], raw: dict[str, Any], config: TextConfig) -> None:
    """Check that each of :func:`split_copies` in the place of text_config's changes nothing.

    Raises UnsupportedModelError: names one that says something else.
    """
    for name, value in copies.items():
        try:
            hf = transformers_config({**raw["text_config"], name: value}, config.model_type)
            same = TextConfig.from_hf(hf) == config
        except Exception:  # transformers' configuration classes raise many types
            same = False
        if not same:
            raise UnsupportedModelError(
                f"{name} is {value!r}, but text_config has {raw['text_config'].get(name)!r}: make "
                "them agree"
            )


def _is_jina(raw: Mapping[str, Any]) -> bool:
    classes = raw.get("architectures")
    return isinstance(classes, list) and JINA in classes


def _check_object(raw: Mapping[str, Any], name: str) -> None:
    if not isinstance(raw.get(name), dict):
        raise ValueError(f"{name} is {raw.get(name)!r}: expected an object")


def _check_known(raw: Mapping[str, Any], known: set[str], section: str = "") -> None:
    for name in raw:
        if name not in known:
            raise UnsupportedModelError(
                f"{section}{name} is {raw[name]!r}: this field is not known, and may matter"
            )
