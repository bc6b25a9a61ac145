"""TenantLimiter: requests and tokens a tenant may use in a minute, and bad keys an address may
try.
"""

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from veratune.serving.http.errors import ApiError

BAD_KEYS_PER_MINUTE = 30


class TenantLimiter:
    """Sliding-window limits in this process."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Set the limits; None for no limit.

        Args:
            requests_per_minute: API calls of one tenant.
            tokens_per_minute: Prompt tokens and max_tokens of one tenant's requests.
        """
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = _per_minute(requests_per_minute)
        self._tokens = _per_minute(tokens_per_minute)
        self._bad_keys = RateLimitItemPerMinute(BAD_KEYS_PER_MINUTE)

    def count_request(self, tenant: str) -> None:
        """Count one API call. Raises ApiError 429 over the limit."""
        if self._requests is not None and not self._window.hit(self._requests, "call", tenant):
            raise self._error(self._requests, "call", tenant, "requests")

    def count_tokens(self, tenant: str, tokens: int) -> None:
        """Count a request's tokens. Raises ApiError 429 over the limit, 400 if it never fits."""
        if self._tokens is None:
            return
        if tokens > self._tokens.amount:
            raise ApiError(
                400,
                f"the request takes up to {tokens} tokens; this tenant has {self._tokens.amount} "
                "a minute: shorten the prompt or lower max_tokens",
            )
        if not self._window.hit(self._tokens, "tokens", tenant, cost=tokens):
            raise self._error(self._tokens, "tokens", tenant, "tokens")

    def count_bad_key(self, address: str) -> None:
        """Count a call with an unknown key. Raises ApiError 429 over the limit."""
        if not self._window.hit(self._bad_keys, "key", address):
            raise self._error(self._bad_keys, "key", address, "calls with unknown keys")

    def _error(self, item: RateLimitItemPerMinute, *words: str) -> ApiError:
        *identity, what = words
        reset = self._window.get_window_stats(item, *identity).reset_time
        wait = max(1.0, reset - time.time())
        return ApiError(
            429,
            f"over {item.amount} {what} a minute; try again in {wait:.0f} s",
            "rate_limit_error",
            "rate_limit_exceeded",
            retry_after=wait,
        )


def _per_minute(amount: int | None) -> RateLimitItemPerMinute | None:
    return None if amount is None else RateLimitItemPerMinute(amount)
