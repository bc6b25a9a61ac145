"""Load: what a server is asked in a benchmark."""

import dataclasses

from veratune.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Closed loads ask so much at once; the open load asks at random times. Raises ConfigError.

    Args:
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        rows: conversations at once, in a mixed batch each of a tenant of its own.
        rounds: turns of each closed load.
        rate: requests of the open load in a second.
        requests: of the open load in all.
        population: tenants of the open load.
        zipf: exponent of their shares: the k-th asks 1 / k^zipf as often as the first.
        resident: adapters that are put into memory.
    """

    prompt: int = 32
    answer: int = 64
    rows: int = 32
    rounds: int = 3
    rate: float = 1.0
    requests: int = 60
    population: int = 1000
    zipf: float = 1.1
    resident: int = 10_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0 or (field.name in ("population", "resident") and value < 2):
                raise ConfigError(f"{field.name} is {value}; more is wanted")
