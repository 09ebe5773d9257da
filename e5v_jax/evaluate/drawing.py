"""A caption as a picture: what the paper calls image-to-image retrieval reads captions from pixels.

As in the authors' retrieval.py: black on white, 800 x 400, 40 points, wrapped to 760 pixels,
vertically centred, left-aligned 20 pixels in. Theirs is Arial, which may not be passed on; ours is
the font that comes inside Pillow (Aileron), and lines are evenly spaced by its height, where theirs
stand as far apart as the ink of each line is high.
"""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _MARGIN, _POINTS = 800, 400, 20, 40


def draw_caption(text: str) -> Image.Image:
    """Draw ``text``, RGB 800 x 400; a text of more than eight lines runs out of the picture.

    Raises:
        ImportError: this Pillow was built without FreeType.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = _font()
    lines = wrap(text, font)
    ascent, descent = font.getmetrics()
    y = (_HEIGHT - len(lines) * (ascent + descent)) // 2
    for line in lines:
        draw.text((_MARGIN, y), line, font=font, fill="black")
        y += ascent + descent
    return image


def wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Split into lines of whole words that fit; a word too long for a line is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and _fits(f"{line} {word}", font):
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while not _fits(word, font):
            fitting = next(n for n in range(len(word), 0, -1) if n == 1 or _fits(word[:n], font))
            lines.append(word[:fitting])
            word = word[fitting:]
        line = word
    return [*lines, line] if line else lines


def _fits(text: str, font: ImageFont.FreeTypeFont) -> bool:
    return font.getlength(text) <= _WIDTH - 2 * _MARGIN


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(_POINTS)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("drawing captions needs a Pillow with FreeType, as its wheels are")
    return font
