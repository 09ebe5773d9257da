"""Images as clients send them: a data URL, base64 or, where it is allowed, an address."""

import asyncio
import base64
import binascii
import hashlib
import re
from urllib.parse import unquote_to_bytes

from PIL import Image

from e5v_jax.data.images import ImageError, read_image
from e5v_jax.serve.policy import MediaError, MediaPolicy
from e5v_jax.serve.remote import INTERNET, Network, fetch

__all__ = ["FORMATS", "MediaError", "MediaPolicy", "decode_image", "load_image"]

# Of GIF, and of the animations of the others, the first frame. Fewer than files may have
# (data/images.py): each decoder more is one more that a stranger's bytes can attack.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")

_DATA = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def decode_image(data: bytes, policy: MediaPolicy) -> tuple[Image.Image, str]:
    """Decode an image of one of ``FORMATS``; with it, the SHA-256 of its bytes in hexadecimal.

    The image has its file's own mode and transparency, so that it embeds as its bytes would. No
    EXIF rotation is applied. The header is checked before anything is decoded.

    Raises:
        MediaError: no such image, a broken or truncated one, or (413) more than ``max_bytes`` or
            ``max_pixels``.
    """
    if len(data) > policy.max_bytes:
        raise MediaError(f"image: more than the {policy.max_bytes} bytes allowed", 413)
    try:
        image = read_image(data, formats=FORMATS, max_pixels=policy.max_pixels)
    except ImageError as error:
        raise MediaError(str(error), 413 if error.too_large else 400) from None
    return image, hashlib.sha256(data).hexdigest()


async def load_image(
    reference: str, policy: MediaPolicy, network: Network = INTERNET
) -> tuple[Image.Image, str]:
    """Give the image, and the SHA-256 of its bytes, that a client's string means.

    ``reference`` is a ``data:`` URL in base64, base64 without more, or an http or https URL of a
    host in ``allowed_hosts``. It is never taken for the path of a file.

    Raises MediaError: see :func:`decode_image` and :func:`e5v_jax.serve.remote.fetch`.
    """
    if re.match("https?:", reference, re.IGNORECASE):
        data = await fetch(reference, policy, network)
    else:
        data = decode_base64(reference, policy)
    # decoding takes as long as some hundred other requests
    return await asyncio.to_thread(decode_image, data, policy)


def decode_base64(reference: str, policy: MediaPolicy) -> bytes:
    """The bytes of a ``data:`` URL in base64, or of base64 without more.

    Raises MediaError: neither of them, or (413) more than ``max_bytes``.
    """
    # of what is longer, not even a copy is made; line ends may add a little
    if len(reference) > policy.max_bytes * 1.4 + 1024:
        raise MediaError(f"image: more than the {policy.max_bytes} bytes allowed", 413)
    payload: str | bytes = reference
    if found := _DATA.match(reference):
        media, parameters = found[1].strip().lower(), found[2].lower().split(";")
        if "base64" not in (parameter.strip() for parameter in parameters):
            raise MediaError("image: a data: URL must be in base64: data:image/png;base64,...")
        if media and not media.startswith("image/") and media != "application/octet-stream":
            raise MediaError("image: a data: URL must be of an image: data:image/png;base64,...")
        payload = reference[found.end() :]
        if "%" in payload:
            payload = unquote_to_bytes(payload)
    elif _SCHEME.match(reference):
        raise MediaError("image: expected a data:, http: or https: URL, or base64")
    try:
        text = payload if isinstance(payload, bytes) else payload.encode("ascii")
        text = b"".join(text.split())
        data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise MediaError(
            "image: not base64; expected it, a data: URL in base64 or an http: or https: URL "
            "(paths of files are not read)"
        ) from None
    if not data:
        raise MediaError("image: empty")
    return data
