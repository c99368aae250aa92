"""From YAML to values: the file, its `--set` overrides, and each value as the type of its field."""

import dataclasses
import math
import re
import types
import typing
import urllib.parse
from collections.abc import Sequence
from datetime import date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config.errors import ConfigError, refuse_secrets, require, show_value
from pipeline.config.secrets import MASK, is_secret_name
from pipeline.config.setting import has_default

# no YAML, but text that a shell has taken the quotes off: ',' and '::' and '%Y-%m-%d'
UNQUOTED = re.compile(r"[^\w\s\[\]{}'\"~.+-]{1,3}|[%,@`].*")
S3 = "s3://"
GCS = "gs://"
SCALARS = {int: "a whole number", str: "text", bool: "true or false"}  # to people
S3_OPTIONS = ("endpoint_override", "region")  # of a path, behind its "?"


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in the file at `path`, after the `a.b=c` overrides, whose values are YAML too.

    Raises:
        ConfigError: no such file, not YAML, no mapping, or an override of another form.
    """
    return apply_overrides(read_mapping("--config", Path(path)), overrides)


def read_mapping(option: str, path: Path) -> dict[str, Any]:
    """The mapping in the YAML at `path`, which `option` of the command line names.

    Raises:
        ConfigError: no such file, not YAML, a key that stands there twice, or no mapping.
    """
    try:
        raw = _load_yaml(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}{_advise_file(path)}") from None
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} is not YAML: {_describe_fault(error)}") from None

    if raw is None:
        raise ConfigError(f"{option} {path} is empty")
    if not isinstance(raw, dict):
        raise ConfigError(f"{option} {path} must hold a mapping, got {type(raw).__name__}")
    return raw


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key stands once in a mapping: of two the last one would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    problem = f"the key {key.value!r} stands there a second time"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                known.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar_or_text(self, node: yaml.ScalarNode) -> Any:
        """The value that the text looks like; the text where there is no such value, as of the 31st
        of February: its setting says what it must be.
        """
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except ValueError:
            return self.construct_scalar(node)


for _kind in ("int", "float", "timestamp"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_kind}", _UniqueKeys.construct_scalar_or_text)


def _load_yaml(text: str) -> Any:
    """The value that the text says.

    Raises:
        YAMLError: no YAML, or lists in lists so deep that the parser gives up.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _describe_fault(error: Exception) -> str:
    """What YAML does not like, on one line and with the number of its line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())

    words = f"line {error.problem_mark.line + 1}: {error.problem}"
    if error.context is not None and error.context_mark is not None:
        words += f" ({error.context} that begins in line {error.context_mark.line + 1})"
    tabbed = error.problem is not None and r"'\t'" in error.problem
    return words + (": YAML is indented with spaces, not with tabs" if tabbed else "")


def _advise_file(path: Path) -> str:
    """The preset beside `path` whose name is like it."""
    beside = [file.name for file in path.parent.glob("*.yaml")]
    meant = get_close_matches(path.name, beside, n=1)
    return f"; is it {path.parent / meant[0]}?" if meant else ""


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with the `a.b=c` overrides, set in place.

    Raises:
        ConfigError: an override of another form.
    """
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of `raw` in place; sections on its way are made where they are missing."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, got {override!r}")
    try:
        value = text if UNQUOTED.fullmatch(text) else _load_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {show_value(text)} is not a YAML value") from None

    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {parent} is not a section")
    node[last] = value


def parse_time(key: str, value: str) -> int:
    """Milliseconds since 1970 UTC of an ISO 8601 time with its offset.

    Raises:
        ConfigError: no time, or one without its offset; it names `key`.
    """
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
    refuse_secrets(key, uri)
    place, _, query = uri.removeprefix(S3).partition("?")
    bucket = place.partition("/")[0]
    require(bool(bucket), key, uri, "s3://bucket/prefix")

    options = urllib.parse.parse_qsl(query, keep_blank_values=True)
    for name, _ in options:
        rule = f"without the option {name!r}; there are {', '.join(S3_OPTIONS)}"
        require(name in S3_OPTIONS, key, "s3://...", rule)  # its value may be a secret
    return place.rstrip("/"), tuple(options)


