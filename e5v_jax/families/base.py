"""The seam: what a model family provides, and what the rest of the project asks of it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from e5v_jax.data.images import Size
from e5v_jax.data.inputs import ImageSource, Input, InputError
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.nn.remat import Remat
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.presets import Preset
from e5v_jax.prompts import PromptChoice, SpecialTokens
from e5v_jax.runtime import Runtime

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

Array = jax.Array | np.ndarray
"""Batches are built in NumPy and placed on devices as they are."""


class ModelConfig(Protocol):
    """The architecture of one model of a family: a frozen dataclass."""

    @property
    def text(self) -> TextConfig:
        """The decoder's part."""

    @property
    def image_token_id(self) -> int | None:
        """The id of the placeholder of images; None without images."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds: "text", and perhaps "image"."""


class Batch(Protocol):
    """The arrays of one forward pass: any pytree.

    The leading axis of each array is the number of inputs or a multiple of it, in the same order.
    """

    @property
    def last_index(self) -> Array:
        """int32 [B], the position of each input's pooled token."""


class Model(Protocol):
    """A module whose parameters the family's rows describe. The decoder is ``language_model``."""

    runtime: Runtime

    def __call__(
        self, batch: Any, *, remat: Remat = "none", dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Embed a batch -> fp32 [B, D], not normalised; for training."""

    def embed_together(
        self,
        batch: Any,
        together: "Together",
        *,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The same of a batch of texts, several of which stand in a row of the decoder's."""

    def encode(self, batch: Any) -> jax.Array:
        """The same vectors [B, D] without what only training needs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One input whose place in a batch is known: tokenised, its image not yet decoded."""

    position: int  # in the call
    ids: list[int]  # one placeholder for the image
    length: int  # positions it takes, the image's included
    shape_key: int = 0  # inputs of one key may share a batch; 0 is text, more is more work
    image: ImageSource | str | None = None
    image_size: Size | None = None  # pixels (height, width)
    features: np.ndarray | None = None  # what a frozen tower made of the image, if that is known
    truncated: bool = False  # its text was cut


@dataclass(frozen=True)
class Together:
    """How texts share rows: what all begin with is computed once a row, not once a text."""

    texts: int  # in a row
    beginning: int  # tokens that all begin with; none of them is pooled

    def row_length(self, length: int) -> int:
        """Positions of a row of texts that are padded to ``length``, their beginning counted."""
        return self.beginning + self.texts * (length - self.beginning)


@dataclass(frozen=True)
class BatchShape:
    """What a batch is padded to."""

    rows: int
    length: int  # positions of each row
    shape_key: int = 0  # as in Measured

    @property
    def size(self) -> int:
        """What a row counts in a batch's budget of positions: patches are positions of a tower."""
        return max(self.length, self.shape_key)


class ImageCost(NamedTuple):
    """What images take before the decoder: tower and projector, one forward pass."""

    flops: float  # 2 per multiply-add
    bytes: int  # alive at the worst moment, beside parameters and pixels


class Processor(Protocol):
    """All that turns inputs into batches: configuration, tokenizer, template, forbidden strings."""

    tokenizer: "PreTrainedTokenizerFast"
    preset: Preset
    template: str  # its name in prompts.TEMPLATES, or that of the preset whose own it is
    shape_unit: str  # what shape keys count, for messages

    @property
    def config(self) -> ModelConfig:
        """The model's."""

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends what somebody says.

        In the template it is the first control token after the prompt. A template without any has
        the tokenizer's EOS, or None.
        """

    def check_text(self, text: str, *, special_tokens: SpecialTokens = "text") -> None:
        """Refuse a text that :meth:`measure` refuses as such. Raises ValueError: why."""

    def fill(self, prompts: PromptChoice, text: str | None, *, has_image: bool) -> str:
        """The string to tokenise for one input, of checked text; raises ValueError: no prompt."""

    def longest(self, max_length: int | None) -> int:
        """Most tokens of an input. Raises ValueError: ``max_length`` is more than the model's."""

    def measure(
        self,
        inputs: Sequence[Input],
        prompts: PromptChoice,
        *,
        max_tokens: int | None = None,
        on_error: Callable[[InputError], None] | None = None,
    ) -> list[Measured]:
        """Fill prompts, tokenise, read the sizes of images; order kept.

        ``prompts`` also say what becomes of special tokens in a text, and of a text too long for
        the model. ``max_tokens`` cuts each text before that, as the authors' training script does.
        ``on_error`` hears of each bad input, which is then left out.

        Raises:
            InputError: without ``on_error``, the first bad input.
            ValueError: the tokenizer does not fit.
        """

    @property
    def load(self) -> Callable[[Measured], Any]:
        """Decodes the image of an input that has one, or raises ValueError; workers unpickle it."""

    def padded_length(self, length: int, shape_key: int) -> int:
        """The positions that an input of ``length`` is padded to: few different ones.

        Raises ValueError: it is longer than any.
        """

    def stack(self, items: Sequence[Any], shape: BatchShape) -> Batch:
        """What :attr:`load` returned as the arrays of one batch; None is a row without an input."""


@dataclass(frozen=True)
class Family:
    """A model family, as functions of its configuration."""

    read_config: Callable[[dict[str, Any]], ModelConfig]
    """From a parsed Hugging Face ``config.json``; raises UnsupportedModelError."""
    config_from_dict: Callable[[dict[str, Any]], ModelConfig]
    """From ``dataclasses.asdict`` of a configuration, as the converted folder has it."""
    build: Callable[..., Any]
    """``(config, build: nn.layers.Build, *, rngs, load_vision=True) -> Model``."""
    parameters: Callable[[Any], ParameterTable]
    processor: Callable[..., Any]
    """``(config, tokenizer, template=None, preset=E5_V) -> Processor``."""
    example_batch: Callable[[Any, BatchShape], Batch]
    """A batch of zeros of that shape; through ``jax.eval_shape`` its shapes, in no memory."""
    match_tokenizer: "Callable[[Any, PreTrainedTokenizerFast], Any]" = lambda config, _: config
    """The configuration as the tokenizer has it; tokens that it lacks are added to it."""
    hf_config: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda raw, _: copy.deepcopy(raw)
    """The ``config.json`` to export, for a source whose layout transformers has no class for."""
    match_preprocessor: Callable[[Any, dict[str, Any]], Any] = lambda config, _: config
    """The configuration with what an image processor's settings say of the model."""
    check_preprocessor: Callable[[Any, dict[str, Any]], None] = lambda *_: None
    """Refuses, by name, settings of an image processor that the processor does not follow."""
    hf_processor: Callable[[Any, Preset], dict[str, Any]] = lambda *_: {}
    """The ``processor_config.json`` of transformers' processor, for a source without any."""
    image_shape: Callable[[Any, Size, int], tuple[int, int]] = lambda *_: (0, 0)
    """``(config, (height, width) in pixels, tokens beside the image) -> (padded positions, shape
    key)`` of an input with such an image; raises ValueError: none of this size."""
    image_cost: Callable[[Any, int, int, int], ImageCost] = lambda *_: ImageCost(0, 0)
    """``(config, images of a batch, their shape key, bytes of a value) -> ImageCost``."""
    projector: tuple[str, ...] = ()
    """What of a model is between the tower and the decoder, which alignment trains; beginnings of
    paths. Empty: nothing that can be told apart."""
    architectures: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Architectures of known checkpoints by name."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names of model folders, and the architecture that they say."""
