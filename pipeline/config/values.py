"""From YAML values to frozen dataclasses, and the errors on the way."""

import dataclasses
import types
import typing
import urllib.parse
from datetime import datetime
from typing import Any, Literal

S3 = "s3://"
S3_OPTIONS = ("endpoint_override", "region")  # of a path, behind its "?"


class UserError(ValueError):
    """A mistake of the user's: jobs print its one message and exit with code 2, the server answers
    4xx.
    """


class ConfigError(UserError):
    """The configuration does not say something we can run."""


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def parse_time(key: str, value: str) -> int:
    """An ISO 8601 time with its offset, in milliseconds since 1970 UTC."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{key} must be an ISO 8601 time such as 2022-05-01T00:00:00+08:00, got {value!r}"
        ) from None
    if moment.tzinfo is None:
        raise ConfigError(
            f"{key} must carry its offset from UTC (2022-05-01T00:00:00+08:00), got {value!r}"
        )
    return int(moment.timestamp() * 1000)


def split_s3(key: str, uri: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """s3://bucket/some/key?region=... as ("bucket/some/key", (("region", "..."), ...)).

    Raises:
        ConfigError: no bucket, an unknown option, or credentials, which would be logged with the
        configuration.
    """
    place, _, query = uri.removeprefix(S3).partition("?")
    bucket = place.partition("/")[0]
    require(
        "@" not in bucket,
        key,
        "s3://...",
        "without credentials: they come from the environment or the machine",
    )
    require(bool(bucket), key, uri, "s3://bucket/prefix")
    options = urllib.parse.parse_qsl(query, keep_blank_values=True)
    for name, _ in options:
        require(
            name in S3_OPTIONS,
            key,
            uri,
            f"without the option {name!r}; there are {', '.join(S3_OPTIONS)}",
        )
    return place.rstrip("/"), tuple(options)


def build(cls: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, got {raw!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(
                f"unknown configuration key {where!r} (value {raw[key]!r}); "
                f"{path or 'the top level'} has {names}"
            )
    return cls(
        **{
            key: _convert(hints[key], value, f"{path}.{key}" if path else key)
            for key, value in raw.items()
        }
    )


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` from YAML as the type `hint` of a field, or a ConfigError naming `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        require(value in args, path, value, f"one of {list(args)}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), path, value, "a mapping")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 2e-3 as text
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{path} must be a number, got {value!r}") from None
    if hint is str and isinstance(value, datetime):  # YAML reads an unquoted ISO time as one
        return value.isoformat()
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")
    return value
