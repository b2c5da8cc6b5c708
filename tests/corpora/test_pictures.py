"""Images as people see them."""

import io

import pytest
from PIL import EpsImagePlugin, Image

from palate.corpora.pictures import DECODED, decode_image, image_size
from toy_captions import encoded, picture


def test_images_are_decoded_as_people_see_them() -> None:
    """Upright by their EXIF orientation, and over white where they are transparent, whatever lies beneath."""
    stream = io.BytesIO()
    two = Image.new("RGB", (2, 1), "red")
    two.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    two.save(stream, "PNG", exif=exif)
    turned = decode_image(stream.getvalue())
    assert turned.size == (1, 2)
    assert [turned.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (20, 0))):
        stream = io.BytesIO()
        Image.new(mode, (4, 4), colour).save(stream, "PNG")
        seen = decode_image(stream.getvalue())
        assert (seen.mode, seen.getpixel((1, 1))) == ("RGB", (255, 255, 255))
    with pytest.raises(ValueError, match="not an image"):
        decode_image(b"\x89PNG")


def test_only_the_formats_of_photographs_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others come from people nobody knows, and EPS is a program, which Pillow hands to Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(1))
    for form in ("EPS", "PPM", "PCX"):
        for opened in (decode_image, image_size):
            with pytest.raises(ValueError, match="not an image that can be decoded"):
                opened(encoded(picture(0), form))
    assert not started
    for form in (*DECODED, "MPO"):  # MPO is what some cameras call JPEG
        assert decode_image(encoded(picture(0), form)).size == (48, 40)
        assert image_size(encoded(picture(0), form)) == (48, 40)
