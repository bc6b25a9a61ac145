"""Many conversations at once: each gives exactly the tokens that it gives alone, whoever joins and leaves meanwhile."""

import dataclasses
import random
import threading

import pytest
import torch
import transformers

from tests import fakes
from tests.serving.fakes import (
    FAMILIES,
    GREEDY,
    QV,
    adapter,
    engine,
    generate_alone,
    run_all,
    small_llama,
)
from veratune.errors import ConfigError, QueueFullError, ShutdownError, UnsupportedError
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.engine.threads import run_in_temporary_thread
from veratune.serving.pool.pool import AdapterPool


@pytest.mark.parametrize("make", [small_llama, fakes.gpt2, *FAMILIES])
@pytest.mark.parametrize("chunk", [4, 256])
def test_every_conversation_is_as_if_alone(make, chunk):
    own = [None, *(adapter(make, QV, i) for i in range(3))]
    rng = random.Random(1)
    prompts = [
        [rng.randrange(3, 30) for _ in range(rng.choice((1, 3, 8, 9, 10, 17, 20)))]
        for _ in range(14)
    ]
    which = [rng.randrange(4) for _ in prompts]
    lengths = [rng.choice((1, 2, 7, 12)) for _ in prompts]
    requests = [
        GenerationRequest(
            "t",
            p,
            SamplingParams(temperature=0, max_tokens=n),
            key=w or None,
            load=lambda w=w: own[w],
        )
        for p, w, n in zip(prompts, which, lengths, strict=True)
    ]
    server = engine(make, rows=5, max_num_batched_tokens=chunk)
    server.eos_token_ids = set()
    answers, _ = run_all(server, requests)
    for prompt, w, n, answer in zip(prompts, which, lengths, answers, strict=True):
        wanted = generate_alone(make, prompt, own[w], n)
        assert answer[: len(wanted)] == wanted
        assert len(answer) == n
    assert server.stats.finished["length"] == 14
    assert server.stats.prompt_tokens == sum(map(len, prompts))
    assert server.runner.cache.lengths == [0] * 5
    assert server.pool.pinned == 0
    assert len(set(map(tuple, answers))) > 4


def test_the_same_prompt_under_two_adapters_never_crosses():
    one, two = adapter(small_llama, QV, 0), adapter(small_llama, QV, 1)
    prompt = [5, 6, 7]
    requests = [
        GenerationRequest("t", prompt, GREEDY, key=i % 2 + 1, load=lambda i=i: (one, two)[i % 2])
        for i in range(8)
    ]
    answers, _ = run_all(engine(), requests)
    wanted = [generate_alone(small_llama, prompt, own, 12) for own in (one, two)]
    assert wanted[0] != wanted[1]
    for i, answer in enumerate(answers):
        assert answer == wanted[i % 2][: len(answer)]


def test_completions_of_one_tenant_with_merged_weights_are_as_if_alone():
    own = adapter(small_llama, QV, 3)
    server = engine()
    server.pool.merged.max_bytes = 2**30
    server.eos_token_ids = set()
    prompts = [[5 + i, 6, 7 + i] for i in range(4)]
    requests = [
        GenerationRequest("a", prompt, GREEDY, key="k", load=lambda: own) for prompt in prompts
    ]
    tokens, _ = run_all(server, requests)
    assert len(server.pool.merged.layers) == len(own.shapes)
    for found, prompt in zip(tokens, prompts, strict=True):
        wanted = generate_alone(small_llama, prompt, own, GREEDY.max_tokens)  # ends at EOS
        assert found[: len(wanted)] == wanted
    server.close()


