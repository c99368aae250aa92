"""The users of a published store as examples are made of them, one bucket in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.batches.events import UserEvents
from pipeline.batches.examples import user_events
from pipeline.config import FeatureConfig, SourceConfig
from pipeline.sequences import store


@dataclass(frozen=True, slots=True)
class StoredUsers:
    """Sequences, and what is read of them: the request columns and outcomes of `features`.

    Args:
        folder: of the published sequences.
        source: the actions, and whether the end of rows without times is real.
    """

    folder: Path
    source: SourceConfig
    features: FeatureConfig

    def read_manifest(self) -> store.Manifest:
        """The published version.

        Raises:
            UserError: nothing is published.
        """
        return store.read_manifest(self.folder)

    def read_bucket(
        self, manifest: store.Manifest, number: int, most_users: int | None = None
    ) -> UserEvents:
        """The first `most_users` (None: all) of one bucket, in its order."""
        table = store.read_bucket(self.folder, manifest, number)
        return user_events(table.slice(0, most_users), self.source, self.features)

    def by_bucket(self, most_users: int | None = None) -> Iterator[UserEvents]:
        """The first `most_users` (None: all), bucket by bucket in the order of the store."""
        manifest = self.read_manifest()
        left = most_users
        for number in range(len(manifest.buckets)):
            users = self.read_bucket(manifest, number, left)
            yield users

            if left is not None:
                left -= len(users.user_id)
                if left == 0:
                    return
