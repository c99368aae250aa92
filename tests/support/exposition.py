"""Values in a page of Prometheus's text format."""

import math

from prometheus_client.parser import text_string_to_metric_families


def sample(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of `name` with these labels; NaN where there is none."""
    found = [
        entry.value
        for family in text_string_to_metric_families(text)
        for entry in family.samples
        if entry.name == name and labels.items() <= entry.labels.items()
    ]
    return sum(found) if found else math.nan
