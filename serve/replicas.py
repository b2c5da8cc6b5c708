"""What every application says to Serve: how many replicas, on what, when one is replaced, and how much may wait."""

from pydantic import BaseModel
from ray import serve


class Replicas(BaseModel):
    """What the config's ``args`` may say of replicas, beside the application's own settings."""

    replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0


def deploy(server: type, name: str, settings: Replicas, at_once: int) -> serve.Application:
    """The application with these replicas of ``server``, each of which takes ``at_once`` requests, waiting ones too."""
    # The servers have queues and limits of their own, which answer in OpenAI's shapes; Serve's come behind them.
    most = 2 * at_once + 16
    deployment = serve.deployment(
        server,
        name=name,
        num_replicas=settings.replicas,
        max_ongoing_requests=most,
        max_queued_requests=most,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )
    return deployment.bind(settings)
