"""Writes dashboard.json, which Grafana reads, from the panels below, which people read.

python deploy/grafana/make_dashboard.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACE = Path(__file__).with_name("dashboard.json")
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8
CHOSEN = 'namespace=~"$namespace"'


@dataclass(frozen=True)
class Panel:
    """A graph: a title, a unit of Grafana's, and queries with their legends."""

    title: str
    unit: str
    queries: dict[str, str]
    help: str = ""


def rate(metric: str, by: str, labels: str = "") -> str:
    """Per second, summed over all but `by`."""
    chosen = ",".join(filter(None, (CHOSEN, labels)))
    return f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))"


def quantiles(metric: str, labels: str = "") -> dict[str, str]:
    """Half, 19 of 20 and 99 of 100 are faster than these."""
    buckets = rate(f"{metric}_bucket", "le", labels)
    return {f"p{p}": f"histogram_quantile({p / 100}, {buckets})" for p in (50, 95, 99)}


def share(metric: str, labels: str) -> str:
    """Of all, those with the labels."""
    part = f"sum(rate({metric}{{{CHOSEN},{labels}}}[$__rate_interval]))"
    return f"{part} / sum(rate({metric}{{{CHOSEN}}}[$__rate_interval]))"


ROWS: dict[str, list[Panel]] = {
    "What it decides": [
        Panel("Verdicts", "ops", {"{{action}}": rate("guard_verdicts_total", "action")}),
        Panel(
            "Share blocked",
            "percentunit",
            {"blocked": share("guard_verdicts_total", 'action="block"')},
        ),
        Panel(
            "Rules that fired",
            "ops",
            {
                "{{category}} {{direction}}": rate(
                    "guard_categories_fired_total", "category,direction"
                )
            },
        ),
        Panel(
            "Policies in shadow: what they would do",
            "ops",
            {"{{policy}} {{action}}": rate("guard_shadow_verdicts_total", "policy,action")},
        ),
        Panel(
            "No verdict, by reason",
            "ops",
            {"{{reason}}": rate("guard_judgement_errors_total", "reason")},
            "A conversation that got no verdict is an error to its caller, never a verdict.",
        ),
        Panel(
            "Who decided in cascades",
            "ops",
            {"{{tier}} {{reason}}": rate("guard_cascade_verdicts_total", "tier,reason")},
        ),
    ],
    "Calls": [
        Panel("Calls", "ops", {"{{rpc}} {{code}}": rate("guard_requests_total", "rpc,code")}),
        Panel("Time of Classify", "s", quantiles("guard_request_seconds", 'rpc="Classify"')),
        Panel(
            "Time of ClassifyBatch",
            "s",
            quantiles("guard_request_seconds", 'rpc="ClassifyBatch"'),
            "What middleware calls: a request's turns are one batch.",
        ),
        Panel(
            "Calls in progress", "short", {"{{rpc}}": f"sum by (rpc) (guard_in_flight{{{CHOSEN}}})"}
        ),
    ],
    "Engine": [
        Panel(
            "Wait for the engine",
            "s",
            quantiles("guard_queue_seconds"),
            "The autoscaler holds the mean of this.",
        ),
        Panel("One run of the engine", "s", quantiles("guard_inference_seconds")),
        Panel("Assembling a prompt", "s", quantiles("guard_tokenize_seconds")),
        Panel(
            "Queue",
            "short",
            {
                "prompts": f"sum(guard_queue_items{{{CHOSEN}}})",
                "tokens": f"sum(guard_queue_tokens{{{CHOSEN}}})",
            },
        ),
        Panel("Tokens", "ops", {"{{how}}": rate("guard_tokens_total", "how")}),
        Panel("Prompts in one run", "short", quantiles("guard_batch_items")),
        Panel(
            "Taken from caches",
            "percentunit",
            {
                "verdicts": share("guard_verdict_cache_total", 'result!="miss"'),
                "prefixes": share("guard_prefix_cache_total", 'result="hit"'),
            },
        ),
        Panel(
            "Memory held",
            "bytes",
            {
                "growing replies": f"sum(guard_session_bytes{{{CHOSEN}}})",
                "images in progress": f"sum(guard_image_bytes{{{CHOSEN}}})",
            },
        ),
        Panel(
            "States crowded out",
            "ops",
            {"crowded out": rate("guard_sessions_crowded_out_total", "namespace")},
            "Each is computed anew: costs time. More session_bytes avoids it.",
        ),
        Panel("Images", "ops", {"{{result}}": rate("guard_images_total", "result")}),
    ],
    "Exchanged while it runs": [
        Panel(
            "Reloads",
            "ops",
            {
                "policies {{result}}": rate("guard_policy_reloads_total", "result"),
                "models {{result}}": rate("guard_model_reloads_total", "result"),
            },
        ),
        Panel(
            "Guards whose files are at fault",
            "short",
            {
                "policies": f"sum(guard_policy_reload_failed{{{CHOSEN}}})",
                "models": f"sum(guard_model_reload_failed{{{CHOSEN}}})",
            },
            "They judge by what was loaded before.",
        ),
        Panel(
            "Models that are leaving",
            "short",
            {"still needed by older calls": f"sum(guard_models_draining{{{CHOSEN}}})"},
            "Their memory is given back when the last of these calls has ended.",
        ),
    ],
    "Second guard": [
        Panel("Asking it", "s", quantiles("guard_second_seconds")),
        Panel(
            "Left open, by reason",
            "ops",
            {"{{reason}}": rate("guard_second_unable_total", "reason")},
        ),
        Panel(
            "Is asked",
            "short",
            {"guards that ask it": f"sum(guard_second_answers{{{CHOSEN}}})"},
        ),
    ],
    "Middleware and sidecar": [
        Panel(
            "Exchanges",
            "ops",
            {"{{result}} {{mode}}": rate("guard_middleware_exchanges_total", "result,mode")},
        ),
        Panel("Formats", "ops", {"{{format}}": rate("guard_middleware_exchanges_total", "format")}),
        Panel(
            "Without a verdict",
            "ops",
            {
                "{{direction}} {{reason}} {{became}}": rate(
                    "guard_middleware_unjudged_total", "direction,reason,became"
                )
            },
            "Refused, or let pass where on_unavailable_* is allow.",
        ),
        Panel("Time to a request's verdict", "s", quantiles("guard_middleware_prompt_seconds")),
        Panel(
            "Added to a reply's first text",
            "s",
            quantiles("guard_middleware_first_text_delay_seconds"),
        ),
        Panel("Added to a reply's end", "s", quantiles("guard_middleware_end_delay_seconds")),
        Panel(
            "Unknown paths refused",
            "ops",
            {"refused": rate("guard_middleware_refused_total", "namespace")},
        ),
        Panel(
            "Under way",
            "short",
            {"requests": f"sum(guard_middleware_in_progress{{{CHOSEN}}})"},
        ),
    ],
    "Audit log and traces": [
        Panel(
            "Lines of the audit log",
            "ops",
            {"{{result}}": rate("guard_audit_lines_total", "result")},
            "What failed was refused to its caller, unless audit_failure is continue.",
        ),
        Panel(
            "Audit logs reach",
            "short",
            {"{{instance}}": f"max by (instance) (guard_audit_log_lines{{{CHOSEN}}})"},
            "Never falls: a witness for guardctl audit verify --reaches.",
        ),
        Panel(
            "Spans sent",
            "ops",
            {
                "guard {{result}}": rate("guard_trace_spans_total", "result"),
                "sidecar {{result}}": rate("guard_middleware_trace_spans_total", "result"),
            },
            "A collector that fails costs spans and hurts no call.",
        ),
    ],
    "What runs": [
        Panel(
            "Guards that take calls",
            "short",
            {"ready": f"sum(guard_ready{{{CHOSEN}}})", "all": f"count(guard_ready{{{CHOSEN}}})"},
        ),
        Panel(
            "Models",
            "short",
            {"{{name}} {{digest}}": f"count by (name,digest) (guard_model_info{{{CHOSEN}}})"},
        ),
        Panel(
            "Policies",
            "short",
            {
                "{{name}} {{version}} {{mode}}": (
                    f"count by (name,version,digest,mode) (guard_policy_info{{{CHOSEN}}})"
                )
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    return {
        "uid": "llama-guard",
        "title": "Llama Guard",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_datasource(), _namespace()]},
        "panels": [{**panel, "id": number} for number, panel in enumerate(_panels(), 1)],
    }


def _panels() -> Iterator[dict[str, Any]]:
    """A heading for each row, and below it the panels, three side by side."""
    y = 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}
        y += 1
        across = COLUMNS // PANEL_WIDTH
        for at, panel in enumerate(panels):
            line, column = divmod(at, across)
            yield _panel(panel, column * PANEL_WIDTH, y + line * PANEL_HEIGHT)
        y += -(-len(panels) // across) * PANEL_HEIGHT


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": PANEL_WIDTH, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "expr": query,
                "legendFormat": legend,
                "exemplar": "_bucket" in query,
                "datasource": source,
            }
            for at, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _namespace() -> dict[str, Any]:
    return {
        "name": "namespace",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": 'label_values({__name__=~"guard_ready|guard_middleware_in_progress"}, namespace)',
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    PLACE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
