"""BatchRunner: runs batches beside other requests, one batch of each tenant at a time."""

import asyncio
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Response
from pydantic import BaseModel, ValidationError

from veratune.errors import JobNotFoundError, StoreError
from veratune.serving.http.batch_lines import BatchLine, parse_lines
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError, to_api_error
from veratune.serving.jobs.batches import Batch
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.keys import Caller

log = logging.getLogger(__name__)
_RETRY = 5.0  # seconds
CONCURRENCY = 8  # requests of one batch that run at once
Endpoint = tuple[type[BaseModel], Callable[[Any, Caller, Context], Awaitable[object]]]


class BatchClient:
    """Waits for the responses of a batch; it never goes away."""

    async def is_disconnected(self) -> bool:
        return False


class BatchRunner:
    """Runs the batches of `jobs` in the event loop."""

    def __init__(self, jobs: Jobs, context: Context, endpoints: Mapping[str, Endpoint]) -> None:
        """Prepare; `start` takes up batches that a restart interrupted.

        Args:
            jobs: Has the batches and their files.
            context: The application's context.
            endpoints: The body and the function of each path that batches may be for.
        """
        self.jobs, self.context, self.endpoints = jobs, context, endpoints
        self._woken: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by tenant

    async def start(self) -> None:
        """Go on with unfinished batches."""
        for batch in await self._store(self.jobs.batches.unfinished):
            self.wake(batch.tenant)

    async def close(self) -> None:
        """Stop; unfinished batches go on at the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def wake(self, tenant: str) -> None:
        """Run a tenant's batches, unless that is done already."""
        self._woken.add(tenant)
        task = self._tasks.get(tenant)
        if task is None or task.done():
            self._tasks[tenant] = asyncio.create_task(self._run_all(tenant))

    async def _run_all(self, tenant: str) -> None:
        while True:
            self._woken.discard(tenant)
            try:
                batches = await self._store(self.jobs.batches.unfinished, tenant)
                if batches:
                    await self._run_or_fail(batches[0])
                elif tenant not in self._woken:
                    return
            except (StoreError, OSError) as error:
                log.error("batches cannot be stored, trying again: %s", error)
                await asyncio.sleep(_RETRY)

    async def _run_or_fail(self, batch: Batch) -> None:
        try:
            await self._run(batch)
        except (StoreError, OSError):
            raise
        except JobNotFoundError:  # the batch was deleted with its tenant
            await self._store(self.jobs.batches.drop_results, batch)
        except Exception as error:
            log.error("batch %s failed", batch.id, exc_info=error)
            reason = "internal error; the server's log has the cause"
            await self._update(batch, "failed", errors=[(0, reason)])

    async def _run(self, batch: Batch) -> None:
        """Run one batch to its end."""
        try:
            data = await self._store(self.jobs.read_file, batch.tenant, batch.input_file)
        except JobNotFoundError:
            await self._update(batch, "failed", errors=[(0, "the input file was deleted")])
            return
        lines, errors = await self._store(parse_lines, data, batch.endpoint)
        if errors:
            await self._update(batch, "failed", errors=errors)
            return
        batch = await self._update(batch, "in_progress", total=len(lines))
        rows = await self._store(self.jobs.batches.results, batch)
        done = {row["custom_id"] for row in rows}
        good = sum(row["response"]["status_code"] == 200 for row in rows)
        batch = dataclasses.replace(batch, completed=good, failed=len(rows) - good)
        await self._run_lines(batch, [line for line in lines if line.custom_id not in done])
        await self._finish(batch)

    async def _run_lines(self, batch: Batch, lines: list[BatchLine]) -> None:
        """Run requests a few at a time, until the batch is cancelled or expires."""
        waiting = iter(lines)
        counts = {"completed": batch.completed, "failed": batch.failed}

        async def work() -> None:
            for line in waiting:
                stored = await self._store(self.jobs.batches.get, batch.tenant, batch.id)
                if stored.status == "cancelling" or time.time() > batch.expires:
                    return
                result = await self._run_line(batch, line)
                await self._store(self.jobs.batches.append_result, batch, result)
                good = result["response"]["status_code"] == 200
                counts["completed" if good else "failed"] += 1
                await self._store(self.jobs.batches.update, batch, **counts)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _run_line(self, batch: Batch, line: BatchLine) -> dict[str, Any]:
        """The result of one request; 429 and 503 are tried again until the batch expires."""
        while True:
            status, body, wait = await self._call(batch, line)
            if status not in (429, 503) or time.time() + wait > batch.expires:
                break
            await asyncio.sleep(wait)
        identity = f"batch_req_{secrets.token_hex(12)}"
        response = {"status_code": status, "request_id": identity, "body": body}
        return {"id": identity, "custom_id": line.custom_id, "response": response, "error": None}

    async def _call(self, batch: Batch, line: BatchLine) -> tuple[int, object, float]:
        """Call the endpoint: status, body, and seconds until another try."""
        kind, function = self.endpoints[batch.endpoint]
        try:
            if line.body.get("stream"):
                raise ApiError(400, "stream: a batch has no stream; leave it out", param="stream")
            body = kind.model_validate(line.body)
            reply = await function(body, Caller(batch.tenants), self.context)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            wrong = ApiError(400, f"{where}: {first['msg']}", param=where.partition(".")[0])
            return wrong.status, wrong.body(), 0.0
        except Exception as error:
            wrong = to_api_error(error)
            return wrong.status, wrong.body(), max(1.0, wrong.retry_after)
        if isinstance(reply, Response):
            return reply.status_code, json.loads(bytes(reply.body)), 1.0
        return 200, reply, 0.0

    async def _finish(self, batch: Batch) -> None:
        """Write the files of a batch, and end it."""
        batch = await self._update(batch, "finalizing")
        rows = await self._store(self.jobs.batches.results, batch)
        good = [row for row in rows if row["response"]["status_code"] == 200]
        bad = [row for row in rows if row["response"]["status_code"] != 200]
        changes: dict[str, object] = {"completed": len(good), "failed": len(bad)}
        for field, found in (("output_file", good), ("error_file", bad)):
            if found:
                data = "".join(json.dumps(row) + "\n" for row in found).encode()
                name = f"{batch.id}_{field.removesuffix('_file')}.jsonl"
                file = await self._store(
                    self.jobs.add_output_file, batch.tenant, name, "batch_output", data
                )
                changes[field] = file.id
        end = "completed"
        if len(rows) < batch.total:
            end = "cancelled" if batch.status == "cancelling" else "expired"
        await self._update(batch, end, **changes)
        await self._store(self.jobs.batches.drop_results, batch)

    async def _update(self, batch: Batch, status: str, **changes: object) -> Batch:
        return await self._store(self.jobs.batches.update, batch, status, **changes)

    async def _store(self, work: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        return await self.context.pools.batch.run(work, *args, **kwargs)
