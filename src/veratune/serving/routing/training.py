"""What happens when a training run has published an adapter: its inputs are embedded for "auto"."""

import logging
from collections.abc import Callable, Sequence

from veratune.serving.feedback.models import Example
from veratune.serving.routing.examples import training_texts, user_texts
from veratune.serving.routing.router import Router

log = logging.getLogger(__name__)


def embed_training_file(router: Router) -> Callable[[str, str, bytes], str]:
    """The `TrainableModel.on_published` of a causal model.

    Args:
        router: Stores the embeddings.
    """

    def embed(tenant: str, adapter: str, data: bytes) -> str:
        return router.put_training_data(tenant, adapter, training_texts(data))

    return embed


def embed_feedback(router: Router) -> Callable[[str, str, Sequence[Example]], None]:
    """The `on_published` of a FeedbackTrainer.

    Args:
        router: Stores the embeddings.
    """

    def embed(tenant: str, adapter: str, examples: Sequence[Example]) -> None:
        texts = [text for example in examples for text in user_texts(example.messages)[:1]]
        said = router.put_training_data(tenant, adapter, texts)
        log.info("adapter %s of %s: %s", adapter, tenant, said)

    return embed
