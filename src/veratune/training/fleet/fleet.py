"""FleetTrainer: many adapters of one frozen base model, trained in the same batches.

All values of a tenant (d and b of every layer, and its head) are one row of a stacked tensor. A
step takes one batch of several tenants, packs their rows by length into few forward passes, and
updates the rows of those tenants alone. A and B are shared, so each tenant's gradient falls into
its own row:

    loss = Σ_t mean_{rows of t} loss(row)        ∂loss/∂values[t] comes from the rows of t alone
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from veratune.adapter import Adapter, extract
from veratune.attach import attach, detach
from veratune.basis.basis import Basis
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, UnsupportedError
from veratune.layers.wrapper import ModuleWrapper, replace_modules
from veratune.stacked import VectorLayout
from veratune.targets import find_sites
from veratune.tasks.base import Task
from veratune.tasks.data import small_dataset
from veratune.training.fleet.layers import TenantBatch, wrap
from veratune.training.fleet.losses import items_of, row_losses_of
from veratune.training.fleet.optimizer import StackedAdamW, clip_rows, schedule
from veratune.training.fleet.run import Example, TenantRun, pack, pass_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How a fleet trains. The defaults are those of `veratune train`.

    Attributes:
        lr, b_lr, head_lr: Peak learning rates of the vectors, of b (None: lr), and of heads (None:
            the task's own).
        weight_decay: Decoupled weight decay.
        max_grad_norm: Largest gradient norm of one tenant; 0 for none.
        lr_scheduler: "linear", "cosine" or "constant_with_warmup".
        warmup: Steps from 1 on, or a share of a tenant's steps below 1.
        max_active: Tenants whose values and optimizer state are in memory.
        max_batch_tokens: Padded tokens (or images) of one forward pass; 0 chooses by device.
        bfloat16: Whether matrix products run in bfloat16 by autocast.
    """

    lr: float = 1e-2
    b_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler: str = "linear"
    warmup: float = 0.06
    max_active: int = 256
    max_batch_tokens: int = 0
    bfloat16: bool = False


