"""Embeddings in OpenAI's shape, and classes in that of other servers, from an encoder."""

import asyncio
import base64
from typing import Any, Literal

import numpy as np
import torch
from fastapi import APIRouter
from pydantic import Field

from veratune.serving.engine.encoder import Encoder, EncodeRequest, Want
from veratune.serving.http.routes.base import ApiError, Body, CallerDep, ServiceDep, submit_and_wait
from veratune.serving.keys import Caller
from veratune.serving.service import Service

router = APIRouter()
Texts = str | list[str]
MOST = 2048  # inputs of one call, as OpenAI has it


class EmbeddingBody(Body):
    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class ClassifyBody(Body):
    model: str
    input: Texts
    pair: Texts | None = None


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """A vector of length 1 for each text, read with the model's own adapter."""
    encoder = service.encoding()
    given: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    if given and isinstance(given[0], int):
        given = [given]
    width = encoder.model.config.hidden_size
    if body.dimensions is not None and body.dimensions != width:
        raise ApiError(400, f"dimensions: this model's embeddings have {width}, and are not cut")
    size = encoder.model.config.vocab_size
    encoded = []
    for entry in given:
        if not isinstance(entry, str) and any(not 0 <= token < size for token in entry):
            raise ApiError(400, f"input: tokens are numbers from 0 to {size - 1}")
        encoded.append(
            encoder.encode(entry)
            if isinstance(entry, str)
            else {"input_ids": entry, "attention_mask": [1] * len(entry)}
        )
    vectors, read = await _read(service, encoder, caller, body.model, encoded, "embedding")
    tokens = sum(request.size for request in read)
    shown: list[Any] = vectors
    if body.encoding_format == "base64":
        shown = [
            base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
            for vector in vectors
        ]
    data = [
        {"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)
    ]
    return {
        "object": "list",
        "model": body.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@router.post("/v1/classify")
async def classify(body: ClassifyBody, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """The likeliest class of each text (or pair of texts) and the probabilities of all; an adapter trained on numbers gives its number."""
    encoder = service.encoding()
    texts, pairs = (
        [given] if isinstance(given, str) else given for given in (body.input, body.pair or [])
    )
    if body.pair is not None and len(pairs) != len(texts):
        raise ApiError(
            400, f"pair: {len(pairs)} texts for {len(texts)} of input; as many are wanted"
        )
    encoded = [encoder.encode(text, *pairs[i : i + 1]) for i, text in enumerate(texts)]
    logits, read = await _read(service, encoder, caller, body.model, encoded, "logits")
    lease = read[0].lease
    labels = [str(label) for label in lease.task.get("labels", [])] if lease is not None else []
    tokens = sum(request.size for request in read)
    data: list[dict[str, Any]] = []
    for i, row in enumerate(logits):
        if len(row) == 1:
            data.append({"index": i, "value": row[0]})
            continue
        shares = torch.tensor(row).softmax(-1)
        best = int(shares.argmax())
        data.append({
            "index": i, "label": labels[best] if best < len(labels) else str(best), "probs": shares.tolist(), "num_classes": len(row), "labels": labels,
        })  # fmt: skip
    return {
        "object": "list",
        "model": body.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _read(
    service: Service, encoder: Encoder, caller: Caller, model: str, encoded: list[Any], want: Want
) -> tuple[list[list[float]], list[EncodeRequest]]:
    """Every text's numbers, and the requests that had them. All texts are asked for at once; the first that fails fails the call."""
    if not 1 <= len(encoded) <= MOST:
        raise ApiError(400, f"input: {len(encoded)} texts; 1 to {MOST} are wanted")
    asked = await asyncio.to_thread(service.asked, caller, model, encoder)
    requests = [EncodeRequest(**asked, encoded=entry, want=want) for entry in encoded]
    for request in requests:
        encoder.check(request)
    rows: list[list[float]] = []
    for start in range(
        0, len(requests), encoder.config.max_num_seqs
    ):  # a long list is one tenant's: it takes its turns like others
        waiting = [
            submit_and_wait(encoder, request)
            for request in requests[start : start + encoder.config.max_num_seqs]
        ]
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
            rows.append(answer)
    return rows, requests
