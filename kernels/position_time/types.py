"""Types of position and time embeddings that callers and all forms share."""

from typing import Literal

# How a gap falls into a bucket: "event" by its logarithm, "query" by its square root.
Anchor = Literal["event", "query"]
