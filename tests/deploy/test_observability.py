"""Alerts, dashboard, autoscaling: every query asks for what service and middleware show."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from guard_middleware import metrics as middleware
from guard_service import metrics as service
from tests.deploy.manifests import ROOT, of_kind

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
ALERTS: dict[str, Any] = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text())
ADAPTER: dict[str, Any] = yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text())
TESTS = ("alerts_test.yaml", "alerts_days_test.yaml")
TARGET = {"namespace", "job", "instance", "pod"}  # labels that come with the scrape
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def series() -> dict[str, set[str]]:
    """The names of all series that exist, with their labels."""
    scraped = service.Metrics()
    groups = (
        scraped,
        service.CascadeMetrics(scraped.registry),
        service.ReloadMetrics("guard_policy", scraped.registry),
        service.ReloadMetrics("guard_model", scraped.registry),
        service.SecurityMetrics(scraped.registry),
        service.EngineMetrics("guard_second", scraped.registry),
        service.AuditMetrics(scraped.registry),
        middleware.Metrics(CollectorRegistry()),
    )
    found = {}
    for metric in (one for group in groups for one in vars(group).values()):
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[str(metric._type)]:
                labels = {*metric._labelnames, *(("le",) if suffix == "_bucket" else ())}
                found[metric._name + suffix] = labels
    return found


def alert_queries() -> Iterator[tuple[str, str]]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def panel_queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']}: {target['legendFormat']}", filled_in(target["expr"])


def filled_in(query: str) -> str:
    """A dashboard's query as Grafana sends it, for all namespaces."""
    return query.replace("$__rate_interval", "5m").replace("$namespace", ".*")


def adapter_queries() -> Iterator[tuple[str, str]]:
    for rule in ADAPTER["rules"]:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        yield rule["name"]["as"], query.replace("<<.LabelMatchers>>", 'namespace="n",pod=~"a|b"')


QUERIES = [*alert_queries(), *panel_queries(), *adapter_queries()]
SERIES = series()


def problems(query: str) -> list[str]:
    """What a query asks for that is not there."""
    found: list[str] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in SERIES:
                found.append(f"there is no {node.name}")
                return
            asked = {matcher.name for matcher in node.matchers.matchers}
            found.extend(f"{node.name} has no {label}" for label in asked - TARGET - labels(node))
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            inside = set().union(*(labels(one) for one in selectors(node.expr)))
            wanted = set(node.modifier.labels) - TARGET - inside
            found.extend(f"nothing inside has {label}" for label in wanted)

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def labels(selector: promql_parser.VectorSelector) -> set[str]:
    return SERIES.get(selector.name or "", set())


def selectors(expression: promql_parser.Expr) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(expression, visit)
    return found


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in QUERIES])
def test_a_query_asks_for_series_and_labels_that_exist(query: str) -> None:
    assert selectors(promql_parser.parse(query))
    assert not problems(query)


@pytest.mark.parametrize(
    "query",
    [
        "guard_readiness",
        'guard_requests_total{method="Classify"}',
        "sum by (action) (rate(guard_requests_total[5m]))",
        "rate(guard_requests[5m])",
        "sum by (le) (rate(guard_queue_seconds_sum[5m]))",
    ],
)
def test_the_check_finds_what_does_not_exist(query: str) -> None:
    assert problems(query)


def test_reasons_and_codes_that_alerts_name_are_those_of_grpc() -> None:
    codes = "|".join(re.findall(r'code=~?"([A-Z_|]+)"', str(ALERTS))).split("|")
    assert codes and set(codes) <= {code.name for code in grpc.StatusCode}


def test_the_operators_rules_are_the_same() -> None:
    for scenario in ("scenarios/cpu", "scenarios/gpu"):
        (rules,) = of_kind(scenario, "PrometheusRule")
        assert rules["spec"] == ALERTS


def test_the_dashboard_is_what_its_script_writes() -> None:
    made = runpy.run_path(str(GRAFANA / "make_dashboard.py"))["dashboard"]()
    assert made == DASHBOARD, "run deploy/grafana/make_dashboard.py"


def test_panels_lie_beside_each_other_on_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_the_dashboard_in_the_cluster_is_the_same() -> None:
    (config,) = of_kind("scenarios/cpu", "ConfigMap")
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(config["data"]["dashboard.json"]) == DASHBOARD


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(PROMETHEUS / "alerts.yaml"))
    assert "SUCCESS" in promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@pytest.mark.parametrize("file", TESTS)
def test_alerts_fire_when_they_should_and_only_then(file: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(ROOT / "tests" / "deploy" / file))


def test_every_alert_is_seen_to_fire_and_to_stay_silent() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for file in TESTS:
        for case in yaml.safe_load((ROOT / "tests/deploy" / file).read_text())["tests"]:
            for one in case["alert_rule_test"]:
                (fires if one.get("exp_alerts") else silent).add(one["alertname"])
    alerts = {name for name, _ in alert_queries()}
    assert fires == silent == alerts
