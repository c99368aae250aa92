"""No setting holds a secret, and no message, log line or traceback shows one."""

import dataclasses
import logging
import pickle
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config import ConfigError, Outage, RunConfig, UserError
from pipeline.config.secrets import MaskingFormatter, has_secret, mask_secrets

ADDRESSES = (
    "redis://:hunter2@host:6379/0",
    "rediss://me:hunter2@host/0",
    "unix:///run/redis.sock?password=hunter2",
    "http://me:hunter2@mlflow:5000",
    "https://hunter2@mlflow",
    "https://host/v1/traces?api-key=hunter2",
    "s3://key:hunter2@logs/day",
    "s3://logs/day?secret_key=hunter2",
    "s3://logs/day?region=eu&X-Amz-Signature=hunter2",
    "s3://logs/day?endpoint_override=http%3A%2F%2Fme:hunter2%40minio:9000",
    "s3://logs/day?access_key=hunter2&scheme=https",
    "gs://logs/day?X-Goog-Credential=hunter2",
    "abfs://logs@account/day?sig=hunter2",
    "ray://me:hunter2@head:10001",
)
OPEN = (
    "redis://host:6379/0",
    "http://mlflow:5000",
    "s3://logs/users/me@example.com/day?endpoint_override=http://minio:9000&region=eu",
    "gs://logs/passes/day",
    "https://host/?design=keyboard&signal=1",
)


def text_settings(section: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that takes text, with the form of its value around the text."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key = f"{path}.{field.name}" if path else field.name
        yield from _forms(hints[field.name], key)


def _forms(hint: Any, key: str) -> Iterator[tuple[str, Any]]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield from text_settings(typing.cast(type, hint), key)
    elif origin in (types.UnionType, typing.Union):
        for one in args:
            yield from _forms(one, key)
    elif hint is str:
        yield key, lambda text: text
    elif origin is tuple and args[0] is str:
        yield key, lambda text: [text]
    elif origin is dict and str in (args[1], *typing.get_args(args[1])):
        yield key, lambda text: {"one": text}


SETTINGS = list(text_settings(RunConfig))


def test_the_walk_finds_the_settings_that_hold_addresses() -> None:
    found = {key for key, _ in SETTINGS}
    assert found >= {
        "tracking.uri",
        "serve.redis_url",
        "serve.otlp_endpoint",
        "serve.served_folder",
    }
    assert found >= {"source.path", "source.users.path", "source.items.path", "ray.address"}
    assert found >= {"tracking.experiment", "serve.allowed_hosts", "source.columns"}


@pytest.mark.parametrize(("key", "form"), SETTINGS, ids=[key for key, _ in SETTINGS])
def test_no_setting_takes_a_secret_or_shows_it(key: str, form: Any) -> None:
    """Whichever setting it is, now or later, and whatever else is wrong with the value."""
    for address in ADDRESSES:
        for value in (form(address), {"deeper": [address]}):
            raw: Any = value
            for part in reversed(key.split(".")):
                raw = {part: raw}
            with pytest.raises(ConfigError) as refused:
                config.from_dict(raw)
            assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_messages_show_addresses_without_their_secrets(address: str) -> None:
    assert has_secret(address)
    for kind in (UserError, ConfigError, Outage):
        error = kind(f"no answer of {address!r}: refused")
        for one in (error, pickle.loads(pickle.dumps(error))):
            assert "hunter2" not in f"{one} {one!r} {one.args}"
            assert str(one).endswith(": refused")

    try:
        raise ConnectionError(f"{address} does not answer")
    except ConnectionError:
        record = logging.LogRecord("a", 30, "", 0, "asked %s", (address,), sys.exc_info())
    assert "hunter2" not in MaskingFormatter().format(record)


@pytest.mark.parametrize("address", OPEN)
def test_addresses_without_secrets_stay_as_they_are(address: str) -> None:
    assert not has_secret(address)
    assert not has_secret("redis://me@host/0"), "its password is in a file"
    assert mask_secrets(f"got {address!r}") == f"got {address!r}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'redis_password': 'hunter 2', 'port': 1}", "{'redis_password': ..., 'port': 1}"),
        ("  redis_password: hunter2\n  port: 1", "  redis_password: ...\n  port: 1"),
        (
            "serve.redis_password_file: /run/pw: absent",
            "serve.redis_password_file: /run/pw: absent",
        ),
        ("features.user_tokens: place", "features.user_tokens: place"),
    ],
)
def test_words_that_are_given_a_secret(text: str, shown: str) -> None:
    assert mask_secrets(text) == shown


@pytest.mark.parametrize(
    "lines",
    [
        "serve: {redis_password: hunter2}",
        "serve: {redis_url: 'redis://:hunter2@host'}",
        "serve:\n  redis_url: 'redis://:hunter2@host\n",
        "- tracking: {uri: 'http://me:hunter2@mlflow'}",
    ],
)
def test_a_preset_with_a_secret_is_refused_unshown(tmp_path: Path, lines: str) -> None:
    preset = tmp_path / "run.yaml"
    preset.write_text(lines)
    with pytest.raises(ConfigError) as refused:
        config.load(preset)
    assert "hunter2" not in str(refused.value)


def test_what_a_job_prints_of_a_mistake_of_ours_is_masked(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import logging\n"
        "from jobs import cli\n"
        "def main(job):\n"
        "    logging.warning('asking http://me:hunter2@mlflow')\n"
        "    raise RuntimeError('http://me:hunter2@mlflow is gone')\n"
        "cli.run('', main)\n"
    )
    command = [sys.executable, str(script), "--config", "configs/smoke.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hunter2" not in done.stderr
    assert "RuntimeError: http://...@mlflow is gone" in done.stderr
    assert "WARNING root: asking http://...@mlflow" in done.stderr
