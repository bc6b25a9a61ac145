"""Models in the OpenAI API's shape, and the adapters behind them: upload, download, delete,
versions, roll back.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from openai.types import Model
from pydantic import Field
from starlette.datastructures import UploadFile

from veratune.errors import ConfigError
from veratune.formats.lora_file import pack_lora
from veratune.formats.peft_files import CONFIG_NAME, WEIGHTS_NAME
from veratune.serving.http.dependencies import (
    CallerDep,
    Context,
    ContextDep,
    Limit,
    TenantDep,
    page,
)
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.adapters import LoadAdapterBody, RollBackBody
from veratune.serving.names import AUTO
from veratune.serving.routing.adapter_embedding import AdapterEmbedding
from veratune.serving.routing.examples import parse_examples
from veratune.serving.routing.router import MAX_EXAMPLES
from veratune.serving.service import Service
from veratune.serving.sources import read_source
from veratune.serving.store.base import Version, check_name

router = APIRouter()
Number = Annotated[int, Field(ge=1, lt=2**31)]  # of a version


@router.get("/v1/models")
async def list_models(
    caller: CallerDep, context: ContextDep, after: str = "", limit: Limit = 100
) -> dict[str, object]:
    """The base models, and the caller's adapters by name."""
    service = context.service
    listed = await context.pools.read.run(service.list_adapters, caller, after, limit)
    bases = [] if after else [_model(name, 0) for name in service.loops]
    if bases and service.router is not None:
        choice = await context.pools.route.run(service.router.has_choice, caller.tenant)
        bases += [_model(AUTO, 0)] if choice else []
    adapters = [_model(name, entry.version.created) for name, entry in listed]
    last = listed[-1][0] if listed else None
    return page(bases + adapters, len(listed) == limit, last_id=last)


@router.get("/v1/models/{model:path}")
async def get_model(model: str, caller: CallerDep, context: ContextDep) -> dict[str, object]:
    """One model."""
    if model == AUTO and context.service.router is not None:
        return _model(model, 0)
    ref = await context.pools.read.run(context.service.resolve, caller, model)
    return _model(model, 0 if ref is None else ref.created)


@router.put("/v1/adapters/{name}", status_code=201)
async def put_adapter(
    name: str, request: Request, tenant: TenantDep, context: ContextDep
) -> dict[str, object]:
    """Upload the next version of an adapter: the bytes of its file, or a form with the two files of
    a PEFT LoRA checkpoint.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        data = await _packed(request, context)
    else:
        data = await request.body()
    version = await context.pools.write.run(context.service.put, tenant, name, data)
    return _adapter(name, tenant, version)


@router.put("/v1/adapters/{name}/examples")
async def put_examples(
    name: str, request: Request, tenant: TenantDep, context: ContextDep
) -> dict[str, object]:
    """Embed example inputs of an adapter, by which the model "auto" chooses it: a JSON list of
    texts or conversations, or one a line.
    """
    body = await request.body()

    def store() -> AdapterEmbedding:
        texts = parse_examples(body)
        if len(texts) > MAX_EXAMPLES:
            raise ConfigError(f"{len(texts)} examples; at most {MAX_EXAMPLES} are wanted")
        return context.service.put_examples(tenant, name, texts)

    async with context.tenant_lock("examples", tenant):
        made = await context.pools.examples.run(store)
    return {
        "id": name,
        "object": "adapter.examples",
        "tenant": tenant,
        "examples": made.examples,
        "embedder": made.embedder,
        "threshold": made.threshold,
    }


@router.get("/v1/adapters")
async def list_adapters(
    tenant: TenantDep, context: ContextDep, after: str = "", limit: Limit = 100
) -> dict[str, object]:
    """A tenant's adapters by name."""
    store = context.service.store
    listed = await context.pools.read.run(store.list_adapters, tenant, after, limit)
    return page([_adapter(e.name, tenant, e.version) for e in listed], len(listed) == limit)


@router.get("/v1/adapters/{name}")
async def get_adapter(
    name: str, tenant: TenantDep, context: ContextDep, version: Number | None = None
) -> Response:
    """Download an adapter's file."""
    number, data = await context.pools.read.run(_read, context.service, tenant, name, version)
    headers = {
        "X-Adapter-Version": str(number),
        "Content-Disposition": f'attachment; filename="{name}.safetensors"',
    }
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, tenant: TenantDep, context: ContextDep) -> dict[str, object]:
    """Delete an adapter with all of its versions."""
    await context.pools.write.run(context.service.delete, tenant, name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.get("/v1/adapters/{name}/versions")
async def list_versions(name: str, tenant: TenantDep, context: ContextDep) -> dict[str, object]:
    """An adapter's history, newest version first."""
    versions = await context.pools.read.run(context.service.store.versions, tenant, name)
    return page([_adapter(name, tenant, version) for version in versions], False)


@router.post("/v1/adapters/{name}/rollback")
async def roll_back(
    name: str, body: RollBackBody, tenant: TenantDep, context: ContextDep
) -> dict[str, object]:
    """Publish an old version's bytes as the newest version."""
    store = context.service.store
    version = await context.pools.write.run(store.roll_back, tenant, name, body.version)
    return _adapter(name, tenant, version)


@router.post("/v1/load_lora_adapter")
async def load_adapter(
    body: LoadAdapterBody, caller: CallerDep, context: ContextDep
) -> PlainTextResponse:
    """VLLM's call: store the adapter at a path of an allowed source. Without a path, tell whether
    the adapter exists: adapters load on demand.
    """
    service = context.service
    if body.lora_path and body.lora_path != body.lora_name:
        check_name("adapter name", body.lora_name)

        def store() -> None:
            config = context.config
            data = read_source(body.lora_path, config.adapter_sources, config.upload_limit)
            service.put_if_changed(caller.tenant, body.lora_name, data)

        await context.pools.write.run(store)
    await context.pools.read.run(service.find_adapter, caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(
    body: LoadAdapterBody, caller: CallerDep, context: ContextDep
) -> PlainTextResponse:
    """VLLM's call: take an adapter out of memory, unless it is in use; it stays in the store."""
    service = context.service
    ref = await context.pools.read.run(service.find_adapter, caller, body.lora_name)
    if ref is not None:
        service.unload(ref.key)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _packed(request: Request, context: Context) -> bytes:
    """One file of a form with the two files of a PEFT LoRA checkpoint."""
    names = (CONFIG_NAME, WEIGHTS_NAME)
    async with request.form(max_files=2, max_fields=0) as form:
        files = {
            name: await value.read()
            for name, value in form.multi_items()
            if name in names and isinstance(value, UploadFile)
        }
        if set(form) != set(names) or len(files) != 2:
            raise ApiError(400, f"a form with the files {' and '.join(names)} is wanted")
    return await context.pools.write.run(pack_lora, files[CONFIG_NAME], files[WEIGHTS_NAME])


def _read(service: Service, tenant: str, name: str, version: int | None) -> tuple[int, bytes]:
    number = service.store.newest(tenant, name).number if version is None else version
    return number, service.store.get(tenant, name, number)


def _model(name: str, created: float) -> dict[str, object]:
    model = Model(id=name, object="model", created=int(created), owned_by="veratune")
    return model.model_dump(exclude_unset=True)


def _adapter(name: str, tenant: str, version: Version) -> dict[str, object]:
    return {
        "id": name,
        "object": "adapter",
        "tenant": tenant,
        "version": version.number,
        "bytes": version.size,
        "created": int(version.created),
        "deleted": version.size == 0,
    }
