"""The mistakes of a user, an outage of what a job needs, and the one form that a message about a
setting has.
"""

from typing import Any


class UserError(ValueError):
    """A mistake of the user's: jobs print its one message and exit with code 2, the server answers
    4xx.
    """


class ConfigError(UserError):
    """The configuration does not say something we can run."""


class Outage(RuntimeError):
    """Something that a job needs does not answer, or started too slowly: jobs print its one message
    and exit with code 1, since the same command is worth another try.
    """


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    """Refuse `value` of the setting `key` unless `condition` holds.

    Raises:
        ConfigError: "`key` must be `rule`, got `value`".
    """
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")
