"""What a model reads, for people and programs that send requests to it."""

from pipeline.batches.features import FeatureMaps
from pipeline.config import FeatureConfig
from serve_app.schemas import FeatureInfo


def describe_features(features: FeatureConfig, maps: FeatureMaps) -> list[FeatureInfo]:
    """Every feature of the model, in the order of the configuration."""
    found = [_column("item_id", "categorical", maps)]
    for name, column in features.item.items():
        found.append(_column(f"item.{name}", column.kind, maps))
    for name, column in features.user.items():
        found.append(_column(f"user.{name}", column.kind, maps))
    for name, column in features.request.items():
        found.append(_column(f"request.{name}", column.kind, maps))

    for name, outcome in features.history.items():
        num_buckets = len(outcome.edges) + 1
        found.append(FeatureInfo(name=f"history.{name}", kind="buckets", num_values=num_buckets))
    for name, rate in features.dense.items():
        found.append(FeatureInfo(name=f"rates.{name}", kind="rates", by=list(rate.by)))
    return found


def _column(name: str, kind: str, maps: FeatureMaps) -> FeatureInfo:
    num_known = maps.vocab_sizes[name] - 1  # row 0 is the unknown value's
    return FeatureInfo.model_validate({"name": name, "kind": kind, "num_values": num_known})
