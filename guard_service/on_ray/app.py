"""The application that Ray Serve deploys: `import_path: guard_service.on_ray.app:build`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from ray import serve

from guard_service.on_ray.replica import Guard
from guard_service.on_ray.settings import settings_of

GUARD, SECOND = "guard", "second"
# Replicas drain for `drain_timeout_s` at most, and a little longer.
DRAIN_S = 30.0
MOST_CALLS = 1024


def build(given: Mapping[str, Any]) -> Any:
    """The application of an argument for each setting, and `second`: those of the second guard of
    cascades, which then is a deployment of its own.

    What scales, and with which resources, is the file's that deploys it. Raises ConfigError.
    """
    first = {name: value for name, value in given.items() if name != SECOND}
    settings_of(first)  # a mistake is told now, not by a replica
    if SECOND not in given:
        return _deployment(GUARD).bind(first)
    settings_of(given[SECOND])
    return _deployment(GUARD).bind(first, _deployment(SECOND).bind(given[SECOND], is_second=True))


def _deployment(name: str) -> Any:
    return serve.deployment(
        Guard,
        name=name,
        # A full guard refuses at once; the queue of Ray's proxy is not to grow before it.
        max_ongoing_requests=256,
        max_queued_requests=MOST_CALLS,
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4},
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=1.0,
    )


def add_HealthServicer_to_server(servicer: Any, server: Any) -> None:
    """gRPC's health for Ray's proxy: `Check` alone. A `Watch` would be a call that never ends, by
    which a replica would seem busy; clients take its absence for health."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    methods = {"Check": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods),)
    )
