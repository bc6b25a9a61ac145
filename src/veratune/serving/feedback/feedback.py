"""Feedback: what clients may do with examples, and the deletion of all that a tenant has stored."""

from veratune.errors import DataError, UnsupportedError
from veratune.serving.feedback.models import Example, FeedbackRun, Kind, Messages
from veratune.serving.feedback.repository import FeedbackRepository
from veratune.serving.feedback.trainer import FeedbackTrainer
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.keys import Caller
from veratune.serving.mixes import is_mix
from veratune.serving.service import Service

DEFAULT_ADAPTER = "personal"  # trained on feedback about the base model
MAX_MESSAGES = 64
MAX_CHARACTERS = 32_768


class Feedback:
    """Feedback of all tenants of one server. Methods may be called from any thread."""

    def __init__(
        self,
        repository: FeedbackRepository,
        service: Service,
        jobs: Jobs,
        trainer: FeedbackTrainer | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            repository: Keeps the examples.
            service: Knows models and adapters.
            jobs: The fine-tuning jobs, for the deletion of a tenant.
            trainer: Trains when there are enough examples; None: a command does.
        """
        self.repository, self.service, self.jobs = repository, service, jobs
        self.trainer = trainer

    def start(self) -> None:
        """Train when there are enough examples, until `close`."""
        if self.trainer is not None:
            self.trainer.start()

    def close(self) -> None:
        """Stop, and close the database."""
        if self.trainer is not None:
            self.trainer.close()
        self.repository.close()

    def add(
        self, caller: Caller, model: str, messages: Messages, rating: str, correction: str
    ) -> Example:
        """Store one piece of feedback.

        Args:
            caller: Who sends it.
            model: The base model's name, for the adapter "personal"; or an adapter's name.
            messages: The conversation. Its last message is the completion; with a correction it may
                be the user's.
            rating: "up", "down", or "" for a correction.
            correction: The wanted completion, which replaces the conversation's; "" for a rating.

        Raises:
            DataError: The conversation is too long, or has nothing to learn.
            AdapterNotFoundError: There is no such model, or it is another tenant's.
            UnsupportedError: The model does not generate.
            QueueFullError: The tenant has too many examples.
        """
        if model not in self.service.loops and is_mix(model):
            raise UnsupportedError("a mix is not trained; name one of its adapters for feedback")
        ref = self.service.find_adapter(caller, model)
        if ref is None and self.service.loops[model] is not self.service.engine:
            raise UnsupportedError(f"the model {model!r} does not generate, so it has no feedback")
        if bool(rating) == bool(correction):
            raise DataError("either a rating or a correction is wanted")
        if correction:
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            messages = [*asked, {"role": "assistant", "content": correction}]
        if len(messages) > MAX_MESSAGES:
            raise DataError(f"{len(messages)} messages; at most {MAX_MESSAGES} are wanted")
        size = sum(len(message["content"]) for message in messages)
        if size > MAX_CHARACTERS:
            raise DataError(f"{size:,} characters; at most {MAX_CHARACTERS:,} are wanted")
        if len(messages) < 2 or [m["role"] for m in messages[-2:]] != ["user", "assistant"]:
            raise DataError("a user's message and its completion are wanted at the end")
        if not messages[-1]["content"].strip():
            raise DataError("the completion has no text to learn")
        tenant, adapter = (
            (caller.tenant, DEFAULT_ADAPTER) if ref is None else (ref.tenant, ref.name)
        )
        kind: Kind = "correction" if correction else "up" if rating == "up" else "down"
        return self.repository.add(tenant, adapter, kind, messages)

    def examples(self, tenant: str, after: str, limit: int) -> list[Example]:
        """A tenant's examples, newest first."""
        return self.repository.examples(tenant, after, limit)

    def delete(self, tenant: str, example: str) -> None:
        """Delete an example. Raises JobNotFoundError."""
        self.repository.delete(tenant, example)

    def runs(self, tenant: str, limit: int) -> list[FeedbackRun]:
        """What training on a tenant's feedback gave, newest first."""
        return self.repository.runs(tenant, limit)

    def delete_tenant(self, tenant: str) -> dict[str, int]:
        """Delete all that a tenant has stored: feedback, files, jobs, and adapters' bytes.

        Names and version numbers of its adapters stay as tombstones, so that a number is never
        used again. Training that uses the tenant's data is ended first.

        Returns:
            What was deleted, by kind.

        Raises:
            StoreError: Something could not be deleted; calling again goes on.
        """
        trainer = self.trainer
        examples = (trainer or self.repository).delete_tenant(tenant)
        jobs, files = self.jobs.delete_tenant(tenant)
        adapters = 0
        while entries := self.service.store.list_adapters(tenant):
            for entry in entries:
                self.service.delete(tenant, entry.name)
                adapters += 1
        self.service.forget_tenant(tenant)
        self.service.store.scrub()
        return {"feedback": examples, "jobs": jobs, "files": files, "adapters": adapters}
