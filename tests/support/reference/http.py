"""docs/reference/http.md: every endpoint and every object of the OpenAPI document."""

import json
import re
from typing import Any, cast

from serve_app.web.api import make_api
from serve_app.web.replica import Replica
from serve_app.web.settings import ApiLimits
from tests.support.reference.markdown import anchor, plain, table

Schema = dict[str, Any]

INTRODUCTION = """\
# HTTP

The server answers on `serve.host` and `serve.port`; `/docs` is this page to try out, and
`/openapi.json` the document that it is written from. Times are in milliseconds since 1970, UTC.
Where `serve.api_keys_file` is set, every endpoint but the health routes asks for a header
`Authorization: Bearer KEY`. A field that an object does not have, or `"5"` for 5, is refused.
"""


def api_document() -> dict[str, Any]:
    """The OpenAPI document. No replica is asked for anything."""
    return make_api(cast(Replica, None), ApiLimits(max_body_bytes=1)).openapi()


def endpoints(document: dict[str, Any]) -> list[tuple[str, str, Schema]]:
    """(method, path, operation) of each endpoint, in the order of the document."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            found.append((method.upper(), path, operation))
    return found


def write_page() -> str:
    document = api_document()
    schemas = document["components"]["schemas"]
    rows, parts = [], []
    for method, path, operation in endpoints(document):
        about = operation.get("description", operation.get("summary", ""))
        name = f"{method} {path}"
        rows.append([f"[`{name}`](#{_endpoint_id(path)})", plain(about.split("\n\n")[0])])
        parts.append(_write_endpoint(name, path, about, operation, schemas))

    parts.append("## Objects\n")
    for name in sorted(schemas):
        if not any(anchor(name) in part for part in parts):  # else it is the body of an endpoint
            parts.append(_write_object(name, schemas[name]))
    return "\n".join([INTRODUCTION, table(["Endpoint", "What it does"], rows), *parts])


def _endpoint_id(path: str) -> str:
    return re.sub("[^a-z0-9]+", "-", path).strip("-")


def _write_endpoint(
    name: str, path: str, about: str, operation: Schema, schemas: dict[str, Schema]
) -> str:
    lines = [anchor(_endpoint_id(path)), "", f"## `{name}`", "", plain(about), ""]
    if "requestBody" in operation:
        lines += _write_body("Request", operation["requestBody"]["content"], schemas)
    responses = operation["responses"]
    lines += _write_body("Answer", responses["200"].get("content", {}), schemas)

    errors = []
    for status in sorted(responses):
        if status != "200":
            errors.append([status, plain(responses[status]["description"])])
    if errors:
        lines += [
            f"Errors, each a {_object_link('Problem')}:",
            "",
            table(["Status", "When"], errors),
        ]
    return "\n".join(lines)


def _write_body(title: str, content: Schema, schemas: dict[str, Schema]) -> list[str]:
    """The fields of a body and, where its object brings one, an example."""
    lines: list[str] = []
    for media, body in content.items():
        schema = body.get("schema", {})
        if not schema:  # FastAPI lists JSON even where an endpoint has another form
            continue
        if "$ref" not in schema:
            lines += [f"**{title}**, `{media}`: {type_words(schema)}", ""]
            continue

        name = _ref_name(schema)
        found = schemas[name]
        about = plain(" ".join(found.get("description", "").split()))
        lines += [f"{anchor(name)}**{title}**, `{media}`: {name}. {about}", "", fields_table(found)]
        for example in found.get("examples", [])[:1]:
            lines += ["```json", json.dumps(example), "```", ""]
    return lines


def _write_object(name: str, schema: Schema) -> str:
    about = plain(" ".join(schema.get("description", "").split()))
    return f"{anchor(name)}\n\n### {name}\n\n{about}\n\n{fields_table(schema)}"


def fields_table(schema: Schema) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        meaning = plain(field.get("description", ""))
        required = name in schema.get("required", [])
        default = "required" if required else ""
        if field.get("default") is not None:
            default = f"`{json.dumps(field['default'])}`"
        rows.append([f"`{name}`", type_words(field), default, meaning])
    return table(["Field", "Type", "Default", "Meaning"], rows)


def type_words(schema: Schema) -> str:
    """A JSON schema in words: `list of HistoryRow, or null`."""
    if "$ref" in schema:
        return _object_link(_ref_name(schema))
    if "anyOf" in schema:
        return ", or ".join(type_words(part) for part in schema["anyOf"])
    for key in ("const", "enum"):
        if key in schema:
            choices = schema[key] if key == "enum" else [schema[key]]
            return ", ".join(f"`{choice}`" for choice in choices)

    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_plural(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping of names to {_plural(inner)}" if isinstance(inner, dict) else "object"
    if kind == "string":
        return "bytes" if schema.get("format") == "binary" else "text"
    words = {"integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
    return words.get(kind, kind) + _bounds(schema)


def _plural(schema: Schema) -> str:
    words = type_words(schema)
    for one in ("integer", "number", "text"):
        if words == one or words.startswith(f"{one},"):
            return words.replace(one, f"{one}s", 1)
    return words.replace("list of", "lists of", 1) if words.startswith("list of") else words


def _bounds(schema: Schema) -> str:
    """Bounds that say something: those of 32 and 64 bits are left to the type."""
    low = schema.get("minimum")
    return f", {low:g} or more" if low is not None and low > -(2**31) else ""


def _ref_name(schema: Schema) -> str:
    return schema["$ref"].rsplit("/", 1)[-1]


def _object_link(name: str) -> str:
    return f"[{name}](#{name})"
