"""A real server in a thread, with adapters and keys, for tests over HTTP."""

import contextlib
import functools
import threading
import time

import httpx2 as httpx
import openai

from tests import fakes
from tests.serving.fakes import QV, adapter, encoder, generate_alone, small_llama
from veratune.formats import native
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.feedback.feedback import Feedback
from veratune.serving.feedback.repository import FILE, FeedbackRepository
from veratune.serving.http.app import create_app
from veratune.serving.http.config import HttpConfig
from veratune.serving.http.server import HttpServer, bind
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.jobs.servable import check_servable
from veratune.serving.keys import Keys
from veratune.serving.pool.pool import AdapterPool
from veratune.serving.service import Service
from veratune.serving.store.sqlite import SqliteStore

ADAPTERS = {name: adapter(small_llama, QV, i) for i, name in enumerate(("alice", "bob", "new"))}
FILES = {name: native.encode(made) for name, made in ADAPTERS.items()}


class RunningServer:
    """A server in a thread, with keys for two tenants.

    path: its folder; open: without keys; with_encoder: serve an encoder, too; jobs: models that can
    be trained; feedback: take feedback, too; config: of the scheduler; max_rank: of adapters;
    max_model_len: of the model; http: settings of HttpConfig.
    """

    def __init__(
        self,
        path,
        *,
        open=False,
        with_encoder=False,
        jobs=None,
        feedback=False,
        config=None,
        max_rank=None,
        max_model_len=128,
        **http,
    ):
        made = Keys(path / "keys.json")
        self.keys = Keys(None) if open else made
        self.key = {name: made.add((name,)) for name in ("ann", "ben")}
        self.key["both"] = made.add(("ann", "ben"))
        model = fakes.llama(max_position_embeddings=max_model_len)
        self.engine = Engine(
            model,
            fakes.tokenizer(),
            AdapterPool(model, slots=4, max_rank=max_rank),
            config=config or SchedulerConfig(max_num_seqs=4),
            max_model_len=max_model_len,
            prefix_cache_bytes=10**6,
        )
        self.store = SqliteStore(path / "adapters.db", lock_timeout=1.0)
        self.service = Service(
            self.store,
            self.engine,
            encoder() if with_encoder else None,
            served_model_name="base",
            served_encoder_name="reader",
        )
        for loop in self.service.loops.values():
            loop.start()
        self.jobs = None
        if jobs:
            self.jobs = Jobs(
                path / "jobs",
                jobs,
                self.service.put_if_changed,
                check_settings=functools.partial(check_servable, self.service.loops),
            )
            self.jobs.start()
        self.feedback = None
        if feedback:
            repository = FeedbackRepository(path / "jobs" / FILE)
            self.feedback = Feedback(repository, self.service, self.jobs)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.config = HttpConfig(**http)
        self.app = create_app(self.service, self.keys, self.jobs, self.config, self.feedback)
        self.server = HttpServer(
            self.app,
            self.service,
            shutdown_timeout=20,
            header_timeout=self.config.header_timeout,
        )
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def http(self, who="ann"):
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key[who]}"}, timeout=30
        )

    def openai(self, who="ann"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key[who], max_retries=0)

    @contextlib.contextmanager
    def held(self):
        """Inside the block the engine stands still."""
        gate, step = threading.Event(), self.engine.step
        self.engine.step = lambda: gate.wait() and step()
        try:
            yield
        finally:
            self.engine.step = step
            gate.set()

    @contextlib.contextmanager
    def slow(self, seconds):
        """Inside the block a step takes so long, and completions end at max_tokens alone."""
        step, ends = self.engine.step, self.engine.eos_token_ids
        self.engine.step = lambda: time.sleep(seconds) or step()
        self.engine.eos_token_ids = set()
        try:
            yield
        finally:
            self.engine.step, self.engine.eos_token_ids = step, ends

    def until_idle(self, seconds=20):
        end = time.time() + seconds
        while self.engine.scheduler.running and time.time() < end:
            time.sleep(0.02)
        assert self.engine.scheduler.running == 0

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        if self.feedback:
            self.feedback.close()
        if self.jobs:
            self.jobs.close()
        self.service.close()
        self.store.close()


def greedy(name, prompt, tokens=8):
    """What transformers' own generate completes with an adapter, up to its end token."""
    ids = generate_alone(small_llama, prompt, ADAPTERS.get(name), tokens)
    tokenizer = fakes.tokenizer()
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return tokenizer.decode(ids, skip_special_tokens=True)
