"""Secrets in addresses: no setting may hold one, and no message shows one.

The configuration is logged with every run, and lies beside weights and sequences. So a value with a
password, a token or a signature in it is refused when it is read, whichever setting it is of. What
others give us (the environment, a message of a library) is masked where messages are made.

    redis://:hunter2@host/0                  redis://...@host/0
    s3://logs/day?X-Amz-Signature=4f5a26     s3://logs/day?X-Amz-Signature=...
    {'redis_password': 'hunter2'}            {'redis_password': ...}
"""

import logging
import re
from urllib.parse import parse_qsl, unquote, urlsplit

MASK = "..."

# names of options of an address
NAMES = (
    "pass(word|wd|phrase)?|pwd|secret|token|credential|signature|sig|auth(orization)?"
    "|(api|access|account|shared|secret|private).?key"
)
NAMED = re.compile(rf"(^|[^a-z])({NAMES})([^a-z]|id$|$)", re.IGNORECASE)

# in a text: who asks, before the host of an address; its options; and words that are given a value
USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/?#\s'\"]*@", re.IGNORECASE)
OPTION = re.compile(r"([?&;])([^=&;?\s'\"]+)=([^&;\s'\"]+)")
VALUE = re.compile(
    r"\b(\w*(?:password|passwd|secret|api_key|access_key|access_token|auth_token)['\"]?\s*[:=]\s*)"
    r"('[^']*'|\"[^\"]*\"|[^\s,'\"}]+)",
    re.IGNORECASE,
)

# where the secret of a setting comes from
INSTEAD = {
    "serve.redis_url": "serve.redis_password_file",
    "tracking.uri": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "serve.otlp_endpoint": "OTEL_EXPORTER_OTLP_HEADERS",
}


def mask_secrets(text: str) -> str:
    """The text without the secrets that stand in its addresses, or beside a word such as password.

    >>> mask_secrets("no Redis at redis://:hunter2@host/0?password=hunter2")
    'no Redis at redis://...@host/0?password=...'
    """
    text = USER.sub(rf"\1{MASK}@", text)
    text = OPTION.sub(_masked_option, text)
    return VALUE.sub(rf"\1{MASK}", text)


def _masked_option(found: re.Match[str]) -> str:
    before, name, value = found.groups()
    place = unquote(value)  # that of endpoint_override=http%3A%2F%2F…
    is_secret = NAMED.search(name) is not None or USER.search(place) is not None
    return f"{before}{name}={MASK if is_secret else value}"


def is_secret_name(name: str) -> bool:
    """True of names such as redis_password, which are given a secret; a file of one is none."""
    return NAMED.search(name.replace("_", "-")) is not None and not name.endswith("_file")


def has_secret(address: str) -> bool:
    """True of an address, scheme://…, with a user's password, a user that may be a token, or an
    option that is a secret. A user of Redis is none by himself.

    Raises:
        ValueError: the address has no form.
    """
    url = urlsplit(address)
    if "@" in url.netloc:
        name_alone = url.scheme in ("redis", "rediss", "unix") and url.password is None
        if not name_alone:
            return True

    for name, value in parse_qsl(url.query, keep_blank_values=True):
        # a place within a place, as s3://logs?endpoint_override=http://…
        if NAMED.search(name) or ("://" in value and has_secret(value)):
            return True
    return False


class MaskingFormatter(logging.Formatter):
    """Lines of a log without secrets, those of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))
