"""The public class: load a model, embed anything, compare."""

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from convert.hf_source import open_source, resolve
from convert.peft import Adapter, is_peft, read_adapter
from e5v_jax.config import ModelConfig
from e5v_jax.converted import ConvertedFolder, WeightSource, is_converted
from e5v_jax.encode.compilation import use_compilation_cache
from e5v_jax.encode.encoder import Encoder, Statistics
from e5v_jax.encode.inputs import Input, InputError, choose_prompt, measure
from e5v_jax.encode.stream import BatchLimits, encode_stream
from e5v_jax.loading import load_model
from e5v_jax.model.attention import Implementation
from e5v_jax.model.layers import Precision
from e5v_jax.model.llava_next import LlavaNext
from e5v_jax.model.quantized import Quantization
from e5v_jax.prompts import (
    TEMPLATES,
    detect_template,
    forbidden_pattern,
)
from e5v_jax.run_folder import find_run, read_run_adapter, read_run_info
from e5v_jax.sharding import make_mesh
from e5v_jax.storage import as_path
from e5v_jax.tokenizer import load_tokenizer, with_image_token

_logger = logging.getLogger(__name__)
Dtype = Literal["bfloat16", "float16", "float32"]
_DECODING_THREADS = 4  # Pillow decodes and resizes without Python's lock
_MAX_BATCHED_TOKENS = {"cpu": 1024}  # beyond, activations leave the caches
_MAX_BATCHED_TOKENS_ACCELERATOR = 16384


def _check_choice(name: str, value: str | None, choices: Any) -> None:
    """One of the values of a Literal, or None.

    Raises:
        ValueError: neither.
    """
    if value is not None and value not in get_args(choices):
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(get_args(choices))}")


