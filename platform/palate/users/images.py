"""Images that people ranked: PNG files under a folder or URL, one folder a tenant, named by what they show.

A digest is of the pixels, not of the file, so that one image is one file whoever encoded it.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from palate.artifacts import is_local, join, locate
from palate.users.checks import require_id


def png_of(image: Image.Image) -> tuple[str, bytes]:
    """Digest and file of an RGB image."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    head = f"{image.width}x{image.height} {image.mode}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest(), stream.getvalue()


def folder_of(url: str, tenant: str) -> str:
    """Where the images of a tenant are: ``DIGEST.png``."""
    return join(url, require_id(tenant, "tenant"))


class RankedImages:
    """The images at a folder or URL. Safe to share between threads, and between servers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def keep(self, tenant: str, files: Mapping[str, bytes]) -> None:
        """Write the files (by digest) that are not there yet; what is there afterwards is whole and durable."""
        filesystem, root = locate(folder_of(self.url, tenant))
        missing = {digest: file for digest, file in files.items() if not filesystem.isfile(f"{root}/{digest}.png")}
        if not missing:
            return
        filesystem.makedirs(root, exist_ok=True)
        for digest, file in missing.items():
            if is_local(filesystem):
                _write_whole(Path(root) / f"{digest}.png", file)
            else:  # an object is there whole or not at all
                filesystem.pipe_file(f"{root}/{digest}.png", file)
        if is_local(filesystem):
            _sync(Path(root))

    def remove(self, tenant: str, digest: str) -> None:
        """Remove an image, if it is there."""
        filesystem, root = locate(folder_of(self.url, tenant))
        if filesystem.isfile(path := f"{root}/{digest}.png"):
            filesystem.rm_file(path)


def _write_whole(path: Path, content: bytes) -> None:
    """A file that others see only when it is complete and on the disk."""
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
