"""A pool that is stuck refuses more calls than fit, and other pools go on."""

import asyncio
import threading

import pytest

from veratune.errors import QueueFullError
from veratune.serving.http.pools import BoundedPool


def test_calls_over_the_bound_are_refused_and_room_comes_back():
    async def scenario():
        pool, other, gate = BoundedPool("a", 1, 2), BoundedPool("b", 1, 2), threading.Event()
        waiting = [asyncio.ensure_future(pool.run(gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 a calls are waiting"):
            await pool.run(int)
        assert await other.run(int, "7") == 7
        waiting[1].cancel()
        await asyncio.wait(waiting[1:])
        last = asyncio.ensure_future(pool.run(int, "8"))
        await asyncio.sleep(0)
        gate.set()
        assert await waiting[0]
        assert await last == 8
        assert [await pool.run(int, "9") for _ in range(5)] == [9] * 5
        pool.close()
        other.close()

    asyncio.run(scenario())


def test_errors_pass_through():
    async def scenario():
        pool = BoundedPool("a", 1, 2)
        with pytest.raises(ValueError, match="invalid literal"):
            await pool.run(int, "x")
        assert await pool.run(int, "1") == 1
        pool.close()

    asyncio.run(scenario())
