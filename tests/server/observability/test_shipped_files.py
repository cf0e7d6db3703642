"""The dashboard, the alerts and the documentation speak of what the server exposes, and of nothing else."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.stats import EngineStats
from server.frontend.engine_client import EngineInfo, EngineStatus
from server.observability.catalog import FAMILIES
from server.observability.logs import IntervalLog, request_fields
from server.observability.metrics import ServerMetrics
from server.observability.records import RequestRecord
from server.observability.tracing import span_attributes
from server.settings import ServerSettings

ROOT = Path(__file__).parents[3]
FOLDER = files("server.observability") / "dashboards"
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
DOCS = (ROOT / "docs" / "observability.md").read_text()
METRIC = re.compile(r"(\w+):(\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
SCRAPED = {"instance", "job"}  # labels Prometheus adds


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries(prefix: str) -> list[str]:
    """Every query, Grafana's variables filled in."""
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    variables = DASHBOARD["templating"]["list"]
    queries += [one["query"]["query"] for one in variables if one["type"] == "query"]
    return [query.replace("${prefix}", prefix).replace("$model_name", "tiny") for query in queries]


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def alert_queries(prefix: str) -> list[str]:
    return [rule["expr"].replace("jaxserve:", f"{prefix}:") for rule in alert_rules()]


@pytest.fixture(params=["jaxserve", "vllm"])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def warm(engine: Any, engine_info: EngineInfo, make_stats: Callable[..., EngineStats]) -> None:
    """The engine has described itself."""
    engine.info, engine.status = engine_info, EngineStatus(phase="ready", stats=make_stats())


@pytest.fixture
def exposed(
    prefix: str, make_metrics: Callable[..., ServerMetrics], drive: Any, warm: None
) -> dict[str, dict[str, set[str]]]:
    """name of a sample -> {label: values} at /metrics, after some requests."""
    metrics = make_metrics(metrics_prefix=prefix)
    driver = drive(metrics)
    driver.run()
    driver.finish(driver.begin(), 3.0, "cancelled")
    metrics.rejected("queue_full")
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    return found


def problems(query: str, exposed: dict[str, dict[str, set[str]]]) -> Iterator[str]:
    """What a query names that /metrics does not have."""
    names = METRIC.findall(query)
    if not names:
        yield "no metric at all"
    labels: set[str] = set()
    for prefix, name, selector in names:
        if f"{prefix}:{name}" not in exposed:
            yield f"{prefix}:{name}"
            continue
        have = exposed[f"{prefix}:{name}"]
        labels |= have.keys()
        for label, wanted in MATCHER.findall(selector):
            if label not in have:
                yield f"{label} of {name}"
            else:
                yield from (f"{label}={one} of {name}" for one in wanted.split("|") if one not in have[label])
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        yield from {label.strip() for label in grouped.split(",")} - labels - SCRAPED


def test_every_query_of_the_dashboard_names_what_is_exposed(prefix: str, exposed: Any) -> None:
    queries = dashboard_queries(prefix)
    assert len(queries) > 30
    assert {query: found for query in queries if (found := list(problems(query, exposed)))} == {}


def test_every_alert_names_what_is_exposed(prefix: str, exposed: Any) -> None:
    assert {query: found for query in alert_queries(prefix) if (found := list(problems(query, exposed)))} == {}


@pytest.mark.parametrize(
    "query",
    [
        "rate(jaxserve:generated_tokens_total[5m])",
        'jaxserve:errors_total{code="oops"}',
        'jaxserve:errors_total{kind="queue_full"}',
        'jaxserve:engine_phase{phase=~"dead|gone"}',
        "sum by (pod) (jaxserve:engine_up)",
        "sum(up)",
    ],
)
@pytest.mark.parametrize("prefix", ["jaxserve"], indirect=True)
def test_a_query_that_names_something_else_is_found(query: str, exposed: Any) -> None:
    assert list(problems(query, exposed))


def test_the_dashboard_shows_every_family_that_alerts_rest_on() -> None:
    """Whoever is woken up finds the number on the dashboard."""
    shown = {name for query in dashboard_queries("jaxserve") for _, name, _ in METRIC.findall(query)}
    assert {name for query in alert_queries("jaxserve") for _, name, _ in METRIC.findall(query)} <= shown


def test_the_dashboard_can_be_imported_anywhere() -> None:
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "prefix", "model_name"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert (variables["prefix"]["type"], variables["prefix"]["query"]) == ("textbox", "jaxserve")
    assert "id" not in DASHBOARD  # Grafana gives one
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]


def test_panels_lie_side_by_side() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own


def test_alerts_are_complete_and_documented() -> None:
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
    documented = re.findall(r"^\| `(Jaxserve\w+)` \|", DOCS, re.MULTILINE)
    assert documented == [rule["alert"] for rule in alert_rules()]


def documented_metrics() -> dict[str, tuple[str, set[str], str]]:
    rows = re.findall(r"^\| `jaxserve:(\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", DOCS, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}


def test_the_documented_metrics_are_those_of_slash_metrics(
    make_metrics: Callable[..., ServerMetrics], warm: None
) -> None:
    exposed = {}
    for family in text_string_to_metric_families(make_metrics().render()[0].decode()):
        if family.name.startswith("process_"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "engine", "le"}
        name = family.name.removeprefix("jaxserve:") + ("_total" if family.type == "counter" else "")
        exposed[name] = (family.type, labels, family.documentation)
    assert documented_metrics() == exposed
    assert len(exposed) == len(FAMILIES)


@pytest.fixture
def record(make_metrics: Callable[..., ServerMetrics], drive: Any) -> RequestRecord:
    records: list[RequestRecord] = []
    metrics = make_metrics()
    metrics.listen(records.append)
    drive(metrics).run()
    return records[0]


def test_documented_fields_and_attributes_are_the_real_ones(record: RequestRecord) -> None:
    logs = DOCS[DOCS.index("Finished requests are then logged") : DOCS.index("## Traces")]
    assert set(re.findall(r"`(\w+)`", logs)) == request_fields(record).keys()
    rows = re.findall(r"^\| (`(?:gen_ai|jaxserve)\.[^|]*) \|", DOCS, re.MULTILINE)
    attributes = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert attributes == span_attributes(record).keys() | {"error.type"}


def test_the_documented_log_line_is_what_is_logged(
    engine: Any, make_stats: Callable[..., EngineStats], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = IntervalLog(ServerSettings(), lambda: engine.status)
    engine.status = EngineStatus(phase="ready", stats=make_stats())
    log.tick()
    log.tick()
    [documented] = re.findall(r"^20.*? INFO frontend-0 ([\w.]+): (.*)$", DOCS, re.MULTILINE)
    [logged] = caplog.records

    def without_numbers(line: str) -> str:
        return re.sub(r"[\d.]+", "n", line)

    assert (documented[0], without_numbers(documented[1])) == (logged.name, without_numbers(logged.message))
