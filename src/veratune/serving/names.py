"""What models' names stand for: AdapterRef, a stored adapter; and the name "auto"."""

import dataclasses

from veratune.errors import InvalidNameError
from veratune.serving.store.base import Version

Key = tuple[str, str, int]
AUTO = "auto"  # the model that is chosen by input; also AUTO/TENANT


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


def is_auto(model: str) -> bool:
    """Whether a model's name is "auto" or "auto/TENANT"."""
    return model == AUTO or model.startswith(f"{AUTO}/")


def check_not_auto(what: str, name: str) -> None:
    """Raise InvalidNameError for the name "auto".

    Args:
        what: What is named, for the error.
        name: The name.
    """
    if is_auto(name):
        raise InvalidNameError(
            f"{what} {name!r} is reserved for the model that is chosen by input; take another name"
        )
