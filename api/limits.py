"""How often a key may ask: its requests in a moving minute."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask import g

from shared.errors import RateLimited
from shared.settings import Settings
from shared.telemetry import log

if TYPE_CHECKING:
    import redis
    from limits import RateLimitItemPerMinute
    from limits.strategies import MovingWindowRateLimiter

# A Redis that is well answers in a millisecond. The reliability notes ask for 1 s; but a frozen Redis would then hold
# every request under way for a second, and submitting promises 250 ms with Redis frozen (G4).
REDIS_TIMEOUT_SECONDS = 0.1
# After a failure the limits are counted in this process, and Redis is left alone for as long as this.
REDIS_PAUSE_SECONDS = 30.0
WINDOW_SECONDS = 60


@dataclass(frozen=True)
class Allowance:
    """What is left to a key of its requests."""

    limit: int
    remaining: int
    resets_in_seconds: int

    def headers(self) -> dict[str, str]:
        """`RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers) and the older `X-RateLimit-*`."""
        return {
            "RateLimit-Policy": f'"key";q={self.limit};w={WINDOW_SECONDS}',
            "RateLimit": f'"key";r={self.remaining};t={self.resets_in_seconds}',
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(int(time.time()) + self.resets_in_seconds),
        }


class RateLimits:
    """Counts each key's requests in a moving window, in Redis for all API processes, else in this one.

    The engine is `limits`, which Flask-Limiter is made of. Flask-Limiter itself is left out: it asks a dead Redis
    again from within requests each few seconds, and puts Retry-After on every answer. Here a Redis that fails is left
    alone for REDIS_PAUSE_SECONDS, so that it costs a request in a great many a tenth of a second, and none an error.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis_rests_until = 0.0
        self._lock = threading.Lock()

    # What follows is made, and its libraries loaded, by `warm_up` or the first request: not by a process that starts.

    @functools.cached_property
    def _item(self) -> RateLimitItemPerMinute:
        from limits import RateLimitItemPerMinute

        return RateLimitItemPerMinute(self._settings.rate_limit_per_minute)

    @functools.cached_property
    def _connections(self) -> redis.ConnectionPool:
        import redis

        return redis.ConnectionPool.from_url(
            self._settings.redis_url,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        )

    @functools.cached_property
    def _shared(self) -> MovingWindowRateLimiter:
        from limits.storage import RedisStorage
        from limits.strategies import MovingWindowRateLimiter

        counts = RedisStorage(self._settings.redis_url, self._connections, key_prefix="enlarger:rate")
        return MovingWindowRateLimiter(counts)

    @functools.cached_property
    def _own(self) -> MovingWindowRateLimiter:
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        return MovingWindowRateLimiter(MemoryStorage())

    def warm_up(self) -> None:
        """Loads what the first request would; connects to nothing."""
        _ = self._item, self._shared, self._own

    def count(self, key_id: str) -> Allowance:
        """Counts one request of this key. Raises RateLimited where the window is full."""
        allowance, allowed = self._ask_redis(key_id) or self._ask(self._own, key_id)
        g.allowance = allowance
        if not allowed:
            raise RateLimited(
                f"This key may make {allowance.limit:,} requests a minute.",
                limit_per_minute=allowance.limit,
                retry_after_seconds=max(1, allowance.resets_in_seconds),
            )
        return allowance

    def close(self) -> None:
        if "_connections" in self.__dict__:
            self._connections.disconnect()

    def _ask(self, limiter: MovingWindowRateLimiter, key_id: str) -> tuple[Allowance, bool]:
        allowed = limiter.hit(self._item, key_id)
        stats = limiter.get_window_stats(self._item, key_id)
        resets_in_seconds = max(0, min(WINDOW_SECONDS, round(stats.reset_time - time.time())))
        return Allowance(self._item.amount, stats.remaining, resets_in_seconds), allowed

    def _ask_redis(self, key_id: str) -> tuple[Allowance, bool] | None:
        """None where Redis rests or fails now."""
        import redis

        if not self._may_ask_redis():
            return None
        try:
            answer = self._ask(self._shared, key_id)
        except redis.RedisError as error:
            self._rest(error)
            return None
        self._redis_rests_until = 0.0
        return answer

    def _may_ask_redis(self) -> bool:
        """Of many requests, one at a time finds out whether Redis is back: it moves the rest on before it asks."""
        now = time.monotonic()
        with self._lock:
            if self._redis_rests_until == 0.0:
                return True
            if now < self._redis_rests_until:
                return False
            self._redis_rests_until = now + REDIS_PAUSE_SECONDS
            return True

    def _rest(self, error: redis.RedisError) -> None:
        with self._lock:
            first = self._redis_rests_until == 0.0
            self._redis_rests_until = time.monotonic() + REDIS_PAUSE_SECONDS
        if first:
            log.warning("limits.counted_here", reason=type(error).__name__, pause_seconds=REDIS_PAUSE_SECONDS)
