"""Similarity of texts: /v1/score and /v1/rerank.

The score of a pair is the cosine of its embeddings. An adapter that was trained on pairs with
numbers (a cross-encoder) gives its number instead.
"""

import time
import uuid

import torch
from fastapi import APIRouter

from veratune.serving.http.dependencies import CallerDep, Context, ContextDep
from veratune.serving.http.encoding import check_count, encode, encode_and_run
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.encoding import RerankBody, ScoreBody
from veratune.serving.keys import Caller

router = APIRouter()


@router.post("/score", include_in_schema=False)
@router.post("/v1/score")
async def score(body: ScoreBody, caller: CallerDep, context: ContextDep) -> dict[str, object]:
    """A number for each pair of texts."""
    context.check_extra_fields(body)
    pairs = body.pairs
    if not pairs:
        raise ApiError(
            400,
            "text_2: one text of text_1 goes with any number, several go with as many",
            param="text_2",
        )
    scores, tokens = await _scores(context, caller, body.model, pairs)
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank")
async def rerank(body: RerankBody, caller: CallerDep, context: ContextDep) -> dict[str, object]:
    """Documents by their similarity to a query, best first."""
    context.check_extra_fields(body)
    texts = body.texts
    if not texts:
        raise ApiError(400, "documents: at least one is wanted", param="documents")
    pairs = [(body.query, text) for text in texts]
    scores, tokens = await _scores(context, caller, body.model, pairs)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
    results: list[dict[str, object]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if body.return_documents:
        for result, i in zip(results, order, strict=True):
            result["document"] = {"text": texts[i]}
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.model,
        "usage": {"total_tokens": tokens},
        "results": results,
    }


async def _scores(
    context: Context, caller: Caller, model: str, pairs: list[tuple[str, str]]
) -> tuple[list[float], int]:
    """The score of each pair, and the tokens that it took."""
    encoder = context.service.require_encoder()
    check_count(len(pairs))
    if not await context.pools.read.run(_has_head, context, caller, model):
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        encoded = await encode(context, encoder, [(text,) for text in texts])
        vectors, requests = await encode_and_run(
            context, encoder, caller, model, encoded, "embedding"
        )
        found = dict(zip(texts, torch.tensor(vectors, dtype=torch.float64), strict=True))
        scores = [float(found[first] @ found[second]) for first, second in pairs]
    else:
        encoded = await encode(context, encoder, pairs)
        logits, requests = await encode_and_run(context, encoder, caller, model, encoded, "logits")
        if len(logits[0]) != 1:
            raise ApiError(
                400,
                f"model: {model!r} was trained on {len(logits[0])} classes; /v1/classify gives "
                "them",
                param="model",
            )
        scores = [row[0] for row in logits]
    return scores, sum(request.size for request in requests)


def _has_head(context: Context, caller: Caller, model: str) -> bool:
    """Whether a model is an adapter with a trained head."""
    ref = context.service.resolve(caller, model)
    return ref is not None and bool(context.service.load(ref).head)
