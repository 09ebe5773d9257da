"""A caption as a picture: what the paper calls image-to-image retrieval reads captions from pixels.

As in the authors' retrieval.py: black on white, 800 x 400, 40 points, wrapped to 760 pixels,
vertically centred, 20 pixels from the left. Theirs is Arial, which may not be passed on, with lines
as far apart as their ink is high; ours is Pillow's own font (Aileron), its lines evenly spaced.
"""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _MARGIN, _POINTS = 800, 400, 20, 40
_font = cache(ImageFont.load_default)  # reading it takes longer than drawing with it


def draw_caption(text: str) -> Image.Image:
    """Draw ``text``, RGB 800 x 400; a ninth line is cut off. Raises ImportError: no FreeType."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    font = _font(_POINTS)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("drawing captions needs a Pillow with FreeType, as its wheels are")
    lines = wrap(text, font)
    height = sum(font.getmetrics())
    for number, line in enumerate(lines):
        y = (_HEIGHT - len(lines) * height) // 2 + number * height
        ImageDraw.Draw(image).text((_MARGIN, y), line, font=font, fill="black")
    return image


def wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Split into lines of whole words that fit; a word too long for a line is broken."""

    def fits(text: str) -> bool:
        return font.getlength(text) <= _WIDTH - 2 * _MARGIN

    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and fits(f"{line} {word}"):
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while not fits(word):
            fitting = next(n for n in range(len(word), 0, -1) if n == 1 or fits(word[:n]))
            lines.append(word[:fitting])
            word = word[fitting:]
        line = word
    return [*lines, line] if line else lines
