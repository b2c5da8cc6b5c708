"""Ray Serve application: images over HTTP. `serve run` with a config as docs/serving_images.md shows.

Each replica holds the models that its settings and its registry name. What a replica does is in palate.serving; here
is only what Serve needs to know.
"""

import asyncio
import time

from fastapi import FastAPI
from ray import serve
from serve.replicas import Replicas, deploy

from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService, ImageSettings
from palate.serving.logs import write_json_lines


class ImageServerSettings(ImageSettings, Replicas):
    """What the config's ``args`` may say."""


@serve.ingress()
class ImageServer:
    """One replica."""

    def __init__(self, settings: ImageServerSettings) -> None:
        write_json_lines()
        start = time.perf_counter()
        plain = settings.model_dump(exclude=set(Replicas.model_fields))
        self._service = ImageService(ImageSettings(**plain)).start()
        print(f"replica ready in {time.perf_counter() - start:.1f} s: {sorted(self._service.hosted)}", flush=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_image_app(self._service)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._service.healthy:
            raise RuntimeError("the device has failed: see the replica's log")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._service.stop)


def app(settings: ImageServerSettings) -> serve.Application:
    """The application of the config's ``import_path``."""
    return deploy(ImageServer, "images", settings, settings.max_batch + settings.max_waiting)