class E5V:
    """Embeddings of texts, images and text+image from one model.

    >>> model = E5V.from_pretrained("e5-v-converted")
    >>> vectors = model.encode(["a dog", Path("dog.jpg"), {"text": "sleeping", "image": "dog.jpg"}])
    >>> model.similarity(vectors, vectors)
    """

    def __init__(
        self,
        model: LlavaNext,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        mesh: Mesh,
        template: str | None = None,
        attn_implementation: Implementation = "auto",
    ) -> None:
        """Wrap a loaded model; ``template`` names the chat template, None asks the tokenizer.

        A tokenizer that does not know ``<image>`` learns it here.

        Raises:
            ValueError: the template cannot be told, or config and tokenizer do not agree on the
                id of ``<image>``.
        """
        self.config = with_image_token(config, tokenizer)
        self.tokenizer = tokenizer
        self.template = detect_template(tokenizer, config.text.model_type, override=template)
        self._forbidden = forbidden_pattern(tokenizer, TEMPLATES[self.template])
        self._encoder = Encoder(
            model,
            mesh,
            pad_id=0,  # any id: padding is never seen
            attn_implementation=attn_implementation,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "bfloat16",
        mesh: Mesh | None = None,
        adapter: str | Path | None = None,
        template: str | None = None,
        revision: str | None = None,
        quantize: Quantization | None = None,
        attn_implementation: Implementation = "auto",
    ) -> Self:
        """Load a converted folder, a Hugging Face folder or GGUF file, or a hub id.

        Args:
            path: what to load; a converted folder may be in a bucket, ``gs://bucket/folder``.
            dtype: of weights and arithmetic; norms, softmax and rotary angles are fp32 always.
            mesh: devices to place the model on; None uses all of them for data parallelism.
            adapter: a PEFT LoRA folder or a run folder of ``python -m e5v_jax.train``; None applies
                the adapter that the converted folder carries, if any.
            template: chat template name, see ``e5v_jax.prompts.TEMPLATES``; None chooses.
            revision: branch, tag or commit of a hub id.
            quantize: "int8" or "nf4" stores the decoder's kernels so; arithmetic stays in dtype.
            attn_implementation: "xla", "cudnn" (GPU) or "splash" (TPU); "auto" chooses.

        JAX's persistent compilation cache is switched on, see ``e5v_jax.encode.compilation``.

        Raises:
            FileNotFoundError, ValueError: one line that names the file, key or option.
        """
        _check_choice("dtype", dtype, Dtype)
        _check_choice("quantize", quantize, Quantization)
        _check_choice("attn_implementation", attn_implementation, Implementation)
        use_compilation_cache()
        folder = resolve(str(path), revision)
        source: WeightSource
        if folder.is_dir() and is_converted(folder):
            source = ConvertedFolder(folder)
            if adapter is None and (folder / "adapter").is_dir():
                adapter = folder / "adapter"
        else:
            source = open_source(folder)
        lora = None if adapter is None else load_adapter(as_path(adapter), source.config)
        if mesh is None:
            mesh = make_mesh(data=-1, fsdp=1)
        precision = Precision(jnp.dtype(dtype), jnp.dtype(dtype), quantize)
        model = load_model(
            source,
            precision=precision,
            mesh=mesh,
            lora=None if lora is None else lora.lora,
            lora_values=None if lora is None else lora.values,
        )
        return cls(
            model,
            source.config,
            load_tokenizer(folder),
            mesh=mesh,
            template=template,
            attn_implementation=attn_implementation,
        )

    def encode(
        self,
        inputs: Input | Sequence[Input],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        max_num_batched_tokens: int | None = None,
        pool: Executor | None = None,
        on_error: Callable[[InputError], None] | None = None,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Embed inputs; order kept. Argument names follow sentence-transformers.

        Args:
            inputs: str (a text), PIL image, Path or bytes (an image), a mapping with ``text``
                and/or ``image``, or a sequence of these.
            prompt_name: a name in ``e5v_jax.prompts.PROMPTS``; None chooses by input kind.
            prompt: an instruction of your own with ``<sent>`` and/or ``<image>``.
            batch_size: most items per device batch; None leaves it to max_num_batched_tokens.
            normalize_embeddings: L2-normalise, after truncation.
            truncate_dim: keep only the first dimensions.
            show_progress_bar: None shows it on a terminal when there are many inputs.
            max_num_batched_tokens: most positions per device batch; None is 1024 on a CPU, 16384
                on a GPU or TPU. Less takes less memory.
            pool: where images are decoded, ahead of the device; None is a few threads. A
                ``ProcessPoolExecutor`` must start its processes by "spawn", as JAX has threads.
            on_error: hears of each bad input, whose vector is then zero.
            on_batch: hears how many inputs each finished batch had.

        Returns:
            float32 [N, D]; [D] for a single input that is not a sequence.

        Raises:
            ValueError: a bad input, "input 3: ...", without on_error; a bad prompt.
        """
        single = isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence)
        items: Sequence[Input] = [inputs] if single else inputs  # type: ignore[list-item, assignment]
        if truncate_dim is not None and not 0 < truncate_dim <= self.config.text.hidden_size:
            raise ValueError(
                f"truncate_dim {truncate_dim}: expected 1 to {self.config.text.hidden_size}"
            )
        for name, value in {
            "batch_size": batch_size,
            "max_num_batched_tokens": max_num_batched_tokens,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        bound_measure = partial(
            measure,
            cfg=self.config,
            tokenizer=self.tokenizer,
            choice=choose_prompt(TEMPLATES[self.template], prompt_name, prompt),
            forbidden=self._forbidden,
        )
        if max_num_batched_tokens is None:
            max_num_batched_tokens = _MAX_BATCHED_TOKENS.get(
                jax.default_backend(), _MAX_BATCHED_TOKENS_ACCELERATOR
            )
        if show_progress_bar is None:
            show_progress_bar = sys.stderr.isatty() and len(items) > 32
        with (
            Progress(disable=not show_progress_bar, transient=True) as progress,
            nullcontext(pool) if pool else ThreadPoolExecutor(_DECODING_THREADS) as decoding,
        ):
            task = progress.add_task("encoding", total=len(items))

            def advance(done: int) -> None:
                progress.advance(task, done)
                on_batch(done)

            vectors = encode_stream(
                items,
                encoder=self._encoder,
                measure=lambda window, on_error: bound_measure(window, on_error=on_error),
                cfg=self.config,
                limits=BatchLimits(batch_size, max_num_batched_tokens),
                pool=decoding,
                on_error=on_error,
                on_batch=advance,
            )
        vectors = vectors[:, :truncate_dim]
        if normalize_embeddings:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[0] if single else vectors

    @property
    def statistics(self) -> Statistics:
        """Items, tokens, padding and compilations of all calls to :meth:`encode` so far."""
        return self._encoder.statistics

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities, fp32 [N, M], of vectors [N, D] and [M, D]."""
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
        return a @ b.T


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """LoRA factors of a PEFT folder, a run folder or RUN/checkpoints/STEP.

    Of a run folder, those that the finished run left, else those of the newest checkpoint.

    Raises:
        FileNotFoundError: neither.
        ValueError: the adapter does not fit the model.
    """
    run = find_run(folder)
    if run is not None:
        path, step = run
        prompt = read_run_info(path)["config"]["data"].get("prompt", "text")
        if prompt not in ("text", "released"):
            _logger.warning("%s was trained with data.prompt %r: encode with it too", path, prompt)
        if step is None and is_peft(path / "adapter"):
            return read_adapter(path / "adapter", config.text)
        return read_run_adapter(path, step, config)
    if is_peft(folder):
        return read_adapter(folder, config.text)
    raise FileNotFoundError(
        f"{folder}: neither a PEFT adapter (adapter_config.json) nor a run folder (run.json) or "
        "one of its checkpoints"
    )
