"""Images that come inside a request, in base64: their bytes and pixels are bounded before they are in memory."""

import base64
import binascii
import re

from PIL import Image

from palate.serving.image_schemas import FormError, read_upload

MOST_RATIO = 50  # of the longer side to the shorter: an encoder that scales the shorter up would make a strip huge
_HEAD = re.compile(r"data:image/(png|jpe?g|webp);base64,", re.IGNORECASE)


def read_image(url: str, most_bytes: int, most_pixels: int) -> Image.Image:
    """The image of a data URL of a PNG, JPEG or WebP, as people see it, in RGB.

    Raises:
        ValueError: another kind of URL, or an image that is too large, damaged, or none.
    """
    head = _HEAD.match(url)
    if head is None:
        raise ValueError(
            f"only data URLs of a PNG, JPEG or WebP are read ('data:image/png;base64,...'), found {url[:40]!r}: this "
            "server fetches nothing that a request names"
        )
    return read_encoded(url[head.end() :], most_bytes, most_pixels)


def read_encoded(text: str, most_bytes: int, most_pixels: int) -> Image.Image:
    """The image of a PNG, JPEG or WebP in base64, as people see it, in RGB.

    Raises:
        ValueError: it is too large, damaged, or none.
    """
    encoded = len(text)
    if encoded * 3 // 4 > most_bytes + 2:
        raise ValueError(f"the image has about {encoded * 3 // 4} bytes: at most {most_bytes} are read")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the image is no valid base64: {error}") from error
    try:
        image = read_upload(content, most_pixels)
    except FormError as error:
        raise ValueError(str(error)) from error
    if max(image.size) > MOST_RATIO * min(image.size):
        raise ValueError(
            f"the image has {image.width}x{image.height} pixels: one side is over {MOST_RATIO} times the other"
        )
    return image
