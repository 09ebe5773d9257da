"""Which model a command works with and how it is loaded: the flags that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from e5v_jax.cli import BucketPath, UsageError
from e5v_jax.presets import HELP, PRESETS
from e5v_jax.prompts import TEMPLATES

if TYPE_CHECKING:
    import jax

    from e5v_jax import E5V
    from e5v_jax.families.base import Processor
    from e5v_jax.runtime import Runtime

_INPUTS = ("revision", "preset", "template", "min_pixels", "max_pixels")  # what makes them


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """This says which model and how it is loaded; commands inherit it and add flags."""

    model: str  # Converted folder, Hugging Face folder or GGUF file, or a hub id.
    revision: str | None = None  # Branch, tag or commit of a hub id.
    adapter: BucketPath | None = None
    """LoRA to apply: a run folder of e5v_jax.train, one of its checkpoints, or a PEFT folder."""
    preset: Annotated[str | None, tyro.conf.arg(help=HELP)] = None
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default the preset's."""
    min_pixels: int | None = None
    """Enlarge images with fewer, in models that take any size; by default the preset's."""
    max_pixels: int | None = None
    """Reduce images with more: less work and memory, other vectors; by default the preset's."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # Of weights and arithmetic.
    quantize: Literal["int8", "int8_weight_only", "nf4"] | None = None
    """int8: multiply in 8 bits, faster on TPUs and GPUs; int8_weight_only and nf4: only store the
    decoder's weights in 8 or 4 bits. Less memory, slightly other vectors."""
    verify: bool = False
    """First compare every file of the converted folder with its checksum, as after a copy."""
    attn_implementation: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention: cudnn is for GPUs, splash for TPUs; auto chooses."""
    fsdp: int = 1  # Devices over which weights and batch are split; the rest share batches.
    tensor: int = 1  # Devices over which heads and MLP columns are split.

    def check(self) -> None:
        """Refuse bad values before anything is read. Raises UsageError: names the flag."""
        self.require_positive("fsdp", "tensor", "min_pixels", "max_pixels")
        for flag, value, known in (
            ("preset", self.preset, PRESETS),
            ("template", self.template, TEMPLATES),
        ):
            if value is not None and value not in known:
                expected = ", ".join(known)
                raise UsageError(f"--{flag}: unknown {value!r}, expected one of {expected}")

    def require_positive(self, *names: str) -> None:
        """Refuse counts below 1 in these fields; None passes. Raises UsageError: names the flag."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')}: {value}, expected at least 1")

    def load(self, devices: "Sequence[jax.Device] | None" = None) -> "E5V":
        """Load the model onto ``devices``, by default all, with a persistent compilation cache.

        Raises UsageError: as :meth:`runtime`; FileNotFoundError, ValueError: the model cannot be
        loaded; see E5V.from_pretrained.
        """
        mesh = self.runtime(devices).mesh
        from e5v_jax import E5V  # loads JAX, as the next line does
        from e5v_jax.encode.compilation import use_compilation_cache

        use_compilation_cache()
        return E5V.from_pretrained(self.model, mesh=mesh, verify=self.verify, **self._options())

    def runtime(self, devices: "Sequence[jax.Device] | None" = None) -> "Runtime":
        """Make the mesh of ``devices``, by default all.

        Raises UsageError: ``fsdp`` and ``tensor`` do not divide the devices, or they have no such
        attention.
        """
        from e5v_jax.runtime import Runtime  # loads JAX, as the next line does
        from e5v_jax.sharding import make_mesh

        try:
            mesh = make_mesh(-1, self.fsdp, self.tensor, devices=devices)
            return Runtime.on(mesh, self.attn_implementation)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def load_processor(self) -> "Processor":
        """What makes the model's inputs, without its weights; raises what :meth:`load` does."""
        from e5v_jax import E5V

        options = {name: getattr(self, name) for name in _INPUTS}
        return E5V.load_processor(self.model, adapter=self.adapter, **options)

    def describe(self) -> dict[str, str | None]:
        """Name all that a vector depends on here; how many devices share the work is not of it."""
        adapter = None if self.adapter is None else str(self.adapter)
        return {"model": self.model, **self._options(), "adapter": adapter}

    def _options(self) -> dict[str, Any]:
        names = (*_INPUTS, "adapter", "dtype", "quantize", "attn_implementation")
        return {name: getattr(self, name) for name in names}

    def content_hash(self) -> str:
        """Hash model and adapter as they are on disk. Raises FileNotFoundError: no such model."""
        from e5v_jax.checkpoints.hf_source import resolve
        from e5v_jax.checkpoints.model_key import model_key

        return model_key(resolve(self.model, self.revision), self.adapter)
