"""API keys: of a file, compared in constant time."""

import hmac
from hashlib import sha256
from pathlib import Path


class Keys:
    """The keys that are accepted; without any, everybody is."""

    def __init__(self, keys: "tuple[str, ...]" = ()) -> None:
        """Of the keys, only digests are kept."""
        self._digests = [sha256(key.encode()).digest() for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> "Keys":
        """Read keys, one a line; empty lines and those that begin with # count for nothing.

        Raises OSError: it cannot be read; ValueError: there is no key in it.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{path}: a key has other characters than ASCII's") from None
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys:
            raise ValueError(f"{path}: no key there, expected one a line")
        return cls(keys)

    def accept(self, authorization: str | None) -> bool:
        """Whether a header ``Authorization: Bearer KEY`` has one of them."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # all of them, so that the time tells nothing
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found) and scheme.lower() == "bearer"
