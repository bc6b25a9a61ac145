"""Texts of many tenants in one batch: each is read as if alone, with its own adapter and its own classes."""

import threading

import pytest
import torch

from tests.serving.fakes import HEADED, QV, encode_alone, encoder, headed_adapter
from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.encoder import EncodeRequest

TEXTS = [
    "turn the light on",
    "a great film",
    "please",
    "set timer for ten minutes in the kitchen",
    "awful movie",
    "I love it",
]


def run(server, requests):
    for request in requests:
        server.submit(request)
    while server.scheduler.waiting or server.scheduler.running:
        server.step()


@pytest.mark.parametrize("batch_tokens", [8192, 12])
def test_every_text_is_read_as_if_alone(batch_tokens):
    """Adapters with two classes, with three, without a head, and nobody's: in few batches, or in many."""
    server = encoder(max_num_batched_tokens=batch_tokens)
    own = {
        1: (headed_adapter(HEADED, 1), 2),
        2: (headed_adapter(HEADED, 2), 2),
        3: (headed_adapter(HEADED, 3, labels=3), 3),
        4: (headed_adapter(QV, 4), 2),
        None: (None, 2),
    }
    asked = [
        (who, text, want)
        for text in TEXTS[:3]
        for who in own
        for want in (("logits", "embedding") if who and who < 4 else ("embedding",))
    ]
    requests = [
        EncodeRequest("t", server.encode(text), want, key=who, load=lambda who=who: own[who][0])
        for who, text, want in asked
    ]
    run(server, requests)
    for (who, text, want), request in zip(asked, requests, strict=True):
        found = torch.tensor(request.result())
        assert torch.allclose(
            found, encode_alone(own[who][0], text, want, own[who][1]), atol=1e-5
        ), (
            who,
            text,
            want,
        )
    assert len(requests[0].encoded["input_ids"]) > 0
    assert server.stats.finished["stop"] == len(asked)
    assert server.pool.pinned == 0


def test_what_cannot_be_read_is_said_and_fails_alone():
    server = encoder(rows=4, max_model_len=16)
    with pytest.raises(ConfigError, match="takes 16 here"):
        server.submit(EncodeRequest("t", server.encode("light " * 30)))
    with pytest.raises(UnsupportedError, match="no trained head"):
        server.submit(EncodeRequest("t", server.encode("light"), "logits"))
    own = headed_adapter(QV, 1)
    plain = EncodeRequest("t", server.encode("light"), "logits", key="plain", load=lambda: own)
    broken = EncodeRequest("t", server.encode("light"), key="broken", load=lambda: 1 / 0)
    fine = EncodeRequest("t", server.encode("light"), key="fine", load=lambda: own)
    run(server, [plain, broken, fine])
    with pytest.raises(UnsupportedError, match="has no head"):
        plain.result()
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert len(fine.result()) == 32


def test_a_slow_store_holds_up_nobody_else():
    server = encoder(rows=4)
    own = headed_adapter(QV, 1)
    there = threading.Event()
    server.start()
    late = server.submit(
        EncodeRequest("a", server.encode("light"), key="late", load=lambda: there.wait() and own)
    )
    for _ in range(5):
        server.submit(EncodeRequest("b", server.encode("please"))).result()
    assert late.finished_time is None
    there.set()
    assert len(late.result()) == 32
    server.close()
