"""ResponsesBuilder: responses of POST /v1/responses."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types import CompletionUsage
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseErrorEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_output_text import Logprob, LogprobTopLogprob
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.requests import OutputDelta
from veratune.serving.engine.sampling import SampledToken
from veratune.serving.http.builders import ResponseBuilder, dump, with_logprobs
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.responses import ResponsesBody
from veratune.serving.http.tool_reader import ToolReader
from veratune.serving.http.tools import ToolCall

Item = ResponseOutputMessage | ResponseFunctionToolCall


class ResponsesBuilder(ResponseBuilder):
    """One response: a message, tool calls, or both."""

    end_of_stream = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        body: ResponsesBody,
        tools: ToolReader | None = None,
    ) -> None:
        """Begin a response.

        Args:
            tokenizer: Turns token ids into text.
            model: The name that the response gives.
            body: Its settings come back in the response.
            tools: Reads tool calls; None for a call without tools.
        """
        super().__init__(tokenizer, model)
        self.body, self.id = body, f"resp_{uuid.uuid4().hex}"
        self._tools = tools or ToolReader(None)
        self._items: list[Item] = []  # complete ones
        self._message: ResponseOutputMessage | None = None  # the one that grows
        self._text, self._scores = "", list[Logprob]()
        self._number = 0
        self._reason: str | None = None

    def whole(self, outputs: Sequence[Sequence[OutputDelta]], usage: CompletionUsage) -> BaseModel:
        for delta in outputs[0]:
            self.chunks(0, delta)
        self._end()
        return self._response(usage)

    def opening(self, index: int) -> list[BaseModel]:
        return [
            ResponseCreatedEvent.model_construct(
                response=self._response(), type="response.created", **self._next()
            ),
            ResponseInProgressEvent.model_construct(
                response=self._response(), type="response.in_progress", **self._next()
            ),
        ]

    def chunks(
        self, index: int, delta: OutputDelta, usage: CompletionUsage | None = None
    ) -> list[BaseModel]:
        output, self._reason = self._tools.read(index, delta)
        events: list[BaseModel] = []
        scores = [self._score(token) for token in with_logprobs([delta])]
        if output.content:
            events += self._begin_message()
            self._text += output.content
            self._scores += scores
            events.append(
                ResponseTextDeltaEvent.model_construct(
                    delta=output.content,
                    logprobs=scores,
                    type="response.output_text.delta",
                    **self._place(),
                )
            )
        for call in output.calls:
            events += self._end_message()
            events += self._call(call)
        return events

    def closing(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        events = self._end()
        response = self._response(usage)
        if self._reason == "length":
            last: BaseModel = ResponseIncompleteEvent.model_construct(
                response=response, type="response.incomplete", **self._next()
            )
        else:
            last = ResponseCompletedEvent.model_construct(
                response=response, type="response.completed", **self._next()
            )
        return [*events, last]

    def event(self, content: BaseModel) -> str:
        data = dump(content)
        return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"

    def error_event(self, error: ApiError) -> str:
        return self.event(
            ResponseErrorEvent.model_construct(
                code=error.code or error.kind,
                message=str(error),
                param=error.param,
                type="error",
                **self._next(),
            )
        )

    def _end(self) -> list[BaseModel]:
        """End the last message; a response has at least one item."""
        begun = [] if self._items else self._begin_message()
        return begun + self._end_message()

    def _begin_message(self) -> list[BaseModel]:
        if self._message is not None:
            return []
        self._text, self._scores = "", []
        self._message = ResponseOutputMessage.model_construct(
            id=f"msg_{uuid.uuid4().hex}",
            content=[],
            role="assistant",
            status="in_progress",
            type="message",
        )
        return [
            self._item_event(self._message, done=False),
            ResponseContentPartAddedEvent.model_construct(
                part=self._part(), type="response.content_part.added", **self._place()
            ),
        ]

    def _end_message(self) -> list[BaseModel]:
        if self._message is None:
            return []
        whole = self._message.model_copy(
            update={
                "content": [self._part()],
                "status": "incomplete" if self._reason == "length" else "completed",
            }
        )
        events: list[BaseModel] = [
            ResponseTextDoneEvent.model_construct(
                text=self._text,
                logprobs=self._scores,
                type="response.output_text.done",
                **self._place(),
            ),
            ResponseContentPartDoneEvent.model_construct(
                part=self._part(), type="response.content_part.done", **self._place()
            ),
            self._item_event(whole, done=True),
        ]
        self._items.append(whole)
        self._message = None
        return events

    def _call(self, call: ToolCall) -> list[BaseModel]:
        item = ResponseFunctionToolCall.model_construct(
            id=f"fc_{uuid.uuid4().hex}",
            call_id=call.id,
            name=call.name,
            arguments="",
            status="in_progress",
            type="function_call",
        )
        where: dict[str, Any] = {"item_id": item.id, "output_index": len(self._items)}
        whole = item.model_copy(update={"arguments": call.arguments, "status": "completed"})
        events: list[BaseModel] = [
            self._item_event(item, done=False),
            ResponseFunctionCallArgumentsDeltaEvent.model_construct(
                delta=call.arguments,
                type="response.function_call_arguments.delta",
                **where,
                **self._next(),
            ),
            ResponseFunctionCallArgumentsDoneEvent.model_construct(
                arguments=call.arguments,
                name=call.name,
                type="response.function_call_arguments.done",
                **where,
                **self._next(),
            ),
            self._item_event(whole, done=True),
        ]
        self._items.append(whole)
        return events

    def _item_event(self, item: Item, done: bool) -> BaseModel:
        where: dict[str, Any] = {"item": item, "output_index": len(self._items), **self._next()}
        if done:
            return ResponseOutputItemDoneEvent.model_construct(
                type="response.output_item.done", **where
            )
        return ResponseOutputItemAddedEvent.model_construct(
            type="response.output_item.added", **where
        )

    def _part(self) -> ResponseOutputText:
        return ResponseOutputText.model_construct(
            annotations=[], text=self._text, type="output_text", logprobs=list(self._scores)
        )

    def _place(self) -> dict[str, Any]:
        """Where the growing message is."""
        item = self._message.id if self._message is not None else ""
        where = {"item_id": item, "output_index": len(self._items), "content_index": 0}
        return {**where, **self._next()}

    def _next(self) -> dict[str, Any]:
        self._number += 1
        return {"sequence_number": self._number - 1}

    def _score(self, token: SampledToken) -> Logprob:
        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            data = self.texts.bytes_of(token_id)
            text = data.decode(errors="replace")
            return {"token": text, "bytes": list(data), "logprob": logprob}

        others = [LogprobTopLogprob.model_construct(**entry(*o)) for o in token.top_logprobs]
        return Logprob.model_construct(**entry(token.token_id, token.logprob), top_logprobs=others)

    def _response(self, usage: CompletionUsage | None = None) -> Response:
        body = self.body
        cut = usage is not None and self._reason == "length"
        status = "in_progress" if usage is None else "incomplete" if cut else "completed"
        return Response.model_construct(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            model=self.model,
            output=list(self._items),
            parallel_tool_calls=body.parallel_tool_calls,
            previous_response_id=None,
            temperature=body.temperature,
            text=body.text,
            tool_choice=body.tool_choice,
            tools=list(body.tools),
            top_p=body.top_p,
            truncation="disabled",
            store=False,
            usage=None if usage is None else _usage(usage),
        )


def _usage(usage: CompletionUsage) -> ResponseUsage:
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details is not None else None) or 0
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