def test_one_request_fails_alone():
    good = adapter(small_llama, QV, 0)
    huge = adapter(small_llama, QV, 1)
    for b in huge.b.values():
        b.fill_(1e38)

    def broken():
        raise OSError("the store is gone")

    requests = [
        GenerationRequest("t", [4, 5], GREEDY, key="good", load=lambda: good), GenerationRequest("t", [4, 5], GREEDY, key="huge", load=lambda: huge),
        GenerationRequest("t", [4, 5], GREEDY, key="broken", load=broken), GenerationRequest("t", [4, 5], GREEDY),
    ]  # fmt: skip
    server = engine()
    answers, found = run_all(server, requests)
    assert answers[0] == generate_alone(small_llama, [4, 5], good, 12)[: len(answers[0])]
    assert isinstance(found[id(requests[1])][-1], UnsupportedError)
    assert isinstance(found[id(requests[2])][-1], OSError)
    assert answers[3] == generate_alone(small_llama, [4, 5], None, 12)[: len(answers[3])]
    assert server.stats.finished["error"] == 2


def test_what_a_failed_row_leaves_behind_reaches_nobody():
    """NaN in the memory of a row that is gone would be NaN for the next one in it, hidden tokens or not: 0 times NaN is NaN."""
    huge = adapter(small_llama, QV, 1)
    for b in huge.b.values():
        b.fill_(1e38)
    server = engine(rows=2)
    server.eos_token_ids = set()
    long, short = [4, 5, 6] * 10, [7, 8]
    _, found = run_all(
        server, [GenerationRequest("t", long, GREEDY, key="huge", load=lambda: huge)]
    )
    assert [type(answers[-1]) for answers in found.values()] == [UnsupportedError]
    answers, _ = run_all(
        server, [GenerationRequest("t", short, GREEDY), GenerationRequest("t", long, GREEDY)]
    )
    assert answers == [generate_alone(small_llama, prompt, None, 12) for prompt in (short, long)]


def test_prompts_of_like_length_are_read_together_and_a_tenant_who_asks_a_lot_does_not_hold_up_another():
    server = engine(rows=32, max_num_batched_tokens=64)
    server.eos_token_ids = set()
    many = [
        server.submit(
            GenerationRequest("a", [4 + i % 7] * 15, SamplingParams(temperature=0, max_tokens=60))
        )
        for i in range(30)
    ]
    server.step()
    assert (
        sum(request.first_token_time is not None for request in many) == 4
    )  # 4 times 15 tokens in a pass of 64
    one = server.submit(
        GenerationRequest("b", [5] * 15, SamplingParams(temperature=0, max_tokens=3))
    )
    while one.first_token_time is None:
        server.step()
    assert sum(request.first_token_time is not None for request in many) <= 16
    while one.finished_time is None:
        server.step()
    assert one.result() == server.tokenizer.decode(
        generate_alone(small_llama, [5] * 15, None, 3), skip_special_tokens=True
    )
    server.close()


def test_a_step_reads_prompts_of_unlike_length_in_several_passes_up_to_its_bound(monkeypatch):
    server = engine(rows=32, max_num_batched_tokens=100)
    server.eos_token_ids = set()
    passes, real = [], server.runner.run
    monkeypatch.setattr(
        server.runner,
        "run",
        lambda row, tokens, *rest, **options: (
            passes.append([len(own) for own in tokens]),
            real(row, tokens, *rest, **options),
        )[1],
    )
    for size in (60, 2, 2, 20, 90):
        server.submit(GenerationRequest("a", [5] * size, GREEDY))
    server.step()
    server.step()
    assert passes[:5] == [[60], [2, 2], [20], [1] * 4, [90]]  # 90 do not fit beside the others
    server.close()


def test_a_failing_pass_fails_its_rows_and_the_next_one_works(monkeypatch):
    server = engine()
    first = GenerationRequest("t", [4, 5], GREEDY)
    forward = server.model.forward
    monkeypatch.setattr(
        server.model,
        "forward",
        lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")),
    )
    _, found = run_all(server, [first])
    assert "out of memory" in str(found[id(first)][-1])
    monkeypatch.setattr(server.model, "forward", forward)
    answers, _ = run_all(server, [GenerationRequest("t", [4, 5], GREEDY)])
    assert answers[0] == generate_alone(small_llama, [4, 5], None, 12)[: len(answers[0])]


