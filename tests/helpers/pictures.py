"""Reading of charts: the texts of an SVG, the colors of a PNG."""

import html
import re

from PIL import Image


def texts(path):
    """Return every text in an SVG file."""
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text("utf-8"))]


def pixels(path, color):
    """Return the number of pixels of a PNG file with an RGB color like "#945dd6"."""
    wanted = tuple(bytes.fromhex(color[1:]))
    with Image.open(path) as image:
        return sum(count for count, found in image.convert("RGB").getcolors(1 << 24) if found == wanted)
