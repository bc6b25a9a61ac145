"""Dependencies of routes: the caller, the service, the jobs, the application context."""

import asyncio
import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Depends, Query, Request

from veratune.errors import AdapterNotFoundError, UnsupportedError
from veratune.serving.feedback.feedback import Feedback
from veratune.serving.http.config import HttpConfig
from veratune.serving.http.errors import ApiError
from veratune.serving.http.fields import check_extra_fields
from veratune.serving.http.limiter import TenantLimiter
from veratune.serving.http.metrics import Latencies
from veratune.serving.http.pools import ThreadPools
from veratune.serving.http.prompts import PromptEncoder
from veratune.serving.http.schemas.base import ApiBody
from veratune.serving.http.tracing import Tracing
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.keys import Caller
from veratune.serving.service import Service

log = logging.getLogger(__name__)
Entry = TypeVar("Entry")
_MAX_NOTED = 1000  # field names; clients may send any


@dataclasses.dataclass
class Context:
    """Objects that the application owns besides its routes."""

    service: Service
    jobs: Jobs | None
    config: HttpConfig
    limiter: TenantLimiter
    pools: ThreadPools
    latencies: Latencies
    feedback: Feedback | None = None
    tracing: Tracing | None = None
    ignored_fields: set[str] = dataclasses.field(default_factory=set)
    _encoder: PromptEncoder | None = None
    _locks: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder of prompts for the causal model. Raises UnsupportedError without one."""
        if self._encoder is None:
            self._encoder = PromptEncoder(self.service.require_engine())
        return self._encoder

    def tenant_lock(self, work: str, tenant: str) -> asyncio.Lock:
        """Held while costly work of a tenant runs, so that others need not wait for many."""
        return self._locks.setdefault((work, tenant), asyncio.Lock())

    def check_extra_fields(self, body: ApiBody) -> None:
        """Refuse unsupported fields of a body, and log unknown ones, one line for each name."""
        for name in check_extra_fields(body.model_extra or {}):
            if name not in self.ignored_fields and len(self.ignored_fields) < _MAX_NOTED:
                self.ignored_fields.add(name)
                log.info("unknown field %.100r is ignored", name)


async def get_context(request: Request) -> Context:
    """The application's context."""
    context: Context = request.app.state.context
    return context


async def get_caller(request: Request) -> Caller:
    """Who calls, as the Authentication middleware found."""
    caller: Caller | None = getattr(request.state, "caller", None)
    if caller is None:
        raise ApiError(401, "no API key", "authentication_error", "invalid_api_key")
    return caller


ContextDep = Annotated[Context, Depends(get_context)]
CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_service(context: ContextDep) -> Service:
    """The service behind the application."""
    return context.service


async def get_jobs(context: ContextDep) -> Jobs:
    """The fine-tuning jobs. Raises UnsupportedError on a server without."""
    if context.jobs is None:
        raise UnsupportedError("this server does not fine-tune (start it with --jobs FOLDER)")
    return context.jobs


async def get_tenant(caller: CallerDep, tenant: str | None = None) -> str:
    """The tenant that a call is for. Raises AdapterNotFoundError for one the key may not use."""
    if tenant is None or tenant in caller.tenants:
        return tenant or caller.tenant
    raise AdapterNotFoundError("no such adapter, or this key may not use it")


ServiceDep = Annotated[Service, Depends(get_service)]
JobsDep = Annotated[Jobs, Depends(get_jobs)]
TenantDep = Annotated[str, Depends(get_tenant)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def page(data: Sequence[object], more: bool, **others: object) -> dict[str, object]:
    """A list in the OpenAI API's shape."""
    return {"object": "list", "data": list(data), "has_more": more, **others}


def first_page(
    listed: Sequence[Entry], limit: int, show: Callable[[Entry], object]
) -> dict[str, object]:
    """The first `limit` entries; one more in `listed` tells that there is another page."""
    return page([show(entry) for entry in listed[:limit]], len(listed) > limit)
