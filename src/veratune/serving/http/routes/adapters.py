"""Models in OpenAI's shape, and the adapters behind them: in, out, their versions, and the calls that other tools know."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from veratune.serving.http.routes.base import (
    ApiError,
    Body,
    CallerDep,
    Limit,
    ServiceDep,
    TenantDep,
    page,
)
from veratune.serving.store.base import Version

router = APIRouter()
Number = Annotated[int, Field(ge=1, lt=2**31)]  # of a version


class LoadBody(Body):
    lora_name: str
    lora_path: str = ""
    lora_int_id: int | None = None


class RollBackBody(Body):
    version: Number


@router.get("/v1/models")
def models(
    caller: CallerDep, service: ServiceDep, after: str = "", limit: Limit = 100
) -> dict[str, Any]:
    """The base models, and the caller's adapters by name."""
    found = service.names(caller, after, limit)
    data = [_model(name, entry.version.created) for name, entry in found]
    bases = [] if after else [_model(name, 0) for name in service.loops]
    return page(bases + data, len(found) == limit, last_id=found[-1][0] if found else None)


@router.get("/v1/models/{model:path}")
def model(model: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One model."""
    adapter = service.find(caller, model)
    return _model(model, 0 if adapter is None else adapter.version.created)


@router.put("/v1/adapters/{name}", status_code=201)
async def put(
    name: str, request: Request, tenant: TenantDep, service: ServiceDep
) -> dict[str, Any]:
    """The next version of an adapter: its file's bytes."""
    data = await request.body()
    version = await asyncio.to_thread(service.put, tenant, name, data)
    return _adapter(name, tenant, version)


@router.get("/v1/adapters")
def adapters(
    tenant: TenantDep, service: ServiceDep, after: str = "", limit: Limit = 100
) -> dict[str, Any]:
    """A tenant's adapters by name."""
    found = service.store.list(tenant, after, limit)
    return page([_adapter(e.name, tenant, e.version) for e in found], len(found) == limit)


@router.get("/v1/adapters/{name}")
def get(
    name: str, tenant: TenantDep, service: ServiceDep, version: Number | None = None
) -> Response:
    """An adapter's file."""
    number = service.store.newest(tenant, name).number if version is None else version
    data = service.store.get(tenant, name, number)
    headers = {
        "X-Adapter-Version": str(number),
        "Content-Disposition": f'attachment; filename="{name}.safetensors"',
    }
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/adapters/{name}")
def delete(name: str, tenant: TenantDep, service: ServiceDep) -> dict[str, Any]:
    """The end of an adapter, with all of its versions."""
    service.delete(tenant, name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.get("/v1/adapters/{name}/versions")
def versions(name: str, tenant: TenantDep, service: ServiceDep) -> dict[str, Any]:
    """An adapter's history, the newest version first."""
    return page(
        [_adapter(name, tenant, version) for version in service.store.versions(tenant, name)], False
    )


@router.post("/v1/adapters/{name}/rollback")
def roll_back(
    name: str, body: RollBackBody, tenant: TenantDep, service: ServiceDep
) -> dict[str, Any]:
    """An old version's bytes as the newest version."""
    return _adapter(name, tenant, service.store.roll_back(tenant, name, body.version))


@router.post("/v1/load_lora_adapter")
def load(body: LoadBody, caller: CallerDep, service: ServiceDep) -> PlainTextResponse:
    """For tools that know this call: adapters are loaded when they are asked for, so only whether it is there is told. Paths are never read."""
    if body.lora_path and body.lora_path != body.lora_name:
        raise ApiError(
            400,
            f"lora_path: files of the server are not read; send the bytes by PUT /v1/adapters/{body.lora_name}",
        )
    service.find(caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
def unload(body: LoadBody, caller: CallerDep, service: ServiceDep) -> PlainTextResponse:
    """Take an adapter out of memory, if nobody uses it now; it stays in the store."""
    adapter = service.find(caller, body.lora_name)
    if adapter is not None:
        service.forget(adapter.key)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "veratune"}


def _adapter(name: str, tenant: str, version: Version) -> dict[str, Any]:
    return {
        "id": name, "object": "adapter", "tenant": tenant, "version": version.number, "bytes": version.size, "created": int(version.created),
        "deleted": version.size == 0,
    }  # fmt: skip