class FleetTrainer:
    """Tenants' values, their optimizer state, and the model that trains them.

    Args:
        model: The base model. Its layers are replaced until `close`.
        task: What the examples are; gives the loss, the heads and the metrics.
        config: How each tenant is adapted; one for all.
        processor: The task's tokenizer or image processor.
        options: Rates and sizes.
        basis: The matrices of a LoRA, for basis="lora".

    Raises:
        UnsupportedError: for layers, heads or tasks that cannot be trained in a mixed batch.

    Not thread-safe.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: VeraConfig,
        processor: Any,
        options: FleetOptions | None = None,
        basis: Basis | None = None,
    ) -> None:
        options = options or FleetOptions()
        if config.dropout:
            raise UnsupportedError(
                f"dropout is {config.dropout}, but a fleet has no adapter dropout; leave it out"
            )
        if config.dtype != "float32":
            raise UnsupportedError(
                f"dtype is {config.dtype!r}, but a fleet trains vectors in float32; leave it out"
            )
        self.model, self.task, self.options, self.processor = model, task, options, processor
        self.row_losses = row_losses_of(task, model)
        heads = config.head or task.heads(model)
        config = dataclasses.replace(config, head=heads)
        attach(model, config, "fleet", basis=basis)
        self.template = dataclasses.replace(extract(model, "fleet"), task=task.to_metadata())
        detach(model)
        self.basis = basis or self.template.basis
        model.requires_grad_(False)
        # The model without wrappers, over the same tensors: heads are initialised on it.
        self._plain: nn.Module = copy.deepcopy(
            model, {id(t): t for t in (*model.parameters(), *model.buffers())}
        )
        sites = find_sites(model, config)
        self.layout = VectorLayout(sites, config)
        self._heads = list(heads)
        self.holder = wrap(model, sites, self._heads, self.basis)
        self._device = next(model.parameters()).device
        self._head_size = sum(t.numel() for t in self.template.head.values())
        self.width = self.layout.size + self._head_size
        slots = options.max_active
        self.values = torch.zeros(slots, self.width, device=self._device)
        self.optimizer = StackedAdamW(slots, self.width, options.weight_decay, self._device)
        self._peak_rates = self._rates()
        self._schedule = schedule(options.lr_scheduler, options.warmup)
        collate: Callable[[list[Example]], dict[str, Tensor]] | None = task.collator(processor)
        if collate is None:
            raise UnsupportedError(
                f"task {task.name!r} is trained by another library's trainer, one adapter a run; "
                "use veratune train"
            )
        self._collate = collate
        self.free = list(range(slots - 1, -1, -1))

    def _rates(self) -> Tensor:
        """Peak learning rate of every value of a row, shape (width,)."""
        options = self.options
        rates = torch.full((self.width,), options.lr, device=self._device)
        if options.b_lr is not None:
            rates[: self.layout.size][self.layout.is_b().to(self._device)] = options.b_lr
        head_lr = self.task.head_lr if options.head_lr is None else options.head_lr
        rates[self.layout.size :] = head_lr
        return rates

    def _rates_of(self, factors: Tensor, scales: Tensor) -> Tensor:
        """Learning rates of some tenants, shape (k, width): a head's grows with its targets'
        spread.
        """
        rates = factors.unsqueeze(1) * self._peak_rates
        rates[:, self.layout.size :] *= scales.unsqueeze(1)
        return rates

    # ------------------------------------------------------------- tenants

    def row_of(self, adapter: Adapter | None) -> Tensor:
        """The row of an adapter, shape (width,); None gives the start of training.

        Raises:
            AdapterFileError: for an adapter of other layers, ranks, basis or heads.
        """
        template = self.template
        if adapter is None:
            vectors, head = self.layout.initial(), template.head
        else:
            same = adapter.fingerprint == template.fingerprint and adapter.shapes == template.shapes
            if not same or _sizes(adapter) != _sizes(template):
                raise AdapterFileError(
                    "the adapter to start from has other layers or another basis than this fleet; "
                    "train it with the same targets, rank and seed"
                )
            if {k: t.shape for k, t in adapter.head.items()} != {
                k: t.shape for k, t in template.head.items()
            }:
                raise AdapterFileError(
                    "the adapter to start from has another head than this fleet (other labels?)"
                )
            vectors, head = self.layout.pack(adapter.d, adapter.b), adapter.head
        flat = [head[name].float().flatten() for name in template.head]
        return torch.cat([vectors, *flat])

    def start(
        self, examples: Sequence[Example], stored: Adapter | None = None
    ) -> tuple[Tensor, float]:
        """A tenant's first row, and the spread of its targets (see `Task.init_head`).

        A new head starts from the tenant's own labels, as in `veratune train`.

        Args:
            examples: The tenant's encoded training examples.
            stored: An adapter to start from instead.
        """
        if not self._head_size:
            return self.row_of(stored), 1.0
        own = self._plain.state_dict(keep_vars=True)
        heads = {name: own[name] for name in self.template.head}
        with torch.no_grad():
            for name, tensor in heads.items():
                tensor.copy_(self.template.head[name])
        self.task.target_scale = 1.0
        labels = small_dataset({"labels": [example["labels"] for example in examples]})
        self.task.init_head(self._plain, labels)
        scale, self.task.target_scale = self.task.target_scale, 1.0
        if stored is not None:
            return self.row_of(stored), scale
        flat = [tensor.detach().float().cpu().flatten() for tensor in heads.values()]
        return torch.cat([self.layout.initial(), *flat]), scale

    def enter(self, slot: int, row: Tensor) -> None:
        """Put a tenant's start into a slot and clear its optimizer state."""
        self.values[slot] = row.to(self._device)
        self.optimizer.reset(slot)

    def adapter(self, row: Tensor) -> Adapter:
        """The adapter of a row, shape (width,)."""
        row = row.cpu()
        d, b = self.layout.unpack(row)
        sizes = [t.numel() for t in self.template.head.values()]
        parts = row[self.layout.size :].split(sizes) if sizes else ()
        head = {
            name: part.view(stored.shape).to(stored.dtype).clone()
            for (name, stored), part in zip(self.template.head.items(), parts, strict=True)
        }
        return dataclasses.replace(self.template, d=d, b=b, head=head)

    def _head_views(self, rows: Tensor) -> dict[str, list[dict[str, Tensor]]]:
        """Every tenant's head parameters as views into rows (k, width), by the head's path."""
        if not self._head_size:
            return {}
        stored = self.template.head
        parts = rows[:, self.layout.size :].split([t.numel() for t in stored.values()], dim=1)
        views: dict[str, list[dict[str, Tensor]]] = {}
        for path in self._heads:
            own = [
                (name.removeprefix(f"{path}."), part, stored[name])
                for name, part in zip(stored, parts, strict=True)
                if name.startswith(f"{path}.")
            ]
            views[path] = [
                {name: part[k].view(like.shape).to(like.dtype) for name, part, like in own}
                for k in range(len(rows))
            ]
        return views

    # ------------------------------------------------------------- training

    def step(self, runs: Sequence[TenantRun]) -> dict[str, str]:
        """One optimizer step of each of these tenants.

        Returns:
            Why a tenant could not take its step, by name: its loss or gradient is not finite. Its
            values are as before the step. All others have taken theirs.
        """
        start = time.perf_counter()
        slots = torch.tensor([run.slot for run in runs], device=self._device)
        rows = self.values.index_select(0, slots).requires_grad_()
        batches = [run.next_batch() for run in runs]
        losses = torch.zeros(len(runs), device=self._device)
        self.model.train()
        scales = torch.tensor([run.target_scale for run in runs], device=self._device)
        for _, loss, owner, _ in self._passes(batches, rows):
            (loss / scales[owner] ** 2).sum().backward()  # type: ignore[no-untyped-call]
            losses.index_add_(0, owner, loss.detach())
        assert rows.grad is not None
        norms = clip_rows(rows.grad, self.options.max_grad_norm)
        good = torch.isfinite(norms) & torch.isfinite(losses)
        factors = torch.tensor(
            [self._schedule(run.step, run.total_steps) for run in runs], device=self._device
        )
        keep = good.nonzero().squeeze(1)
        steps = torch.tensor([run.step + 1 for run in runs], device=self._device)
        self.optimizer.step(
            self.values,
            slots[keep],
            rows.grad[keep],
            steps[keep],
            self._rates_of(factors[keep], scales[keep]),
        )
        seconds = (time.perf_counter() - start) / len(runs)
        failed = {}
        for run, loss, fine in zip(runs, losses.tolist(), good.tolist(), strict=True):
            run.seconds += seconds
            if fine:
                run.step += 1
                run.loss_sum += loss
            else:
                failed[run.name] = (
                    f"the loss or its gradient is not finite at step {run.step + 1} (loss {loss}); "
                    "use a lower learning rate, or check this tenant's data"
                )
        return failed

    def evaluate(self, runs: Sequence[TenantRun]) -> dict[str, dict[str, float]]:
        """Scores of each tenant on its held-out examples, by name."""
        slots = torch.tensor([run.slot for run in runs], device=self._device)
        rows = self.values.index_select(0, slots)
        self.model.eval()
        batches = [list(run.held_out) for run in runs]
        losses = [0.0] * len(runs)
        outputs: list[list[tuple[int, np.ndarray]]] = [[] for _ in runs]
        with torch.no_grad():
            for positions, loss, owner, output in self._passes(batches, rows):
                for i, (k, value) in enumerate(zip(owner.tolist(), loss.tolist(), strict=True)):
                    losses[k] += value
                    if output is not None:
                        outputs[k].append((positions[i], output[i].float().cpu().numpy()))
        metrics = self.task.metrics()
        scores = {}
        for k, run in enumerate(runs):
            scores[run.name] = {"loss": losses[k]}
            if metrics is not None and outputs[k]:
                ordered = [value for _, value in sorted(outputs[k], key=lambda entry: entry[0])]
                labels = np.asarray([example["labels"] for example in batches[k]])
                prediction = EvalPrediction(predictions=np.stack(ordered), label_ids=labels)
                scores[run.name] |= metrics(prediction)
        return scores

    def _passes(self, batches: Sequence[Sequence[Example]], rows: Tensor) -> Any:
        """Forward passes over all examples, packed by length across tenants.

        Args:
            batches: Examples by tenant.
            rows: The tenants' values, shape (k, width).

        Yields:
            (positions within the tenant, weighted loss of each row, tenant of each row, row
            outputs).
        """
        owners = [k for k, batch in enumerate(batches) for _ in batch]
        places = [i for batch in batches for i in range(len(batch))]
        examples = [example for batch in batches for example in batch]
        items = [
            sum(items_of(self.task, example["labels"]) for example in batch) for batch in batches
        ]
        weights = torch.tensor([1.0 / max(1, items[k]) for k in owners], device=self._device)
        lengths = [len(example.get("input_ids", (0,))) for example in examples]
        limit = self.options.max_batch_tokens or pass_size(
            self._device.type, text=bool(examples) and "input_ids" in examples[0]
        )
        for chosen in pack(lengths, limit):
            inputs = {
                name: value.to(self._device)
                for name, value in self._collate([examples[i] for i in chosen]).items()
            }
            owner = torch.tensor([owners[i] for i in chosen], device=self._device)
            self.holder.batch = TenantBatch(owner, self.layout.split(rows), self._head_views(rows))
            try:
                with self._precision():
                    losses, output = self.row_losses(self.model, inputs)
                yield [places[i] for i in chosen], losses * weights[chosen], owner, output
            finally:
                self.holder.batch = None

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=self.options.bfloat16
        )

    def check_rows(self, examples: Sequence[Example]) -> None:
        """Prove on real examples that every row gets its own tenant's vectors.

        Two tenants with random vectors are run mixed and alone.

        Raises:
            UnsupportedError: if the results differ, so that this model cannot be trained as a
                fleet.
        """
        examples = list(examples[:4])
        if len(examples) < 2:
            return
        generator = torch.Generator().manual_seed(0)
        start = self.row_of(None).repeat(2, 1)
        start += 0.05 * torch.randn(start.shape, generator=generator)
        rows = start.to(self._device)
        split = [examples[::2], examples[1::2]]
        self.model.eval()
        with torch.no_grad():
            mixed = [0.0, 0.0]
            for _, loss, owner, _ in self._passes(split, rows):
                for k, value in zip(owner.tolist(), loss.tolist(), strict=True):
                    mixed[k] += value
            alone = [
                sum(float(loss.sum()) for _, loss, _, _ in self._passes([batch], rows[k : k + 1]))
                for k, batch in enumerate(split)
            ]
        tolerance = 2e-2 if self.options.bfloat16 else 1e-3
        if not np.allclose(mixed, alone, rtol=tolerance, atol=tolerance):
            raise UnsupportedError(
                f"{type(self.model).__name__} mixes the rows of a batch: two tenants together have "
                f"losses {mixed}, alone {alone}. Train them one by one with veratune train"
            )

    def close(self) -> None:
        """Give the model its own layers back."""
        replace_modules(
            self.model, lambda module: module.base if isinstance(module, ModuleWrapper) else module
        )


def _sizes(adapter: Adapter) -> list[dict[str, int]]:
    """The sizes of d and b by layer: they hold the ranks."""
    return [{name: len(v) for name, v in vectors.items()} for vectors in (adapter.d, adapter.b)]
