"""Feedback on completions, what training on it gave, and the deletion of a tenant."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from veratune.errors import UnsupportedError
from veratune.serving.feedback.feedback import MAX_CHARACTERS, MAX_MESSAGES, Feedback
from veratune.serving.feedback.models import Example, FeedbackRun
from veratune.serving.http.dependencies import CallerDep, ContextDep, Limit, TenantDep, first_page
from veratune.serving.http.schemas.base import StrictBody

router = APIRouter()


class FeedbackMessage(StrictBody):
    """A message of text."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_CHARACTERS)


class FeedbackBody(StrictBody):
    """POST /v1/feedback: a conversation, and a rating of its completion or a better one."""

    model: str
    messages: list[FeedbackMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    rating: Literal["up", "down"] | None = None
    correction: str | None = Field(None, max_length=MAX_CHARACTERS)


async def get_feedback(context: ContextDep) -> Feedback:
    """The server's feedback. Raises UnsupportedError on a server without."""
    if context.feedback is None:
        raise UnsupportedError("this server takes no feedback (start it with --jobs FOLDER)")
    return context.feedback


FeedbackDep = Annotated[Feedback, Depends(get_feedback)]


@router.post("/v1/feedback", status_code=201)
async def add_feedback(
    body: FeedbackBody, caller: CallerDep, feedback: FeedbackDep, context: ContextDep
) -> dict[str, object]:
    """Store feedback on a completion; the caller's adapter is trained on it later."""
    messages = [message.model_dump() for message in body.messages]
    example = await context.pools.write.run(
        feedback.add, caller, body.model, messages, body.rating or "", body.correction or ""
    )
    return _example(example)


@router.get("/v1/feedback")
async def list_feedback(
    tenant: TenantDep,
    feedback: FeedbackDep,
    context: ContextDep,
    after: str = "",
    limit: Limit = 20,
) -> dict[str, object]:
    """A tenant's feedback, newest first."""
    listed = await context.pools.read.run(feedback.examples, tenant, after, limit + 1)
    return first_page(listed, limit, _example)


@router.get("/v1/feedback/runs")
async def list_runs(
    tenant: TenantDep, feedback: FeedbackDep, context: ContextDep, limit: Limit = 20
) -> dict[str, object]:
    """What training on a tenant's feedback gave, newest first."""
    listed = await context.pools.read.run(feedback.runs, tenant, limit + 1)
    return first_page(listed, limit, _run)


@router.delete("/v1/feedback/{example}")
async def delete_feedback(
    example: str, tenant: TenantDep, feedback: FeedbackDep, context: ContextDep
) -> dict[str, object]:
    """Delete one piece of feedback. Adapters that were trained on it stay."""
    await context.pools.write.run(feedback.delete, tenant, example)
    return {"id": example, "object": "feedback", "deleted": True}


@router.delete("/v1/tenants/{tenant}")
async def delete_tenant(
    tenant: TenantDep, feedback: FeedbackDep, context: ContextDep
) -> dict[str, object]:
    """Delete all that a tenant has stored: feedback, files, jobs, and adapters."""
    counts = await context.pools.write.run(feedback.delete_tenant, tenant)
    return {"id": tenant, "object": "tenant", "deleted": True, **counts}


def _example(example: Example) -> dict[str, object]:
    return {
        "id": example.id,
        "object": "feedback",
        "model": example.adapter,
        "tenant": example.tenant,
        "kind": example.kind,
        "messages": example.messages,
        "held_out": example.held_out,
        "trained": example.trained,
        "created_at": int(example.created),
    }


def _run(run: FeedbackRun) -> dict[str, object]:
    return {
        "object": "feedback.run",
        "model": run.adapter,
        "tenant": run.tenant,
        "created_at": int(run.created),
        "outcome": run.outcome,
        "held_out_loss_before": run.before,
        "held_out_loss_after": run.after,
        "version": run.version or None,
        "reason": run.reason,
    }
