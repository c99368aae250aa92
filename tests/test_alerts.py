"""The alert rules of deploy/prometheus ask for what /metrics has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.reference import metrics

FOLDER = Path(__file__).parent.parent / "deploy" / "prometheus"
# a metric and its conditions: name{label="value", ...}
ASKED = re.compile(r"(ranking_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def rules() -> list[dict]:
    text = (FOLDER / "alerts.yaml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_every_rule_has_its_parts():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 5
    for rule in rules():
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"]["summary"].endswith(".")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_the_server_counts(rule: dict):
    labels: dict[str, set[str]] = {}
    for known in metrics.server_metrics():
        own = {*known.labels, "replica", "ingress"}
        names = [known.name]
        if known.family.type == "histogram":
            names = [f"{known.name}_{part}" for part in ("bucket", "sum", "count")]
            own = own | {"le"}
        labels |= dict.fromkeys(names, own)

    asked = ASKED.findall(rule["expr"])
    assert asked
    of_all = set()
    for name, conditions in asked:
        assert name in labels, f"{name} is no metric of the server"
        assert set(re.findall(r"(\w+)\s*[=!]~?=?", conditions)) <= labels[name]
        of_all |= labels[name]
    for group in GROUPED.findall(rule["expr"]):
        assert {label.strip() for label in group.split(",")} <= of_all


def test_prometheus_reads_them_and_they_fire():
    """Where promtool is installed: Debian's package is prometheus."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool")
    for arguments in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
