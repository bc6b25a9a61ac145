"""Fine-tuning as a service, in OpenAI's shapes: files of rows, jobs, their events."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from pydantic import Field

from veratune.errors import UnsupportedError
from veratune.serving.http.routes.base import Body, Limit, TenantDep, page
from veratune.serving.jobs.jobs import File, Job, Jobs
from veratune.serving.store.base import check_name

router = APIRouter()
_LR = 1e-2  # what a multiplier of 1 stands for: the default of `veratune train`


def get_jobs(request: Request) -> Jobs:
    """The jobs behind the application. Raises UnsupportedError where there are none."""
    jobs: Jobs | None = request.app.state.jobs
    if jobs is None:
        raise UnsupportedError("this server does not fine-tune (start it with --jobs FOLDER)")
    return jobs


JobsDep = Annotated[Jobs, Depends(get_jobs)]
Auto = Literal["auto"]


class Hyperparameters(Body):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Body):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class Vera(Body):
    """What OpenAI's shape has no word for: settings of `veratune train`."""

    rank: int | None = Field(default=None, ge=1, le=16384)
    targets: list[str] | None = Field(default=None, min_length=1, max_length=100)
    lr: float | None = Field(default=None, gt=0, le=100)
    max_length: int | None = Field(default=None, ge=2, le=32768)
    max_steps: int | None = Field(default=None, ge=1, le=10**7)
    mixed_precision: Literal["auto", "no", "bf16"] | None = None


class JobBody(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(default=None, max_length=128)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    vera: Vera = Vera()

    def settings(self) -> dict[str, Any]:
        """Flags of `veratune train`."""
        asked = self.hyperparameters or (self.method or Method()).supervised.hyperparameters
        found: dict[str, Any] = {
            "epochs": asked.n_epochs,
            "batch_size": asked.batch_size,
            "seed": self.seed,
        }
        if asked.learning_rate_multiplier != "auto":
            found["lr"] = _LR * asked.learning_rate_multiplier
        found |= self.vera.model_dump(exclude_none=True)
        return {key: value for key, value in found.items() if value not in (None, "auto")}


@router.post("/v1/files")
async def upload(
    tenant: TenantDep, jobs: JobsDep, file: UploadFile, purpose: Annotated[str, Form()]
) -> dict[str, Any]:
    """Rows to learn from: a file with a JSON object a line."""
    data = await file.read()
    return _file(
        await asyncio.to_thread(jobs.add_file, tenant, file.filename or "file.jsonl", purpose, data)
    )


@router.get("/v1/files")
def files(tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """A tenant's files."""
    return page([_file(file) for file in jobs.files(tenant)], False)


@router.get("/v1/files/{file}")
def file(file: str, tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """One file."""
    return _file(jobs.file(tenant, file))


@router.get("/v1/files/{file}/content")
def content(file: str, tenant: TenantDep, jobs: JobsDep) -> Response:
    """A file's bytes."""
    return Response(jobs.content(tenant, file), media_type="application/jsonl")


@router.delete("/v1/files/{file}")
def drop(file: str, tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """The end of a file."""
    jobs.drop_file(tenant, file)
    return {"id": file, "object": "file", "deleted": True}


@router.post("/v1/fine_tuning/jobs")
def create(body: JobBody, tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """A job; its adapter appears under the tenant, by the name `suffix`."""
    if body.suffix is not None:
        check_name("suffix", body.suffix)
    return _job(
        jobs.add(
            tenant,
            body.model,
            body.training_file,
            body.suffix,
            body.validation_file,
            body.settings(),
        )
    )


@router.get("/v1/fine_tuning/jobs")
def listed(tenant: TenantDep, jobs: JobsDep, after: str = "", limit: Limit = 20) -> dict[str, Any]:
    """A tenant's jobs, the newest first."""
    found = jobs.page(tenant, after, limit + 1)
    return page([_job(job) for job in found[:limit]], len(found) > limit)


@router.get("/v1/fine_tuning/jobs/{job}")
def one(job: str, tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """One job: its status, how far it is, what it made."""
    return _job(jobs.job(tenant, job))


@router.post("/v1/fine_tuning/jobs/{job}/cancel")
def cancel(job: str, tenant: TenantDep, jobs: JobsDep) -> dict[str, Any]:
    """End a job that has not ended."""
    return _job(jobs.cancel(tenant, job))


@router.get("/v1/fine_tuning/jobs/{job}/events")
def events(
    job: str, tenant: TenantDep, jobs: JobsDep, after: str = "", limit: Limit = 20
) -> dict[str, Any]:
    """A job's log, the newest line first."""
    number = after.removeprefix("event-")
    found = jobs.events(
        tenant, job, int(number) if number.isdecimal() and len(number) < 18 else 0, limit + 1
    )
    data = [
        {"id": f"event-{e.number}", "object": "fine_tuning.job.event", "created_at": int(e.created), "level": e.level, "message": e.message, "type": "message"}
        for e in found[:limit]
    ]  # fmt: skip
    return page(data, len(found) > limit)


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.id, "object": "file", "bytes": file.size, "created_at": int(file.created), "filename": file.name, "purpose": file.purpose,
        "status": "processed",
    }  # fmt: skip


def _job(job: Job) -> dict[str, Any]:
    done = job.status == "succeeded"
    return {
        "id": job.id, "object": "fine_tuning.job", "model": job.model, "created_at": int(job.created), "finished_at": int(job.ended) if job.ended else None,
        "status": job.status, "fine_tuned_model": job.adapter if done else None, "training_file": job.file, "validation_file": job.validation,
        "organization_id": job.tenant, "result_files": [], "seed": job.settings.get("seed", 0), "trained_tokens": None,
        "hyperparameters": {"n_epochs": job.settings.get("epochs", "auto"), "batch_size": job.settings.get("batch_size", "auto"), "learning_rate_multiplier": "auto"},
        "error": {"code": "training_failed", "message": job.error, "param": None} if job.error else None,
        "suffix": job.adapter, "step": job.step, "steps": job.steps, "version": job.version or None, "result": job.result, "settings": job.settings,
    }  # fmt: skip
