"""What a client may send as an image, and how it is told that it may not."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MediaPolicy:
    """Limits on images that clients send; the defaults fetch nothing from anywhere."""

    allowed_hosts: frozenset[str] = frozenset()
    """Hosts whose images are fetched: ``name`` at the scheme's own port, or ``name:port``."""
    max_bytes: int = 20 * 2**20
    """Bytes of one image as a file, be it sent or fetched."""
    max_pixels: int = 36_000_000
    """Pixels of one image, by its header: width times height."""
    timeout_s: float = 5.0
    """Seconds that fetching one image may take, name look-up and redirects included."""
    max_redirects: int = 3
    """Redirects that are followed, each checked as the first address was."""

    def __post_init__(self) -> None:
        """Raises ValueError: an allowed host is neither ``name`` nor ``name:port``."""
        hosts = frozenset(host.lower() for host in self.allowed_hosts)
        for host in hosts:
            if not re.fullmatch(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", host):
                raise ValueError(
                    f"media host {host!r}: expected a name, or a name and a port "
                    "(images.example.com, images.example.com:8443), without scheme or path"
                )
        object.__setattr__(self, "allowed_hosts", hosts)

    def allows(self, host: str, port: int | None) -> bool:
        """Tell whether images are fetched from ``host``; ``port`` None is the scheme's own."""
        name = f"[{host}]" if ":" in host else host
        return (name if port is None else f"{name}:{port}") in self.allowed_hosts


class MediaError(ValueError):
    """An image that is refused; ``reason`` is one line for the client, without secrets."""

    def __init__(self, reason: str, status: Literal[400, 413] = 400) -> None:
        """``status`` is HTTP's: 413 for what is too large, 400 for all else."""
        super().__init__(reason)
        self.reason, self.status = reason, status
