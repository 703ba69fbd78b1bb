"""compose.yaml: valid by the Compose specification, and the backend behind its sidecar."""

from __future__ import annotations

from typing import Any

import compose_spec
import pytest
import yaml

from guard_middleware import settings as middleware
from guard_service import __version__, config
from guard_service.config import Settings
from tests.deploy.manifests import ROOT
from tests.deploy.test_containers import IMAGES

FOLDER = ROOT / "deploy"
TEXT = (FOLDER / "compose.yaml").read_text()
OVERRIDE = (FOLDER / "compose.grafana.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def valid(text: str) -> None:
    compose_spec.PyOptions(apply_merge=True).from_yaml(text).validate()


def networks(service: str) -> set[str]:
    return set(SERVICES[service].get("networks", ()))


def together(service: str) -> set[str]:
    """The others that share a network with a service."""
    return {one for one in SERVICES if one != service and networks(one) & networks(service)}


def test_it_is_valid() -> None:
    valid(TEXT)


@pytest.mark.parametrize(
    "right, wrong",
    [("read_only", "readonly"), ("service_healthy", "healthy"), ("[edge, model,", "[edge, modle,")],
)
def test_the_validation_finds_what_is_wrong(right: str, wrong: str) -> None:
    with pytest.raises(ValueError):
        valid(TEXT.replace(right, wrong))


def test_the_sidecars_port_alone_is_published_and_on_this_machine_alone() -> None:
    published = {name: one["ports"] for name, one in SERVICES.items() if one.get("ports")}
    assert published == {"sidecar": ["127.0.0.1:8080:8080"]}


def test_grafana_is_shown_by_an_override_that_fits() -> None:
    merged = yaml.safe_load(TEXT.replace("<<: *confined", ""))
    merged["services"]["grafana"] |= yaml.safe_load(OVERRIDE)["services"]["grafana"]
    valid(yaml.safe_dump(merged))
    (port,) = merged["services"]["grafana"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert not set(merged["services"]["grafana"]["networks"]) & networks("backend")


def test_the_backend_is_with_the_sidecar_alone() -> None:
    assert together("backend") == {"sidecar"}
    assert SERVICES["backend"].get("network_mode") is None
    assert together("guard") == {"sidecar", "prometheus", "grafana"}
    for shared in networks("backend") & networks("sidecar"):
        assert COMPOSE["networks"][shared] == {"internal": True}


def test_the_sidecar_finds_backend_and_guard() -> None:
    (_, upstream) = SERVICES["sidecar"]["command"]
    port = SERVICES["backend"]["environment"]["OLLAMA_HOST"].rpartition(":")[2]
    assert upstream == f"http://backend:{port}"
    found = middleware.from_environment(SERVICES["sidecar"]["environment"])
    assert found.guard == f"guard:{Settings().port}"


def test_the_guards_environment_is_settings_that_it_takes() -> None:
    settings = config.load({}, SERVICES["guard"]["environment"]).settings
    assert settings.threads == SERVICES["guard"]["cpus"]


@pytest.mark.parametrize("name", SERVICES)
def test_containers_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only") is (None if name == "backend" else True)
    assert not service.get("privileged") and "/var/run/docker.sock" not in str(service)


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    if "build" in SERVICES[name]:
        assert tag == __version__
        assert SERVICES[name]["build"]["target"] in IMAGES
        assert (FOLDER / SERVICES[name]["build"]["context"]).resolve() == ROOT
    else:
        assert image and tag.count(".") == 2


def test_files_that_are_mounted_exist() -> None:
    mounts = [v for one in SERVICES.values() for v in one.get("volumes", ()) if v.startswith("./")]
    assert mounts
    for mount in mounts:
        source, _, mode = mount.split(":")
        assert (FOLDER / source).exists() and mode == "ro"


def test_prometheus_scrapes_what_it_can_reach() -> None:
    scrapes = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {t for one in scrapes for c in one["static_configs"] for t in c["targets"]}
    assert targets == {f"guard:{Settings().metrics_port}", "sidecar:9091"}
    assert {target.partition(":")[0] for target in targets} <= together("prometheus")
