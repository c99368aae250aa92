"""Ids in requests and answers: integers or text, as the published sequences have them.

A text id becomes its code when a body is read (pipeline/logs/ids.py) and takes the text along, so
that all behind the schemas works on integers and an answer, the event log and another process have
the text again:

    "sku-7" → TextId(5053142843331245341, "sku-7") → look-ups, arrays, scores → "sku-7"

Which kind a field must be is known to who has the sequences: `rows.refuse_other_kind`.

A `request_id` is text in every answer and in every event, whatever the logs have: nobody looks one
up, it only says what belongs together. Its code is its number where it is one, so that the events
of logs with integer requests meet their rows: "77" → 77.
"""

import secrets
from functools import lru_cache
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from pipeline.logs.ids import LONGEST_ID, OwnId, id_code

FORM = f"an integer from 0 to 2**63 - 1, or text of 1 to {LONGEST_ID} characters"
REMEMBERED = 2**16  # texts whose codes need not be computed again
NO_REQUEST = 2**63 - 1  # the code of none


class TextId(int):
    """The code of a text id, and its text."""

    text: str

    def __new__(cls, code: int, text: str) -> "TextId":
        made = super().__new__(cls, code)
        made.text = text
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return TextId, (int(self), self.text)


@lru_cache(REMEMBERED)
def text_id(text: str) -> TextId:
    """The id that a request names by this text."""
    return TextId(id_code(text), text)


def read_id(code: int, text: str | None) -> int:
    """An id from its code, and its text where it has one."""
    return code if text is None else TextId(code, text)


def own_id(value: int) -> OwnId:
    """The id as the client has it."""
    return value.text if isinstance(value, TextId) else value


def id_text(value: int | None) -> str | None:
    """The text of an id; None of an integer."""
    return value.text if isinstance(value, TextId) else None


@lru_cache(REMEMBERED)
def request_id_of(text: str) -> TextId:
    """The id of a request from its text: 77 from "77", else a hash."""
    if text.isdecimal() and text == str(int(text)) and int(text) < NO_REQUEST:
        return TextId(int(text), text)
    return TextId(id_code(text), text)


def new_request_id() -> str:
    """The name of an answer, 64 bits of chance: what is posted of it carries it."""
    return secrets.token_hex(8)


def read_request_id(code: int | None, text: str | None) -> int | None:
    """A request's id from what `request_text` has left of it."""
    if code is None:
        return None
    return TextId(code, str(code) if text is None else text)


def request_text(value: int | None) -> str | None:
    """The text of a request's id; None where its code says it."""
    text = id_text(value)
    return None if value is None or text == str(int(value)) else text


class IdForm:
    """For `Annotated`: what pydantic takes for an id, and how it writes one."""

    def __get_pydantic_core_schema__(
        self, _: Any, __: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        text = _text_form()
        return core_schema.union_schema(
            [
                core_schema.int_schema(strict=True, ge=0, lt=2**63),
                core_schema.no_info_after_validator_function(text_id, text),
            ],
            custom_error_type="id",
            custom_error_message=f"Input should be {FORM}",
            serialization=core_schema.plain_serializer_function_ser_schema(own_id),
        )


class RequestIdForm:
    """`IdForm` for the id of a request, which is always text."""

    def __get_pydantic_core_schema__(
        self, _: Any, __: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            request_id_of,
            _text_form(),
            serialization=core_schema.plain_serializer_function_ser_schema(own_id),
        )


def _text_form() -> core_schema.CoreSchema:
    # the bounds make pydantic read the text as UTF-8, without lone surrogates
    return core_schema.str_schema(strict=True, min_length=1, max_length=LONGEST_ID)


Id = Annotated[int, IdForm()]
RequestId = Annotated[int, RequestIdForm()]
