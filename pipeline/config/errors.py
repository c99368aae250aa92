"""The mistakes of a user, an outage of what a job needs, and the one form that a message about a
setting has.
"""

import reprlib
from typing import Any

from pipeline.config.secrets import INSTEAD, MASK, has_secret, mask_secrets

LONGEST_SHOWN = 1000  # characters of a value in a message
MOST_SHOWN, DEEPEST_SHOWN = 30, 4  # parts of a list or a mapping in it, and lists in lists


class UserError(ValueError):
    """A mistake of the user's: jobs print its one message and exit with code 2, the server answers
    4xx. Secrets in the message are masked.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(mask_secrets(str(message)))


class ConfigError(UserError):
    """The configuration does not say something we can run."""


class Outage(RuntimeError):
    """Something that a job needs does not answer, or started too slowly: jobs print its one message
    and exit with code 1, since the same command is worth another try. Secrets in the message are
    masked.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(mask_secrets(str(message)))


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    """Refuse `value` of the setting `key` unless `condition` holds.

    Raises:
        ConfigError: "`key` must be `rule`, got `value`".
    """
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {show_value(value)}")


def show_value(value: Any) -> str:
    """A value as it stands in YAML, for messages: null, true, ['a', 'b'], 'text', 0.5. What is long
    is shown in part.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = _PartOfValue().repr(list(value) if isinstance(value, tuple) else value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


class _PartOfValue(reprlib.Repr):
    """`repr` with an end: aliases of YAML can name lists in lists of which it would find billions,
    and Python refuses to write an integer of thousands of digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = LONGEST_SHOWN
        self.maxlist = self.maxdict = MOST_SHOWN
        self.maxlevel = DEEPEST_SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 1000 else repr(x)


def refuse_secrets(key: str, value: str | None) -> None:
    """Go on only if the value of a setting, where it is an address, holds no secret.

    Raises:
        ConfigError: it does, and is not shown; or it is no address in spite of its looks.
    """
    if value is None or "://" not in value:
        return
    try:
        is_open = not has_secret(value)
    except ValueError:
        raise ConfigError(f"{key} must be an address, got {value!r}") from None
    source = INSTEAD.get(key, "the environment or the machine")
    rule = f"without credentials (they come from {source}), since the configuration is logged"
    require(is_open, key, MASK, rule)
