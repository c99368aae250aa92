"""What the ranker's cache of encoded histories saves, beside the work that the mask says it saves.

    python -m benchmarks.ranker              # CPU: one user's requests, the ranker's own time, without HTTP
    python -m benchmarks.ranker --device     # one GPU: history 16,384, 1,024 candidates, 12 layers of 512

Untrained models over generated histories: time depends on shapes alone. Each case first holds the scores of the cached
history against those of the plain forward pass, in float32. Results go into the marked part of benchmarks/RESULTS.md
with --write.
"""

ACTIONS = ["click", "like", "share", "follow"]