def test_cancelled_while_waiting_reading_and_answering():
    server = engine(rows=2, max_num_batched_tokens=2)
    requests = [
        GenerationRequest("t", [4] * 9, SamplingParams(temperature=0, max_tokens=50))
        for _ in range(4)
    ]
    ended = []
    for request in requests:
        request.on_output = lambda piece, request=request: ended.append(
            (request, getattr(piece, "finish_reason", None))
        )
        server.submit(request)
    server.step()
    server.cancel(requests[3])  # waits
    assert ended[-1] == (requests[3], "cancelled")
    server.cancel(requests[0])  # its prompt is being read
    server.step()
    assert (requests[0], "cancelled") in ended
    while not any(r is requests[1] for r, _ in ended):
        server.step()
    server.cancel(requests[1])  # it answers
    server.step()
    assert (requests[1], "cancelled") in ended
    while server.scheduler.running:
        server.step()
    assert server.stats.finished["cancelled"] == 3
    assert server.scheduler._tokens == 0


def test_a_seed_draws_the_same_answer_whoever_else_is_there():
    drawn = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=7, max_tokens=10)
    (first,), _ = run_all(engine(), [GenerationRequest("t", [4, 5], drawn)])
    others = [
        GenerationRequest("u", [6] * i, SamplingParams(temperature=1.0, max_tokens=9))
        for i in range(1, 5)
    ]
    answers, _ = run_all(engine(), [*others, GenerationRequest("t", [4, 5], drawn)])
    assert answers[-1] == first


