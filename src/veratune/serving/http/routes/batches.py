"""Batches in the OpenAI API's shape: requests of a file, run beside other requests."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from openai.types import Batch as ApiBatch
from openai.types import BatchError, BatchRequestCounts
from openai.types.batch import Errors
from pydantic import Field

from veratune.errors import QueueFullError
from veratune.serving.http.batch_runner import BatchClient, BatchRunner, Endpoint
from veratune.serving.http.builders import dump
from veratune.serving.http.dependencies import (
    CallerDep,
    Context,
    ContextDep,
    JobsDep,
    Limit,
    TenantDep,
    first_page,
)
from veratune.serving.http.errors import ApiError
from veratune.serving.http.routes.chat import run_chat, run_completion
from veratune.serving.http.routes.encoding import embeddings
from veratune.serving.http.routes.responses import run_response
from veratune.serving.http.schemas.base import ApiBody
from veratune.serving.http.schemas.encoding import EmbeddingBody
from veratune.serving.http.schemas.generation import ChatBody, CompletionBody
from veratune.serving.http.schemas.responses import ResponsesBody
from veratune.serving.jobs.batches import Batch
from veratune.serving.keys import Caller

router = APIRouter()


class BatchBody(ApiBody):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] = Field({}, max_length=16)


async def _chat(body: ChatBody, caller: Caller, context: Context) -> object:
    return await run_chat(body, BatchClient(), caller, context)


async def _completion(body: CompletionBody, caller: Caller, context: Context) -> object:
    return await run_completion(body, BatchClient(), caller, context)


async def _respond(body: ResponsesBody, caller: Caller, context: Context) -> object:
    return await run_response(body, BatchClient(), caller, context)


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": (ChatBody, _chat),
    "/v1/completions": (CompletionBody, _completion),
    "/v1/responses": (ResponsesBody, _respond),
    "/v1/embeddings": (EmbeddingBody, embeddings),
}


@router.post("/v1/batches")
async def create_batch(
    body: BatchBody, http: Request, caller: CallerDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Queue the requests of a file."""
    context.check_extra_fields(body)
    if body.endpoint not in ENDPOINTS:
        wanted = ", ".join(ENDPOINTS)
        raise ApiError(400, f"endpoint: one of {wanted} is wanted", param="endpoint")
    if body.completion_window != "24h":
        raise ApiError(400, "completion_window: 24h is wanted", param="completion_window")
    file = await context.pools.read.run(jobs.file, caller.tenant, body.input_file_id)
    if file.purpose != "batch":
        raise ApiError(
            400,
            f"input_file_id: the file is for {file.purpose!r}; one for 'batch' is wanted",
            param="input_file_id",
        )
    unfinished = await context.pools.read.run(jobs.batches.unfinished, caller.tenant)
    if len(unfinished) >= jobs.max_jobs_per_tenant:
        raise QueueFullError(f"{len(unfinished)} batches are unfinished already; try again later")
    batch = await context.pools.write.run(
        jobs.batches.add, caller.tenants, body.endpoint, file.id, body.metadata
    )
    _runner(http).wake(batch.tenant)
    return _shown(batch)


@router.get("/v1/batches")
async def list_batches(
    tenant: TenantDep, jobs: JobsDep, context: ContextDep, after: str = "", limit: Limit = 20
) -> dict[str, object]:
    """A tenant's batches, newest first."""
    listed = await context.pools.read.run(jobs.batches.list_batches, tenant, after, limit + 1)
    return first_page(listed, limit, _shown)


@router.get("/v1/batches/{batch}")
async def get_batch(
    batch: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """One batch: its status, counts and files."""
    return _shown(await context.pools.read.run(jobs.batches.get, tenant, batch))


@router.post("/v1/batches/{batch}/cancel")
async def cancel_batch(
    batch: str, http: Request, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Stop a batch after the requests that run; what is done stays in its files."""
    found = await context.pools.read.run(jobs.batches.get, tenant, batch)
    stored = await context.pools.write.run(jobs.batches.update, found, "cancelling")
    _runner(http).wake(tenant)
    return _shown(stored)


def _runner(http: Request) -> BatchRunner:
    runner: BatchRunner = http.app.state.batch_runner
    return runner


def _shown(batch: Batch) -> dict[str, object]:
    times: dict[str, Any] = {f"{status}_at": int(when) for status, when in batch.times.items()}
    errors = [
        BatchError(code="invalid_request", message=message, line=line or None)
        for line, message in batch.errors
    ]
    counts = BatchRequestCounts(completed=batch.completed, failed=batch.failed, total=batch.total)
    return dump(
        ApiBatch.model_construct(
            id=batch.id,
            object="batch",
            endpoint=batch.endpoint,
            errors=Errors(data=errors, object="list") if errors else None,
            input_file_id=batch.input_file,
            completion_window="24h",
            status=batch.status,
            output_file_id=batch.output_file,
            error_file_id=batch.error_file,
            created_at=int(batch.created),
            expires_at=int(batch.expires),
            request_counts=counts,
            metadata=batch.metadata,
            **times,
        )
    )
