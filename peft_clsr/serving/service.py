"""Starts a service on Ray."""

from __future__ import annotations

from typing import Any

import fastapi
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.deployment import Application
from ray.serve.schema import LoggingConfig

from .api import APPLICATION, Api, make_application
from .catalog import Catalog
from .settings import Settings
from .transcriber import Transcriber


def make_service(settings: Settings, catalog: Catalog) -> Application:
    """
    Describe a service to Ray Serve.

    Args:
        settings ([`Settings`]): What the user asked for.
        catalog ([`Catalog`]): Of the same model.
    """
    has_gpu = settings.device.startswith("cuda")
    transcribers = (
        serve.deployment(Transcriber)
        .options(
            num_replicas=settings.replicas,
            # While a batch runs, the next two wait in the replica.
            max_ongoing_requests=3 * settings.batch_size,
            max_queued_requests=settings.max_queue,
            health_check_period_s=2,  # so soon Ray notices that one is dead, and starts another
            ray_actor_options={"num_cpus": settings.threads, "num_gpus": 1 if has_gpu else 0},
        )
        .bind(settings, catalog)
    )

    def build() -> fastapi.FastAPI:  # in the replica
        return make_application(Api(settings, catalog, serve.get_deployment_handle("Transcriber", APPLICATION)))

    ingress = serve.deployment(
        serve.ingress(build)(),
        name="Api",
        # More requests than the transcribers take: those are answered that there is no room.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(transcribers)


def start_service(
    service: Application, address: str | None, host: str, port: int, cpus: int, metrics_port: int | None
) -> None:
    """
    Run a service on this machine or on a cluster. Returns when it can transcribe.

    Args:
        service (`Application`): Of [`make_service`].
        address (`str`, *optional*): Of a running Ray cluster, or "auto". By default a new Ray on the loopback.
        host (`str`): Where to listen.
        port (`int`): The port.
        cpus (`int`): CPUs of the new Ray.
        metrics_port (`int`, *optional*): Port of Ray's metrics, for the new Ray.

    Raises:
        RuntimeError: Ray or the service cannot start.
    """
    try:
        if address is None:
            local: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "_metrics_export_port": metrics_port}
            ray.init("local", num_cpus=cpus, include_dashboard=False, **local)
        else:
            ray.init(address)
    except Exception as error:  # Ray raises bare exceptions
        raise RuntimeError(f"Ray cannot be started or reached: {error}") from error
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    proxies = ProxyLocation.HeadOnly if address is None else ProxyLocation.EveryNode
    serve.start(proxies, HTTPOptions(host=host, port=port), logging_config=logs)
    serve.run(service, name=APPLICATION, route_prefix="/", logging_config=logs)


def stop_service() -> None:
    """Stop the service. Ray itself stops too, if it was started for it."""
    serve.delete(APPLICATION)
    ray.shutdown()