def test_logprobs_are_those_of_the_model():
    request = GenerationRequest(
        "t", [4, 5, 6], SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    )
    _, found = run_all(engine(), [request])
    choice = found[id(request)][-1].token
    with torch.no_grad():
        logs = small_llama().eval()(torch.tensor([[4, 5, 6]])).logits[0, -1].log_softmax(-1)
    values, tokens = logs.topk(3)
    assert [token for token, _ in choice.top_logprobs] == tokens.tolist()
    assert [value for _, value in choice.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
    assert (choice.token_id, choice.logprob) == (
        tokens[0].item(),
        pytest.approx(values[0].item(), abs=1e-5),
    )


def test_a_penalty_knows_its_own_answer_alone():
    greedy = SamplingParams(temperature=0, max_tokens=12)
    penalised = dataclasses.replace(greedy, frequency_penalty=2.0, logit_bias=((7, 100.0),))
    (plain,), _ = run_all(engine(), [GenerationRequest("t", [4, 5], greedy)])
    (one, other, last), found = run_all(
        engine(),
        [
            asked := GenerationRequest("t", [4, 5], penalised),
            GenerationRequest("u", [4, 5], penalised),
            GenerationRequest("u", [4, 5], greedy),
        ],
    )
    assert (one, last) == (other, plain)
    assert [piece.token.token_id for piece in found[id(asked)]] == [
        7
    ] * 12  # a bias of 100 is over what twelve times take


def test_tokens_that_the_model_does_not_know_are_refused():
    made = engine()
    for prompt, bias in (([300], ()), ([-1], ()), ([1], ((300, 1.0),))):
        with pytest.raises(ConfigError, match="does not know; its own are 0 to 299"):
            made.submit(
                GenerationRequest("t", prompt, SamplingParams(max_tokens=8, logit_bias=bias))
            )


def test_a_stop_ends_an_answer(monkeypatch):
    server = engine()
    wanted = generate_alone(small_llama, [4, 5], None, 12)
    words = server.tokenizer.decode(wanted)
    stop = server.tokenizer.decode(wanted[3:4]).strip()
    if stop:
        request = GenerationRequest(
            "t", [4, 5], SamplingParams(temperature=0, max_tokens=12, stop=(stop,))
        )
        _, found = run_all(server, [request])
        said = "".join(piece.text for piece in found[id(request)])
        assert said == words[: words.index(stop)]
        assert found[id(request)][-1].finish_reason == "stop"


def test_a_thread_serves_and_goes_down():
    own = adapter(small_llama, QV, 0)
    server = engine()
    server.start()
    answers = {}

    def ask(i):
        request = server.submit(
            GenerationRequest(
                f"t{i % 3}", [4, 5, 3 + i], GREEDY, key="a" if i % 2 else None, load=lambda: own
            )
        )
        answers[i] = [piece.token.token_id for piece in request if piece.token]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in answers.items():
        assert (
            answer
            == generate_alone(small_llama, [4, 5, 3 + i], own if i % 2 else None, 12)[: len(answer)]
        )
    late = server.submit(GenerationRequest("t", [4], SamplingParams(temperature=0, max_tokens=100)))
    server.close(timeout=30)
    assert late.result() is not None
    with pytest.raises(ShutdownError, match="going down"):
        server.submit(GenerationRequest("t", [4], GREEDY))


def test_work_that_is_done_apart_leaves_no_thread_behind():
    thread = run_in_temporary_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        run_in_temporary_thread(lambda: 1 / 0)


def test_mistakes():
    server = engine(rows=1)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        server.submit(GenerationRequest("t", [], GREEDY))
    with pytest.raises(ConfigError, match="120 tokens of prompt and 12 of answer are over the 128"):
        server.submit(GenerationRequest("t", [4] * 120, GREEDY))
    server.scheduler.config = SchedulerConfig(max_num_seqs=1, max_queue=1)
    server.submit(GenerationRequest("t", [4], GREEDY))
    with pytest.raises(QueueFullError):
        server.submit(GenerationRequest("u", [4], GREEDY))
    for bad, match in (
        ({"temperature": 3.0}, "temperature is 3.0"), ({"top_p": 0.0}, "top_p is 0"), ({"max_tokens": -1}, "max_tokens is -1"),
        ({"stop": ("",)}, "up to 4 texts"), ({"logprobs": 99}, "logprobs is 99"), ({"temperature": float("nan")}, "temperature is nan"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            SamplingParams(**bad)
    model = small_llama()
    with pytest.raises(ConfigError, match="the pool has 2 slots and max_num_seqs is 32"):
        Engine(model, fakes.tokenizer(), AdapterPool(model, slots=2))


def test_models_that_the_engine_does_not_understand_are_refused(monkeypatch):
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    mamba = fakes.seeded(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()
    with pytest.raises(UnsupportedError, match="MambaForCausalLM cannot run a ragged batch"):
        Engine(mamba, fakes.tokenizer(), AdapterPool(mamba, slots=32))
    bloom = fakes.seeded(
        lambda: transformers.AutoModelForCausalLM.from_config(
            transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
        )
    )
    with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
        Engine(bloom, fakes.tokenizer(), AdapterPool(bloom, slots=32))
    model = small_llama()
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda position_ids=None, **k: forward(**k)
    )  # positions are not heard
    with pytest.raises(
        UnsupportedError,
        match="logits of LlamaForCausalLM in a ragged batch differ from the plain ones by",
    ):
        Engine(model, fakes.tokenizer(), AdapterPool(model, slots=32))


def test_everybody_is_told_when_a_server_goes_down():
    server = engine(rows=2)
    asked = [
        server.submit(GenerationRequest("t", [4, 5], SamplingParams(temperature=0, max_tokens=100)))
        for _ in range(7)
    ]
    server.step()
    server.close()
    for request in asked:
        with pytest.raises(ShutdownError, match="went down before"):
            request.result()
    assert (server.scheduler.running, server.scheduler.waiting) == (0, 0)
    with pytest.raises(ShutdownError, match="going down"):
        server.submit(asked[0])
