"""AdapterRef: a stored adapter that a model's name stands for."""

import dataclasses

from veratune.serving.store.base import Version

Key = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class AdapterRef:
    """A stored adapter that a request names.

    Attributes:
        tenant: Whose it is.
        name: Its name.
        version: Its newest version.
    """

    tenant: str
    name: str
    version: Version

    @property
    def key(self) -> Key:
        """The key of this version in the adapter pools."""
        return (self.tenant, self.name, self.version.number)

    @property
    def created(self) -> float:
        """When this version was stored, in seconds since 1970."""
        return self.version.created
