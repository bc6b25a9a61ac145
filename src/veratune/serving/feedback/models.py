"""Records of feedback: examples that tenants sent, and what training on them gave."""

import dataclasses
from typing import Literal

Kind = Literal["correction", "up", "down"]
Outcome = Literal["published", "rejected", "refused"]
Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One piece of feedback.

    Attributes:
        id: Starts with "feedback-".
        tenant: Who sent it.
        adapter: The adapter that is trained on it.
        kind: A correction, or a rating: up or down.
        messages: The conversation; the last message is the wanted completion (for a rating down:
            the completion that was rated).
        held_out: Whether it is kept for the evaluation of candidates.
        created: Seconds since 1970.
        trained: Whether a training run has used it.
    """

    id: str
    tenant: str
    adapter: str
    kind: Kind
    messages: Messages
    held_out: bool
    created: float
    trained: bool


@dataclasses.dataclass(frozen=True)
class Due:
    """An adapter with enough new feedback.

    Attributes:
        tenant: Whose adapter.
        adapter: Its name.
        new: New examples that can be trained on or evaluated with.
    """

    tenant: str
    adapter: str
    new: int


@dataclasses.dataclass(frozen=True)
class FeedbackRun:
    """What one training run on feedback gave for one adapter.

    Attributes:
        tenant: Whose adapter.
        adapter: Its name.
        created: Seconds since 1970.
        outcome: "published"; "rejected" by the evaluation; or "refused" with a reason.
        before: Held-out loss of the version that was live.
        after: Held-out loss of the candidate.
        version: The published version; 0 for none.
        reason: Why it is not published.
    """

    tenant: str
    adapter: str
    created: float
    outcome: Outcome
    before: float | None = None
    after: float | None = None
    version: int = 0
    reason: str = ""
