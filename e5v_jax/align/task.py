"""Alignment as the training loop needs it."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import keystr, tree_map_with_path

from e5v_jax.align.batches import tokenize_captions
from e5v_jax.align.captions import Captions, load_captions
from e5v_jax.align.config import AlignConfig, AlignOptimizerConfig
from e5v_jax.align.features import open_features
from e5v_jax.align.feed import open_feed
from e5v_jax.align.loss import caption_loss
from e5v_jax.align.validation import DEV_LOSS, CaptionValidation
from e5v_jax.align.words import start_from_words
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.families.base import Family, Model
from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.nn.layers import Build, LoRAParam, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh, place_split
from e5v_jax.train.export import export_model
from e5v_jax.train.loop import run
from e5v_jax.train.optimizer import make_optimizer
from e5v_jax.train.setup import StepParts, Training, make_parts, open_base
from e5v_jax.train.step import DECODER
from e5v_jax.train.task import Task

DECODER_PATH = "language_model"


def align(cfg: AlignConfig) -> None:
    """Align as ``cfg`` says; raises as :func:`e5v_jax.train.loop.run`."""
    run(cfg, TASK)


def _load_data(cfg: AlignConfig) -> Captions:
    return load_captions(cfg.data.path)


def check_model(cfg: AlignConfig, base: ConvertedFolder) -> None:
    """Check that the model has what is trained, and that ``cfg`` says so.

    Raises ValueError: it has no images, no projector or a head of its own; or names the field.
    """
    if not base.family.projector:
        which = "no projector of its own" if "image" in base.config.modalities else "no images"
        raise ValueError(
            f"{cfg.model}: a model of type {base.info.model_type} has {which}: there is nothing "
            "to align"
        )
    raw = read_json(base.folder / "hf_config.json", todo="convert the model again")
    tied = raw.get("tie_word_embeddings", (raw.get("text_config") or {}).get("tie_word_embeddings"))
    if not tied:
        raise ValueError(
            f"{cfg.model}: its decoder predicts tokens by an lm_head of its own, which a converted "
            "folder does not load: only tied embeddings (tie_word_embeddings) can be aligned"
        )
    if cfg.projector_start == "words":
        if not isinstance(base.config, LlavaNextConfig):
            raise ValueError(
                f"projector_start words: is for LLaVA's projector, and {cfg.model} is of type "
                f"{base.info.model_type}"
            )
        if cfg.data.features is None:
            raise ValueError("projector_start words: needs data.features, a folder to keep them in")
    if cfg.train == "decoder":
        for name, given in (("lora", cfg.lora), ("quantize", cfg.quantize)):
            if given is not None:
                raise ValueError(
                    f"{name}: is for a frozen decoder, but train decoder changes its weights: "
                    "choose one"
                )


def set_up(cfg: AlignConfig, base: ConvertedFolder, data: Captions) -> Training:
    """Tokenise ``data``, load ``base`` onto the mesh, and make the step.

    Weights that are trained are fp32, others in ``cfg.dtype``. Raises ValueError: one line naming
    file and row, or the field of ``cfg``.
    """
    check_model(cfg, base)
    runtime = Runtime.on(make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor))
    processor = open_base(cfg, base)
    tokens, pool = tokenize_captions(data, processor, cfg.data), ThreadPoolExecutor()
    known = open_features(cfg, processor)
    load = processor.load if known is None else known.load
    feed = open_feed(cfg, data, tokens, processor, runtime, pool, load)
    build = align_build(cfg, runtime)
    model = load_model(base, build, masters=masters(cfg, base.family), seed=cfg.seed)
    if known is not None:
        known.fill(model, tokens.items, pool)
    if cfg.projector_start == "words":
        assert known is not None  # as was checked
        start_from_words(model, known.arrays(), tokens.captions)
    step = make_step(cfg, model, base.family, total_steps=feed.total_steps)
    return Training(
        **vars(step), processor=processor, runtime=runtime, feed=feed, place=place_split
    )


def align_build(cfg: AlignConfig, runtime: Runtime) -> Build:
    """Build in ``cfg.dtype``; what is trained beside LoRA is stored as :func:`masters` say."""
    dtype = jnp.dtype(cfg.dtype)
    return Build(Precision(dtype, dtype, cfg.quantize), runtime, cfg.lora)


def masters(cfg: AlignConfig, family: Family) -> tuple[str, ...]:
    """Paths of the modules whose weights are trained as they are, in fp32."""
    return (*family.projector, DECODER_PATH) if cfg.train == "decoder" else family.projector


def make_step(cfg: AlignConfig, model: Model, family: Family, *, total_steps: int) -> StepParts:
    """The step on captions of a model, loaded or abstract; the schedule ends at ``total_steps``."""
    wanted: list[Any] = [nnx.All(nnx.Param, nnx.PathContains(name)) for name in family.projector]
    wanted += [DECODER] if cfg.train == "decoder" else [LoRAParam]
    return make_parts(
        cfg,
        model,
        partial(caption_loss, chunk_size=cfg.chunk_size, remat=cfg.remat),
        _make_optimizer,
        total_steps=total_steps,
        wanted=nnx.Any(*wanted),
    )


def _make_optimizer(cfg: Any, total_steps: int) -> optax.GradientTransformation:
    """Make the optimizer, whose last step gives the decoder another learning rate.

    AdamW's change is the rate times what does not depend on it, weight decay included.
    """
    assert isinstance(cfg, AlignOptimizerConfig)
    factor = (cfg.decoder_learning_rate or cfg.learning_rate) / cfg.learning_rate

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        def of(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            own = keystr(path, simple=True, separator=".").startswith(f"{DECODER_PATH}.")
            return x * factor if own else x

        scaled: optax.Updates = tree_map_with_path(of, updates)
        return scaled

    return make_optimizer(cfg, total_steps, optax.stateless(scale))


def _make_validation(cfg: AlignConfig, training: Training) -> CaptionValidation | None:
    return None if cfg.evaluation.data is None else CaptionValidation(cfg, training)


def _export(cfg: AlignConfig, trained: nnx.State, base: ConvertedFolder) -> None:
    export_model(cfg.output, cfg.lora, trained, base)


TASK = Task("captions", DEV_LOSS, _load_data, set_up, _make_validation, _export)
