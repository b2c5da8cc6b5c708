"""A small finished run on the tiny model, and a server over it on a free port."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from palate.card import stages
from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, ClusterConfig, PromptConfig
from palate.serving.answers import sample_answers
from palate.serving.http import create_app
from palate.serving.service import Service
from palate.serving.settings import Settings
from palate.training.parallel import World


def make_run(out: str, corpus: str, seed: int = 0) -> str:
    """A run of a few steps; its vectors move the tiny model's answers."""
    config = CardConfig(
        corpus=corpus,
        out=out,
        model="tiny",
        seed=seed,
        cluster=ClusterConfig(clusters=2),
        prompt=PromptConfig(max_prompt_tokens=200, max_answer_tokens=12),
        adapt=AdaptConfig(rank=2, epochs=2, batch=8, learning_rate=1e-2),
        contrast=ContrastConfig(people_per_shard=8, top_k=20),
        prefer=PreferConfig(width=4, head_epochs=8, head_precision=(1.0,), vector_deviation=(3.0,)),
    )
    stages.pipeline(config, World(), sampler=sample_answers)
    return out


def settings(folder, **changes) -> Settings:
    values = {"slots": 4, "max_length": 400, "max_waiting": 16, "max_new_tokens": 64, "max_answers": 4}
    return Settings(database=f"sqlite:///{folder}/palate.db", **{**values, **changes})


@contextmanager
def serving(config: Settings, *runs: str) -> Iterator[tuple[str, Service]]:
    """A server over ``runs``, the first of them live: its base URL, and the service behind it."""
    service = Service(config)
    for run in runs:
        service.register(run)
    service.start()
    try:
        with listening(create_app(service)) as url:
            yield url, service
    finally:
        service.stop()


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The base URL at which an application answers, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[free])), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
