"""Fine-tuning in the OpenAI API's shape: files, jobs, and their events."""

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from veratune.serving.http.dependencies import (
    ContextDep,
    JobsDep,
    Limit,
    TenantDep,
    first_page,
    page,
)
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.adapters import JobBody
from veratune.serving.jobs.models import Event, Job, TrainingFile
from veratune.serving.store.base import check_name

router = APIRouter()
_BASE_LR = 1e-2  # a learning rate multiplier of 1: the default of `veratune train`
_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_UPLOAD_SCHEMA)
async def upload_file(
    request: Request, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Upload training rows: a file with one JSON object a line."""
    async with request.form(max_files=1, max_fields=20) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise ApiError(400, "a form with the fields file and purpose is wanted", param="file")
        data, name = await file.read(), file.filename or "file.jsonl"
    stored = await context.pools.write.run(jobs.add_file, tenant, name, purpose, data)
    return _file(stored)


@router.get("/v1/files")
async def list_files(tenant: TenantDep, jobs: JobsDep, context: ContextDep) -> dict[str, object]:
    """A tenant's files."""
    return page([_file(file) for file in await context.pools.read.run(jobs.files, tenant)], False)


@router.get("/v1/files/{file}")
async def get_file(
    file: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """One file."""
    return _file(await context.pools.read.run(jobs.file, tenant, file))


@router.get("/v1/files/{file}/content")
async def get_file_content(
    file: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> Response:
    """A file's bytes."""
    data = await context.pools.read.run(jobs.read_file, tenant, file)
    return Response(data, media_type="application/jsonl")


@router.delete("/v1/files/{file}")
async def delete_file(
    file: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Delete a file; 409 while a job needs it."""
    await context.pools.write.run(jobs.delete_file, tenant, file)
    return {"id": file, "object": "file", "deleted": True}


@router.post("/v1/fine_tuning/jobs")
async def create_job(
    body: JobBody, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Queue a job. Its adapter is published for the tenant under the name `suffix`."""
    if body.suffix is not None:
        check_name("suffix", body.suffix)
    job = await context.pools.write.run(
        jobs.create,
        tenant,
        body.model,
        body.training_file,
        body.suffix,
        body.validation_file,
        body.settings(_BASE_LR),
    )
    return _job(job)


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(
    tenant: TenantDep, jobs: JobsDep, context: ContextDep, after: str = "", limit: Limit = 20
) -> dict[str, object]:
    """A tenant's jobs, newest first."""
    listed = await context.pools.read.run(jobs.list_jobs, tenant, after, limit + 1)
    return first_page(listed, limit, _job)


@router.get("/v1/fine_tuning/jobs/{job}")
async def get_job(
    job: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """One job: its status, progress and result."""
    return _job(await context.pools.read.run(jobs.job, tenant, job))


@router.post("/v1/fine_tuning/jobs/{job}/cancel")
async def cancel_job(
    job: str, tenant: TenantDep, jobs: JobsDep, context: ContextDep
) -> dict[str, object]:
    """Cancel a job that has not ended."""
    return _job(await context.pools.write.run(jobs.cancel, tenant, job))


@router.get("/v1/fine_tuning/jobs/{job}/events")
async def list_events(
    job: str,
    tenant: TenantDep,
    jobs: JobsDep,
    context: ContextDep,
    after: str = "",
    limit: Limit = 20,
) -> dict[str, object]:
    """A job's log, newest line first."""
    number = after.removeprefix("event-")
    before = int(number) if number.isdecimal() and len(number) < 18 else 0
    listed = await context.pools.read.run(jobs.events, tenant, job, before, limit + 1)
    return first_page(listed, limit, _event)


def _event(event: Event) -> dict[str, object]:
    return {
        "id": f"event-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created),
        "level": event.level,
        "message": event.message,
        "type": "message",
    }


def _file(file: TrainingFile) -> dict[str, object]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _job(job: Job) -> dict[str, object]:
    succeeded = job.status == "succeeded"
    error = {"code": "training_failed", "message": job.error, "param": None} if job.error else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": int(job.created),
        "finished_at": int(job.ended) if job.ended else None,
        "status": job.status,
        "fine_tuned_model": job.adapter if succeeded else None,
        "training_file": job.file,
        "validation_file": job.validation,
        "organization_id": job.tenant,
        "result_files": [],
        "seed": job.settings.get("seed", 0),
        "trained_tokens": None,
        "hyperparameters": {
            "n_epochs": job.settings.get("epochs", "auto"),
            "batch_size": job.settings.get("batch_size", "auto"),
            "learning_rate_multiplier": "auto",
        },
        "error": error,
        "suffix": job.adapter,
        "step": job.step,
        "steps": job.steps,
        "version": job.version or None,
        "result": dict(job.result),
        "settings": dict(job.settings),
    }
