"""E5-V for mteb 2.x, and the registration of its name ``e5v-jax/e5-v``.

    model = MtebEncoder(path="e5-v")  # a converted folder; also dtype=, adapter=, fsdp= ...
    mteb.evaluate(model, mteb.get_tasks(tasks=["Flickr30kT2IRetrieval"]))

``mteb.get_model("e5v-jax/e5-v", path="e5-v")`` does the same after the import; mteb then wants its
extra ``mteb[image]``, though nothing here uses torchvision. The name is its own, so that results do
not mix with those of mteb's PyTorch implementation of the checkpoint (``royokong/e5-v``), whose
prompt for text with image differs from the authors'.
"""

from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta
from mteb.types import BatchedInput, PromptType
from torch.utils.data import DataLoader

from e5v_jax import E5V
from e5v_jax.data.inputs import InputError
from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.presets import E5_V, Preset

NAME = "e5v-jax/e5-v"
_THEIRS = "royokong/e5-v"
_IMAGES_AT_ONCE = 64  # bounds decoded images


class MtebEncoder(AbsEncoder):
    """This is mteb's encoder interface over :class:`e5v_jax.E5V`."""

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name: str = NAME,
        revision: str | None = None,
        *,
        device: str | None = None,
        path: str | Path | None = None,
        model: E5V | ModelArgs | None = None,
        **options: Any,
    ) -> None:
        """Load ``path``, ``options`` being other fields of ModelArgs, or take a ``model``.

        ``revision`` is that of a hub id, and what mteb files the results under. ``device`` is
        mteb's and means nothing here: JAX uses the devices it has.

        Raises ValueError: not one of ``path`` and ``model`` is given, or it cannot be loaded;
        FileNotFoundError: there is no such model.
        """
        if (path is None) == (model is None):
            raise ValueError(f"{model_name}: give path=, the folder of the checkpoint, or model=")
        if path is not None:
            model = ModelArgs(model=str(path), revision=revision, **options)
        if isinstance(model, ModelArgs):
            model.check()
            model = model.load()
        assert model is not None
        self.model = model
        self.mteb_model_meta = _meta(model.preset, revision)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        **_: Any,
    ) -> np.ndarray:
        """Embed texts, images, or where a row has both, the two fused: float32 [N, D], unit length.

        ``prompt_type`` chooses the preset's prompts for queries or documents; None is documents.
        What else mteb passes tells of the task; by then it has put a document's title in front of
        its text and an instruction behind a query. Texts too long for the model lose their end.
        Raises ValueError: a batch has neither text nor image, or an input is bad ("input 3: ...",
        counted over all batches).
        """
        rows = chain.from_iterable(map(split_batch, inputs))
        vectors: list[np.ndarray] = []
        role = None if prompt_type is None else PromptType(prompt_type).value
        options = {"batch_size": batch_size, "show_progress_bar": False, "truncate": "end"}
        embed = partial(self.model.encode, prompt_name=role, **options)
        while some := list(islice(rows, _IMAGES_AT_ONCE)):
            try:
                vectors.append(embed(some))
            except InputError as error:  # its position is among some
                position = len(vectors) * _IMAGES_AT_ONCE + error.position
                raise InputError(position, error.reason) from error
        return np.concatenate(vectors)


def split_batch(batch: BatchedInput) -> list[dict[str, Any]]:
    """Turn the rows of an mteb batch into inputs of :meth:`E5V.encode`.

    An image whose text is blank is an image alone: fused data sets have such rows.
    Raises ValueError: it has neither text nor image.
    """
    found = cast(dict[str, list[Any]], batch)  # a union of typed dicts, one for each modality
    columns = {name: found[name] for name in ("text", "image") if name in found}
    if not columns:
        raise ValueError(f"a batch with {', '.join(batch)}: expected text, image or both")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row in rows:
        if "image" in row and not (row.get("text") or "").strip():
            row.pop("text", None)
    return rows


META = MODEL_REGISTRY[_THEIRS].model_copy(  # the same checkpoint: what they say of it holds
    update={
        "loader": MtebEncoder,
        "loader_kwargs": {},
        "name": NAME,
        "revision": None,
        "framework": ["JAX"],
        "adapted_from": _THEIRS,
        "output_dtypes": None,
        "extra_requirements_groups": None,
    }
)
MODEL_REGISTRY[NAME] = META


def _meta(preset: Preset, revision: str | None) -> ModelMeta:
    """What results are filed under: each preset's apart; of others than E5-V no more is said."""
    if preset is E5_V:
        return META.model_copy(update={"revision": revision})
    known = {"modalities": ["text", "image"], "framework": ["JAX"], "loader": MtebEncoder}
    return ModelMeta.create_empty({**known, "name": f"e5v-jax/{preset.name}", "revision": revision})
