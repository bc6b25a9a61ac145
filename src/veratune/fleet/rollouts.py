"""GRPO rollouts by the serving engine, in the process that trains."""

import itertools
import sys
import time
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veratune.adapter import extract
from veratune.selection import reference
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.pool.pool import AdapterPool
from veratune.tasks.text.chat_template import render
from veratune.tasks.text.grpo import ROLLOUTS, Grpo
from veratune.tasks.text.pairs import Messages

_MAX_NUM_SEQS = 64
_TENANT = "rollouts"


def register() -> None:
    """Make `--rollouts engine` known to task grpo."""
    ROLLOUTS["engine"] = EngineRollouts


class EngineRollouts:
    """Rollouts by continuous batching: a completion that ends makes room for the next one.

    The engine runs a module of its own, which shares all base weights with the model in training.
    Each call puts the present values of d and b into a slot of the engine's pool.
    """

    def bind(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Grpo) -> None:
        """Make the engine for a run.

        Args:
            model: The model in training, with its adapter.
            tokenizer: Its tokenizer.
            task: Gives the lengths, the temperature, and prompts their chat template.

        Raises:
            UnsupportedError: The engine cannot run the model or its adapter.
        """
        self.tokenizer, self.task, self.calls = tokenizer, task, itertools.count()
        twin = cast(PreTrainedModel, reference(model))
        pool = AdapterPool(twin, _MAX_NUM_SEQS)
        pool.check(extract(model))
        self.engine = Engine(
            twin,
            tokenizer,
            pool,
            # Nobody else asks: no bound on what waits.
            config=SchedulerConfig(
                max_num_seqs=_MAX_NUM_SEQS,
                max_queue=sys.maxsize,
                max_queue_per_tenant=sys.maxsize,
                max_total_tokens=sys.maxsize,
            ),
            max_model_len=task.max_length + task.max_completion_length,
        )

    def __call__(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """Complete prompts with the model in training, as TRL's rollout functions do."""
        adapter = extract(trainer.adapted)
        key = (_TENANT, next(self.calls))
        requests = []
        for prompt in prompts:
            text = render(prompt, self.tokenizer, add_generation_prompt=True)
            sampling = SamplingParams(
                max_tokens=self.task.max_completion_length,
                temperature=self.task.temperature,
                # Torch's generator is part of a checkpoint: a resumed run draws the same seeds.
                seed=int(torch.randint(2**31, ())),
            )
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            requests.append(
                GenerationRequest(
                    _TENANT, tokens=tokens, sampling=sampling, key=key, load=lambda: adapter
                )
            )
        for request in requests:
            self.engine.submit(request)
        while any(request.finished_time is None for request in requests):
            if not self.engine.step():
                time.sleep(1e-3)  # the adapter is on its way to its slot
        for request in requests:
            list(request)  # raises the error of one that failed
        self.engine.forget(key)
        return {
            "prompt_ids": [list(request.tokens) for request in requests],
            "completion_ids": [_completion(request) for request in requests],
            "logprobs": None,  # TRL computes them where it needs them
        }


def _completion(request: GenerationRequest) -> list[int]:
    """A completion's tokens, with the one that ended it."""
    end = [] if request.end_token_id is None else [request.end_token_id]
    return [*request.output_token_ids, *end]