def build_section(cls: type, raw: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from the YAML mapping `raw`, which stands at `path`.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or one that the section
        refuses.
    """
    # a section may have short forms
    if hasattr(cls, "complete_yaml"):
        raw = cls.complete_yaml(raw)
    if raw is None and path:
        raise ConfigError(f"{path} is empty: give it a setting, or leave it out")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, got {show_value(raw)}")

    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in names:
            where = f"{path}.{key}" if path else str(key)
            shown = MASK if is_secret_name(str(key)) else show_value(raw[key])
            raise ConfigError(
                f"unknown configuration key {where!r} (value {shown}); "
                f"{_advise(str(key), hints, path)}"
            )

    values: dict[str, Any] = {}
    for key, value in raw.items():
        values[key] = _convert(hints[key], value, f"{path}.{key}" if path else key)

    for field in fields:
        if not has_default(field) and field.name not in raw:
            raise ConfigError(f"{path}.{field.name} must be given beside {list(raw)}")

    try:
        return cls(**values)
    except ConfigError as error:
        # a section of a mapping does not know its own name: `features.*.dim must be 1 or more`
        raise ConfigError(re.sub(r"^[\w.]+\.\*", lambda _: path, str(error))) from None


def _advise(key: str, hints: dict[str, Any], path: str) -> str:
    """What may have been meant by an unknown key of the section at `path`: a name like it, or a
    setting of that name one section below; else all that there is.
    """
    meant = []
    for section, hint in hints.items():
        if dataclasses.is_dataclass(hint) and key in hint.__dataclass_fields__:
            meant.append(f"{section}.{key}")
    meant = meant or get_close_matches(key, hints, n=2)

    if meant:
        wholes = [f"{path}.{name}" if path else name for name in meant]
        return f"is it {' or '.join(wholes)}?"
    return f"{path or 'the top level'} has {list(hints)}"


def _convert(hint: Any, value: Any, path: str, null: str = "") -> Any:
    """`value` from YAML as the type `hint` of a field, or a ConfigError naming `path`; `null` is
    the end of its rule where null is allowed too.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build_section(typing.cast(type, hint), value, path)

    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        null = ", or null" if type(None) in args else ""
        return _convert(_choose_hint(args, value), value, path, null)

    if origin is Literal:
        # YAML 1.1 reads an unquoted on and off as true and false
        switch = {True: "on", False: "off"}
        if isinstance(value, bool) and switch[value] in args:
            value = switch[value]
        require(value in args, path, value, f"one of {list(args)}{null}")
        return value

    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, f"a list such as [a, b]{null}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))

    if origin is dict:
        require(isinstance(value, dict), path, value, f"a mapping{null}")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}

    return _convert_scalar(hint, value, path, null)


def _choose_hint(hints: Sequence[Any], value: Any) -> Any:
    """The one of several types that the YAML value has: a section's where it is a mapping."""
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others:
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            return hint
    return others[0]


def _convert_scalar(hint: type, value: Any, path: str, null: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 2e-3 as text
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{path} must be a number{null}, got {show_value(value)}") from None
        # nothing is above a limit that is not a number
        require(math.isfinite(number), path, number, f"a finite number{null}")
        return number

    if hint is str and isinstance(value, date):  # YAML reads an unquoted ISO time as one
        return value.isoformat()

    # bool is a subclass of int
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = SCALARS.get(hint, hint.__name__)
        raise ConfigError(f"{path} must be {kind}{null}, got {show_value(value)}")
    if isinstance(value, str):
        refuse_secrets(path, value)
        # no path and no name has them, and no program would say which setting it was
        is_plain = "\0" not in value and not any(map(_is_surrogate, value))
        require(is_plain, path, value, "text without NUL and lone surrogates")
    return value


def _is_surrogate(sign: str) -> bool:
    return "\ud800" <= sign <= "\udfff"
