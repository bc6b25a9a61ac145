"""Many kinds of requests at once, while adapters change and clients leave: none is wrong or stuck."""

import json
import queue
import random
import threading

import jsonschema
import peft
import psutil
import pytest
import torch

from tests import fakes
from tests.serving.fakes import QV, adapter, generate_alone, small_llama
from tests.serving.http.fakes import ADAPTERS, FILES, RunningServer
from veratune.formats import native
from veratune.serving.engine.scheduler import SchedulerConfig

pytest.importorskip("llguidance", reason="structured output needs llguidance")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<tool_call>"
)
PROMPTS, TOKENS = [[5, 6, 7], [9], [4, 8, 4, 8, 4, 8, 4]], 6
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
    "required": ["on", "level"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "light", "parameters": SCHEMA}}
TALK = [{"role": "user", "content": "hi"}]
# What the adapter `new` is changed to and fro; it is read while it changes.
VERSIONS = [ADAPTERS["new"], adapter(small_llama, QV, 7)]
CLIENTS = 8


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A PEFT LoRA: its two files, and the text of each prompt's greedy completion."""
    folder = tmp_path_factory.mktemp("style")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(small_llama(), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        texts.append(text_of(out[0, len(prompt) :].tolist()))
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}, texts


def text_of(tokens):
    return fakes.tokenizer().decode(tokens)


@pytest.fixture(scope="module")
def answers(style):
    """(adapter, prompt) -> the texts that are right."""
    makers = {
        "base": [None],
        "alice": [ADAPTERS["alice"]],
        "bob": [ADAPTERS["bob"]],
        "new": VERSIONS,
    }
    found = {
        (name, i): {text_of(generate_alone(small_llama, p, own, TOKENS)) for own in owns}
        for name, owns in makers.items()
        for i, p in enumerate(PROMPTS)
    }
    found |= {("style", i): {text} for i, text in enumerate(style[1])}
    makers["style"] = []
    assert len({frozenset(found[name, 0]) for name in makers}) == len(
        makers
    )  # or none could be wrong
    return found


@pytest.fixture
def served(tmp_path, style):
    config = SchedulerConfig(max_num_seqs=4, max_queue=64)
    server = RunningServer(tmp_path, max_model_len=512, config=config)
    server.engine.tokenizer.chat_template = TEMPLATE
    with server.http() as http:
        for name in ("alice", "bob", "new"):
            assert http.put(f"/v1/adapters/{name}", content=FILES[name]).status_code == 201
        assert http.put("/v1/adapters/style", files=style[0]).status_code == 201
    server.engine.eos_token_ids = set()
    yield server
    server.stop()


class Client:
    """One client's requests, each drawn from the kinds below."""

    def __init__(self, served, answers, seed):
        self.client, self.http = served.openai(), served.http()
        self.answers, self.draw = answers, random.Random(seed)

    def completion(self):
        name, number = self.draw.choice(sorted(self.answers))
        prompt = PROMPTS[number]
        made = self.client.completions.create(
            model=name, prompt=prompt, max_tokens=TOKENS, temperature=0
        )
        text = made.choices[0].text
        return None if text in self.answers[name, number] else (name, number, text)

    def json(self):
        kind = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        }
        made = self.client.chat.completions.create(
            model=self.draw.choice(["alice", "bob", "base"]), messages=TALK, max_tokens=100,
            response_format=kind, seed=self.draw.randrange(10**6),
        )  # fmt: skip
        return self.checked(made.choices[0].finish_reason, made.choices[0].message.content)

    def tool(self):
        made = self.client.chat.completions.create(
            model=self.draw.choice(["alice", "bob", "base"]), messages=TALK, max_tokens=200,
            tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
            seed=self.draw.randrange(10**6),
        )  # fmt: skip
        (call,) = made.choices[0].message.tool_calls or [None]
        if call is None:
            return made.choices[0].finish_reason
        return self.checked("stop", call.function.arguments)

    def leave(self):
        stream = self.client.completions.create(
            model="alice", prompt=PROMPTS[0], max_tokens=100, stream=True
        )
        next(iter(stream))
        stream.close()

    def update(self):
        file = native.encode(self.draw.choice(VERSIONS))
        status = self.http.put("/v1/adapters/new", content=file).status_code
        return None if status in (200, 201) else f"update: {status}"

    @staticmethod
    def checked(reason, content):
        """None if the JSON is whole and valid."""
        try:
            jsonschema.validate(json.loads(content), SCHEMA)
        except (ValueError, jsonschema.ValidationError) as error:
            return reason, content, str(error)
        return None


KINDS = ["completion"] * 5 + ["json"] * 2 + ["tool"] * 2 + ["leave", "update"]


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_is_wrong_and_no_request_is_stuck(served, answers, count):
    waiting, wrong, done = queue.SimpleQueue(), [], []
    for kind in random.Random(0).choices(KINDS, k=count):
        waiting.put(kind)
    process, sizes = psutil.Process(), []

    def work(seed):
        client = Client(served, answers, seed)
        with client.client, client.http:
            while not waiting.empty():
                try:
                    kind = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    problem = getattr(client, kind)()
                except Exception as error:
                    problem = error
                done.append(kind)
                if problem is not None:
                    wrong.append((kind, problem))
                if len(done) % max(1, count // 10) == 0:
                    sizes.append((process.num_fds(), process.memory_info().rss))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(done) == count
    served.until_idle()
    assert served.engine.pool.pinned == 0
    print(
        f"descriptors {sizes[0][0]} to {sizes[-1][0]}, resident {sizes[0][1]:,} to {sizes[-1][1]:,}"
    )
    assert max(fds for fds, _ in sizes) <= sizes[0][0] + 4 * CLIENTS
    assert sizes[-1][1] <= sizes[0][1] + 200 * 2**20
