"""The guard in gateways: the scenario for Envoy Gateway, the configuration of an Envoy alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import httpx
import yaml

from guard_middleware import settings as middleware
from guard_middleware.ext_proc.server import Places, Server
from guard_middleware.ext_proc.service import SERVICE
from guard_middleware.settings import Settings
from guard_middleware.testing import FakeGuard, forbids
from guard_service.config import Settings as Guard
from tests.deploy.manifests import ROOT, Object, environment, named, of_kind, pod_templates
from tests.deploy.test_manifests import flags, probes
from tests.deploy.test_network_policies import (
    CLIENT,
    GATEWAY,
    HUB_LIKE,
    MONITORING,
    STRANGER,
    Pod,
    pod,
    policies,
    reaches,
)
from tests.middleware.asgi_calls import Backend, listening
from tests.middleware.ext_proc.real_envoy import envoy, needs_envoy, serving
from tests.middleware.formats.openai_replies import PATH, asking, reply
from tests.middleware.wrapped import BAD

ENVOY = "scenarios/envoy"


def processor() -> Object:
    (template,) = pod_templates(ENVOY)
    (container,) = template["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_the_processors_flags_and_environment_are_settings_that_it_takes() -> None:
    container = processor()
    given = flags(container)
    assert container["command"] == ["guard-ext-proc"]
    assert given.keys() <= {one.name for one in fields(Places)} | middleware.FIELDS.keys()
    found = middleware.from_environment(environment(container))
    assert found.guard.endswith(f"guard-pods.llama-guard.svc.cluster.local:{Guard().port}")


def test_the_processors_ports_and_probes_are_those_of_its_flags() -> None:
    container = processor()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given, defaults = flags(container), Places()
    for flag, port, default in (
        (given["listen"], ports["grpc"], defaults.listen),
        (given["admin"], ports["metrics"], defaults.admin),
    ):
        assert flag == f"0.0.0.0:{port}" and default.endswith(f":{port}")
    found = list(probes(container))
    assert [probe.get("grpc") for probe in found[:2]] == [{"port": ports["grpc"]}] * 2
    assert found[2]["httpGet"] == {"path": "/livez", "port": "metrics"}


def test_a_processor_has_time_to_drain() -> None:
    (template,) = pod_templates(ENVOY)
    drain_s = float(flags(processor())["drain_s"])
    waits = processor()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain_s == Places().drain_s
    assert template["spec"]["terminationGracePeriodSeconds"] > waits + drain_s


def test_all_that_goes_through_the_gateway_is_guarded_and_fails_closed() -> None:
    (policy,) = of_kind(ENVOY, "EnvoyExtensionPolicy")
    (target,) = policy["spec"]["targetRefs"]
    assert named(ENVOY, target["kind"], target["name"])
    (external,) = policy["spec"]["extProc"]
    (backend,) = external["backendRefs"]
    ports = named(ENVOY, "Service", backend["name"])["spec"]["ports"]
    (port,) = (port for port in ports if port["port"] == backend["port"])
    assert port["appProtocol"] == "kubernetes.io/h2c"
    assert external["failOpen"] is False
    assert float(external["messageTimeout"].removesuffix("s")) > Settings().guard_timeout_s
    assert external["processingMode"]["request"] == {"body": "FullDuplexStreamed"}
    assert external["processingMode"]["response"] == {"body": "FullDuplexStreamed"}


def test_the_gateway_alone_reaches_processor_and_model() -> None:
    held = policies("scenarios/starter", ENVOY)
    guard, made = pod("scenarios/starter", "llama-guard"), pod(ENVOY, "llm")
    model = Pod("llm", {"llama-guard/behind": "gateway"})
    assert reaches(held, GATEWAY, made, 9002) and reaches(held, GATEWAY, model, 8000)
    assert reaches(held, MONITORING, made, 9091) and reaches(held, made, guard, 50051)
    for source in (STRANGER, CLIENT, MONITORING, made):
        assert not reaches(held, source, model, 8000)
        assert not reaches(held, source, made, 9002)
    for target, port in ((HUB_LIKE, 443), (STRANGER, 8000), (guard, 9090)):
        assert not reaches(held, made, target, port)
        assert not reaches(held, model, target, port)


def test_the_readme_shows_the_filter_that_is_tested() -> None:
    text = (ROOT / "middleware/README.md").read_text()
    (shown,) = (
        yaml.safe_load(part.partition("```")[0])
        for part in text.split("```yaml\n")[1:]
        if "ExternalProcessor" in part.partition("```")[0]
    )
    config = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    (manager,) = chain["filters"]
    assert shown == [manager["typed_config"]["http_filters"][0]]


@needs_envoy
async def test_envoys_own_configuration_guards_a_backend(tmp_path: Path) -> None:
    """As it is, but for addresses."""
    config = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    clusters = {one["name"]: one for one in config["static_resources"]["clusters"]}
    (check,) = clusters["guard"]["health_checks"]
    assert check["grpc_health_check"] == {"service_name": SERVICE}
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    guard = FakeGuard(forbids(BAD))
    places = Places(f"unix:{tmp_path / 'processor'}", f"unix:{tmp_path / 'admin'}")
    async with (
        listening(backend, lifespan="off") as upstream,
        serving(Server(places, Settings(guarded=("/",)), guard)),
    ):
        host, _, port = upstream.removeprefix("http://").partition(":")
        placed(clusters["model"], {"socket_address": {"address": host, "port_value": int(port)}})
        placed(clusters["guard"], {"pipe": {"path": str(tmp_path / "processor")}})
        (listener,) = config["static_resources"]["listeners"]
        listener["address"] = {"pipe": {"path": str(tmp_path / "clients")}}
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "clients"))
        client = httpx.AsyncClient(transport=transport, base_url="http://envoy", timeout=60)
        async with envoy(config, tmp_path), client:
            answered = await client.post(PATH, json=asking("Hi"))
            blocked = await client.post(PATH, json=asking(BAD))
            escaped = await client.post("/v1%2fchat/completions", json=asking(BAD))
    assert answered.json() == reply("Hello there.")
    assert blocked.json()["choices"][0]["finish_reason"] == "content_filter"
    assert escaped.status_code == 400 and len(backend.bodies) == 1


def placed(cluster: Object, address: Object) -> None:
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"] = address
    cluster["type"] = "STATIC"
