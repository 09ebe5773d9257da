"""The flags of ``python -m e5v_jax.serve``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from e5v_jax.cli import UsageError
from e5v_jax.encode.model_args import ModelArgs


@dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Answer requests for embeddings over HTTP, as OpenAI, vLLM, Jina, infinity and Cohere do."""

    host: str = "127.0.0.1"  # Address to listen on; 0.0.0.0 for all.
    port: int = 8000  # Port to listen on; 0 chooses a free one.
    api_key_file: Path | None = None
    """File of API keys, one a line: clients send one as Authorization: Bearer KEY."""
    served_model_name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What clients may call the model; by default the last part of --model."""
    max_num_batched_tokens: int | None = None
    """Most tokens per device batch, padding included; by default 1024 on a CPU, else 16384."""
    warm_up_text: int = 128
    """Compile shapes for texts of up to so many tokens before the server is ready, prompt and
    template counted; 0 for none."""
    warm_up_image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Compile shapes for images of this size too, as 640x480 (width first)."""
    cache_size: int = 4096  # Vectors that are kept for inputs that come again.
    max_request_items: int = 2048  # Most inputs of one request.
    max_waiting_items: int = 4096  # Most inputs that wait for the device; more are refused (429).
    max_waiting_tokens: int = 1_048_576  # Most tokens that wait for the device.
    max_waiting_bytes: int = 536_870_912  # Most bytes of bodies and decoded images in memory.
    max_body_bytes: int = 33_554_432  # Most bytes of one request.
    max_image_bytes: int = 20_971_520  # Most bytes of one image, as a file.
    max_image_pixels: int = 36_000_000  # Most pixels of one image.
    allow_media_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Host (or host:port) whose images are fetched by their address; by default there is none."""
    media_seconds: float = 5.0  # Most seconds that fetching an image may take.
    body_seconds: float = 30.0  # Most seconds until a request's body is there.
    drain_seconds: float = 30.0  # Most seconds from SIGTERM until the process ends.

    def check(self) -> None:
        """Refuse bad values. Raises cli.UsageError: names the flag."""
        super().check()
        self.require_positive(
            "max_num_batched_tokens",
            "max_request_items",
            "max_waiting_items",
            "max_waiting_tokens",
            "max_waiting_bytes",
            "max_body_bytes",
            "max_image_bytes",
            "max_image_pixels",
        )
        for name in ("warm_up_text", "cache_size", "port"):
            if getattr(self, name) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag}: {getattr(self, name)}, expected at least 0")
        for name in ("media_seconds", "body_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < 1e9:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag}: {getattr(self, name)}, expected more than 0")
        if self.port > 65535:
            raise UsageError(f"--port: {self.port}, expected at most 65535")
        if not self.model:
            raise UsageError("--model: empty, expected a folder, a file or a hub id")
        if self.max_request_items > self.max_waiting_items:
            raise UsageError(
                f"--max-request-items: {self.max_request_items}, more than --max-waiting-items "
                f"({self.max_waiting_items}) could never be answered"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return self.served_model_name or (self.model.rstrip("/").rpartition("/")[2] or "model",)
