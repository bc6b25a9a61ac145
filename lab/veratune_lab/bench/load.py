"""Load: what a server is asked in a benchmark."""

import dataclasses

from veratune.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenLoad:
    """Requests that come at random times, whoever is ready or not. Raises ConfigError.

    Args:
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        rate: requests of the open load in a second.
        requests: of the open load in all.
        zipf: exponent of the tenants' shares: the k-th asks 1 / k^zipf as often as the first.
    """

    prompt: int = 32
    answer: int = 64
    rate: float = 1.0
    requests: int = 60
    zipf: float = 1.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0 or (field.name in ("population", "resident") and value < 2):
                raise ConfigError(f"{field.name} is {value}; more is wanted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(OpenLoad):
    """The open load, and closed ones, which ask so much at once until all is answered. Raises ConfigError.

    Args:
        rows: conversations at once, in a mixed batch each of a tenant of its own.
        rounds: turns of each closed load.
        population: tenants of the open load.
        resident: adapters that are put into memory.
    """

    rows: int = 32
    rounds: int = 3
    population: int = 1000
    resident: int = 10_000
