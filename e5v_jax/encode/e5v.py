"""The public class: load a model, embed anything, compare."""

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.progress import Progress

from e5v_jax.checkpoints.adapters import carried_adapter, load_adapter
from e5v_jax.checkpoints.converted import ConvertedFolder, WeightSource, is_converted
from e5v_jax.checkpoints.hf_source import open_source, resolve
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.checkpoints.trained_with import choose_inputs
from e5v_jax.data.inputs import ImageSource, Input, InputError
from e5v_jax.encode.arguments import Process, check_arguments, choose_prompts, collect_inputs
from e5v_jax.encode.batching import Batch
from e5v_jax.encode.encoder import Encoder, Statistics
from e5v_jax.encode.stream import BatchLimits, encode_stream
from e5v_jax.families.base import Model, Processor
from e5v_jax.memory import release_freed_memory
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.quantized import Quantization
from e5v_jax.presets import Preset, check_preset
from e5v_jax.prompts import SpecialTokens, Truncate
from e5v_jax.runtime import Implementation, Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.storage import as_path, check_reachable

Dtype = Literal["bfloat16", "float16", "float32"]
_DECODING_THREADS = 4  # Pillow decodes and resizes without Python's lock


class E5V:
    """Embeddings of texts, images and text+image from one model.

    >>> model = E5V.from_pretrained("e5-v-converted")
    >>> vectors = model.encode(["a dog", Path("dog.jpg"), {"text": "sleeping", "image": "dog.jpg"}])
    >>> model.similarity(vectors, vectors)
    """

    def __init__(self, model: Model, processor: Processor) -> None:
        """Wrap a loaded model and the processor of its inputs."""
        Process.check()
        graphdef, self._state = nnx.split(model)
        self.processor = processor
        self.config, self.tokenizer = processor.config, processor.tokenizer
        self._encoder = Encoder(graphdef, processor, model.runtime)

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
        verify: bool = False,
        attn_implementation: Implementation = "auto",
        preset: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Self:
        """Load a converted folder (here or ``gs://``), a Hugging Face one, GGUF file or hub id.

        Args:
            dtype: of weights and arithmetic; norms, softmax and rotary angles are fp32 always.
            mesh: devices to place the model on; None uses all of them for data parallelism.
            adapter: a PEFT LoRA folder or a run folder of ``python -m e5v_jax.train``; None applies
                the adapter that the converted folder carries, if any. What it was trained with
                (prompt of texts, preset, template, limits of pixels) is used with it.
            template: a name in ``e5v_jax.prompts.TEMPLATES``; None takes the preset's.
            revision: branch, tag or commit of a hub id.
            quantize: "int8" or "nf4" stores the decoder's kernels so; arithmetic stays in dtype.
            verify: compare the files of a converted folder with their checksums first.
            attn_implementation: "xla", "cudnn" (GPU) or "splash" (TPU); "auto" chooses.
            preset: how the model's authors call it, a name in ``e5v_jax.presets.PRESETS``; None is
                what the converted folder says, else told from the name, else "e5-v".
            min_pixels: an image with fewer is enlarged to it, where a model takes images of any
                size; None is the preset's, else the model folder's.
            max_pixels: an image with more is reduced to it. Qwen3-VL-Embedding's script has
                1,843,200 (1800 tokens), its processor's file 1,310,720.

        Raises FileNotFoundError, ValueError: one line that names the file, key or option;
        RuntimeError: the process is a fork of one that has loaded a model.
        """
        for name, value, choices in (
            ("dtype", dtype, get_args(Dtype)),
            ("quantize", quantize, (None, *get_args(Quantization))),
            ("attn_implementation", attn_implementation, get_args(Implementation)),
        ):
            if value not in choices:
                expected = ", ".join(filter(None, choices))
                raise ValueError(f"{name} {value!r}: expected one of {expected}")
        Process.check()
        if preset is not None:
            check_preset(preset)  # before anything is fetched
        runtime = Runtime.on(mesh or make_mesh(data=-1, fsdp=1), attn_implementation)
        check_reachable(str(adapter))
        folder = resolve(str(path), revision)
        source = _open(folder, verify=verify)
        adapter = carried_adapter(folder, source) if adapter is None else as_path(adapter)
        how, template = choose_inputs(
            adapter,
            (*source.known_as, str(path)),
            preset=preset,
            template=template,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        lora = None if adapter is None else load_adapter(adapter, source, how.adapter)
        processor = source.family.processor(source.config, load_tokenizer(folder), template, how)
        precision = Precision(jnp.dtype(dtype), jnp.dtype(dtype), quantize)
        build = Build(precision, runtime, None if lora is None else lora.lora)
        model = load_model(source, build, lora_values=None if lora is None else lora.values)
        release_freed_memory()
        return cls(model, processor)

    @staticmethod
    def load_processor(
        path: str | Path,
        *,
        adapter: str | Path | None = None,
        template: str | None = None,
        revision: str | None = None,
        preset: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Processor:
        """What makes a model's inputs, without its weights; arguments of ``from_pretrained``."""
        folder = resolve(str(path), revision)
        source = _open(folder)
        how, template = choose_inputs(
            carried_adapter(folder, source) if adapter is None else as_path(adapter),
            (*source.known_as, str(path)),
            preset=preset,
            template=template,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        return source.family.processor(source.config, load_tokenizer(folder), template, how)

    def encode(
        self,
        inputs: Input | Iterable[Input] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        images: ImageSource | str | Iterable[ImageSource | str] | None = None,
        instruction: str | None = None,
        max_num_batched_tokens: int | None = None,
        max_length: int | None = None,
        truncate: Truncate = "none",
        special_tokens: SpecialTokens = "text",
        pool: Executor | None = None,
        on_error: Callable[[InputError], None] | None = None,
        on_batch: Callable[[int], None] = lambda done: None,
        on_truncate: Callable[[int], None] = lambda position: None,
        **others: Any,
    ) -> np.ndarray:
        """Embed inputs as float32 [N, D], or [D] if it is one and no iterable; order kept.

        An input is a str (a text), a PIL image, Path or bytes (an image), or a mapping with
        ``text`` and/or ``image``; several may come in any iterable: a list, generator, column of a
        data frame or data set. Argument names follow sentence-transformers, of which ``others`` are
        those that are not offered: they are refused unless they ask for what is done.

        Args:
            images: images instead of ``inputs``, of which a str is a path.
            prompt_name: "query" or "document" for the preset's prompts, chosen by input kind; or
                a name in ``e5v_jax.prompts.PROMPTS``. None is "document".
            prompt: one of your own with ``<sent>`` and/or ``<image>``.
            instruction: what to look for, in the words of the preset's authors, where it takes one.
            batch_size: most items per device batch; None leaves it to max_num_batched_tokens.
            normalize_embeddings: L2-normalise, after truncation to ``truncate_dim`` dimensions.
            show_progress_bar: None shows it on a terminal when there are many inputs.
            max_num_batched_tokens: most positions per device batch; None is 1024 on a CPU, 16384
                on a GPU or TPU. Less takes less memory.
            max_length: most tokens of an input, its prompt, template and image counted; None is
                what the model takes.
            truncate: what is cut off a text that is too long, its "end" or its "start"; the prompt
                around it stays whole. "none" makes it a bad input.
            special_tokens: a text that names one ("</s>", "<image>") is read as its characters;
                "refuse" makes it a bad input.
            pool: where images are decoded, ahead of the device; None is a few threads. A
                ``ProcessPoolExecutor`` must start its processes by "spawn", as JAX has threads.
            on_error: hears of each bad input, whose vector is then zero.
            on_batch: hears how many inputs each batch finished.
            on_truncate: hears the position of each input whose text was cut.

        Raises ValueError: a bad input, "input 3: ...", without on_error, and so is one whose vector
        is not finite or zero, as of a broken model; a bad prompt, instruction or other argument.
        RuntimeError: the process is a fork of the one that loaded the model.
        """
        Process.check()
        given = {
            "prompt_name": prompt_name,
            "prompt": prompt,
            "instruction": instruction,
            "batch_size": batch_size,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_length": max_length,
            "truncate_dim": truncate_dim,
            "normalize_embeddings": normalize_embeddings,
            "show_progress_bar": show_progress_bar,
        }
        check_arguments(given, others)
        items, single = collect_inputs(inputs, images)
        dimensions = self.config.text.hidden_size
        if truncate_dim is not None and not 0 < truncate_dim <= dimensions:
            raise ValueError(f"truncate_dim {truncate_dim}: expected 1 to {dimensions}")
        limits = {"batch_size": batch_size, "max_num_batched_tokens": max_num_batched_tokens}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        prompts = choose_prompts(
            self.processor,
            prompt_name=prompt_name,
            prompt=prompt,
            instruction=instruction,
            max_length=max_length,
            truncate=truncate,
            special_tokens=special_tokens,
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
                self._encoder,
                self._state,
                items,
                prompts=prompts,
                limits=BatchLimits(batch_size, max_num_batched_tokens),
                pool=decoding,
                on_error=on_error,
                on_batch=advance,
                on_truncate=on_truncate,
                truncate_dim=truncate_dim,
            )
        if normalize_embeddings:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[0] if single else vectors

    def encode_query(
        self,
        inputs: Input | Iterable[Input] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> np.ndarray:
        """:meth:`encode`, by default as the preset's authors embed what is searched by."""
        if prompt_name is None and prompt is None:
            prompt_name = "query"
        return self.encode(inputs, prompt_name, prompt, **options)

    def encode_document(
        self,
        inputs: Input | Iterable[Input] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> np.ndarray:
        """:meth:`encode`, by default as the preset's authors embed what is searched for."""
        if prompt_name is None and prompt is None:
            prompt_name = "document"
        return self.encode(inputs, prompt_name, prompt, **options)

    def start(self, batch: Batch, prepared: Sequence[Any]) -> jax.Array:
        """Send a batch to the devices -> fp32 [rows, D], not normalised, which may come later.

        This is for programs that form their batches themselves, as a server does, in one thread.
        ``prepared`` has what ``processor.load`` made of the batch's items, in their order; a batch
        without items has its shape compiled.
        """
        return self._encoder.start(self._state, batch, prepared)

    @property
    def runtime(self) -> Runtime:
        """The devices that it is on."""
        return self._encoder.runtime

    @property
    def preset(self) -> Preset:
        """How the model's authors call it, and so do we."""
        return self.processor.preset

    @property
    def template(self) -> str:
        """Whose chat template it is: a name in ``prompts.TEMPLATES``, or the preset's own."""
        return self.processor.template

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


def _open(folder: Path, *, verify: bool = False) -> WeightSource:
    """The weights in a folder or file, unread, with their family and configuration."""
    if is_converted(folder):
        return ConvertedFolder(folder, verify=verify)
    if verify:
        raise ValueError(f"{folder}: only a converted folder has checksums to verify")
    return open_source(folder)
