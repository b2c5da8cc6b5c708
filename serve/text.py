"""Ray Serve application: personalized text over HTTP. `serve run serve/config.yaml`, or with another config.

Each replica loads the runs that the database lists and answers alone; replicas share the database. What a replica does
is in palate.serving; here is only what Serve needs to know.
"""

import asyncio
import time

from fastapi import FastAPI
from ray import serve
from serve.replicas import Replicas, deploy

from palate.serving.logs import write_json_lines
from palate.serving.settings import Settings
from palate.users.runs import live_run


class TextSettings(Settings, Replicas):
    """What the config's ``args`` may say."""

    run: str | None = None
    """A run to serve where none is live yet: the first start needs no administration."""


@serve.ingress()
class TextServer:
    """One replica."""

    def __init__(self, settings: TextSettings) -> None:
        write_json_lines()
        start = time.perf_counter()
        # Here, as only replicas need torch: Serve imports this module for each change of the config, too.
        from palate.serving.service import Service

        plain = settings.model_dump(exclude={"run", *Replicas.model_fields})
        self._service = Service(Settings(**plain))
        if settings.run and live_run(self._service.store) is None:
            self._service.register(settings.run)
        self._service.start()
        print(f"replica ready in {time.perf_counter() - start:.1f} s, live: {self._service.live}", flush=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from palate.serving.http import create_app

        return create_app(self._service)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._service.healthy:
            raise RuntimeError("the engine has failed: see the replica's log")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._service.stop)


def app(settings: TextSettings) -> serve.Application:
    """The application of the config's ``import_path``."""
    return deploy(TextServer, "text", settings, settings.slots + settings.max_waiting)
