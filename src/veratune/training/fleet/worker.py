"""Worker: one process' tenants of a fleet, from their data to their adapters."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import set_seed

from veratune.adapter import Adapter
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, ConfigError, DataError
from veratune.formats import native
from veratune.tasks.base import Task
from veratune.training.fleet.checkpoint import ActiveState, read_state, write_state
from veratune.training.fleet.fleet import FleetOptions, FleetTrainer
from veratune.training.fleet.results import FleetResult, ResultLog, Totals, log_of
from veratune.training.fleet.run import Example, TenantRun, total_steps
from veratune.training.fleet.settings import FleetSettings
from veratune.training.fleet.tenants import TenantData, in_order, load_tenants, name_error
from veratune.training.prepare import build_task, report_unread_columns
from veratune.training.settings import TrainSettings


class Sink(Protocol):
    """Where finished adapters go."""

    def put(self, tenant: str, adapter: Adapter) -> int:
        """Store an adapter so that it survives a crash. Returns its bytes."""


class Source(Protocol):
    """Where tenants' stored adapters come from."""

    def get(self, tenant: str) -> Adapter | None:
        """A tenant's stored adapter, or None. Raises AdapterFileError for a damaged one."""


class AdapterFolder:
    """One file per tenant: FOLDER/alice.safetensors. A Sink and a Source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tenant: str, adapter: Adapter) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        return native.write(adapter, self.folder / f"{tenant}{native.SUFFIX}")

    def get(self, tenant: str) -> Adapter | None:
        path = self.folder / f"{tenant}{native.SUFFIX}"
        return native.read(path) if path.is_file() else None


Finished = Callable[[dict[str, Any], int, int], None]


class Worker:
    """One worker's tenants: admit, step, evaluate, finish."""

    def __init__(
        self,
        settings: TrainSettings,
        vera: VeraConfig,
        fleet: FleetSettings,
        sink: Sink,
        source: Source | None = None,
        finished: Finished | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.settings, self.fleet_settings = settings, fleet
        self.sink, self.source = sink, source
        self.finished = finished
        out = Path(settings.out)
        out.mkdir(parents=True, exist_ok=True)
        self.log = ResultLog(log_of(out, rank))
        self.state_file = out / f"active-{rank}.safetensors"
        self.task: Task = build_task(settings)
        self.data = load_tenants(settings.data, self.task, fleet.tenant_column, settings.split)
        self.held_out = self._load_held_out()
        self.names = list(in_order(self.data.names, rank, world))
        sample = self.data.sample(200)
        report_unread_columns(settings, self.task, sample)
        self.task.fit_labels(sample)
        self.processor = self.task.load_processor(settings.model)
        options = fleet_options(settings, fleet)
        self.fleet = FleetTrainer(self._load_model(), self.task, vera, self.processor, options)
        evaluates = self.held_out is not None or fleet.eval_fraction > 0
        if settings.keep == "best" and not evaluates:
            raise ConfigError(
                "keep is 'best', but there is nothing to evaluate on; give --eval-data or "
                "--eval-fraction, or leave keep out"
            )
        self.best_rows = (
            torch.zeros_like(self.fleet.values) if evaluates and settings.keep != "last" else None
        )
        self.population = native.read(settings.start_adapter) if settings.start_adapter else None
        self.active: collections.deque[TenantRun] = collections.deque()
        self.totals = Totals()
        self.checked = False

    def _load_model(self) -> nn.Module:
        settings = self.settings
        set_seed(settings.seed)
        model = self.task.load_model(
            settings.model, self.processor, dtype=settings.base_dtype, quantize=settings.quantize
        )
        if _on_gpu(settings) and settings.quantize is None:
            model.cuda()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return model

    def _load_held_out(self) -> TenantData | None:
        settings, column = self.settings, self.fleet_settings.tenant_column
        if settings.eval_data is not None:
            return load_tenants(settings.eval_data, self.task, column, settings.eval_split)
        if self.task.has_split(settings.data, settings.eval_split):
            return load_tenants(settings.data, self.task, column, settings.eval_split)
        return None

    def run(self) -> FleetResult:
        start = saved = time.monotonic()
        waiting = self._admissions()
        more = True
        while True:
            while more and len(self.active) < self.fleet_settings.max_active:
                run = next(waiting, None)
                more = run is not None
                if run is not None:
                    self.active.append(run)
            if not self.active:
                break
            self._turn()
            if time.monotonic() - saved >= self.fleet_settings.checkpoint_seconds:
                self._checkpoint()
                saved = time.monotonic()
        self.state_file.unlink(missing_ok=True)
        self.fleet.close()
        return FleetResult(
            out=self.settings.out,
            tenants=len(self.names),
            **dataclasses.asdict(self.totals),
            seconds=time.monotonic() - start,
            logs=(self.log.path,),
        )

    def _turn(self) -> None:
        """A step of the tenants that waited longest."""
        count = min(len(self.active), self.fleet_settings.tenants_per_step)
        turn = [self.active.popleft() for _ in range(count)]
        fresh = [run for run in turn if run.step == 0 and run.held_out and not run.before]
        if fresh:
            scores = self.fleet.evaluate(fresh)
            for run in fresh:
                run.before = scores[run.name]
        failed = self.fleet.step(turn)
        stepped = [run for run in turn if run.name not in failed]
        due = [run for run in stepped if run.held_out and self._evaluates_now(run)]
        stopped = self._judge(due) if due else set()
        for run in turn:
            if run.name in failed:
                self._refuse(run.name, failed[run.name], run)
            elif run.done or run.name in stopped:
                self._finish(run)
            else:
                self.active.append(run)

    def _evaluates_now(self, run: TenantRun) -> bool:
        """Whether scores are due: after each epoch, or at the end if nothing is chosen by them."""
        chosen = self.best_rows is not None or self.settings.patience
        return run.at_epoch_end if chosen else run.done

    def _judge(self, runs: list[TenantRun]) -> set[str]:
        """Evaluate tenants at the end of an epoch. Returns those whose patience has ended."""
        metric, greater = self.task.metric, self.task.greater_is_better
        stopped = set()
        evaluated = self.fleet.evaluate(runs)
        for run in runs:
            scores = evaluated[run.name]
            score = scores.get(metric, scores["loss"])
            better = run.best is None or (score > run.best if greater else score < run.best)
            if better:
                run.best, run.best_step, run.bad_evaluations = score, run.step, 0
                if self.best_rows is not None:
                    self.best_rows[run.slot] = self.fleet.values[run.slot]
            else:
                run.bad_evaluations += 1
            if better or self.best_rows is None:
                run.after = scores
            if self.settings.patience and run.bad_evaluations >= self.settings.patience:
                stopped.add(run.name)
        return stopped

    # ------------------------------------------------------------- tenants in and out

    def _admissions(self) -> Iterator[TenantRun]:
        """Tenants that are not finished, encoded one after the other as slots become free."""
        finished = set()
        for line in self.log.open():
            self.totals.add(line)
            finished.add(line["tenant"])
        kept = read_state(self.state_file, self.fleet.width) if self.settings.resume else {}
        for name in self.names:
            if name in finished:
                continue
            try:
                run = self._admit(name, kept.get(name))
            except (DataError, AdapterFileError) as error:
                self._refuse(name, str(error))
                continue
            yield run

    def _admit(self, name: str, kept: ActiveState | None) -> TenantRun:
        settings = self.settings
        reason = name_error(name)
        if reason is not None:
            raise DataError(reason)
        examples, held_out = self._examples(name)
        if not examples:
            raise DataError(f"tenant {name!r} has no example that fits into max_length")
        if not self.checked:
            self.fleet.check_rows(examples)
            self.checked = True
        run = TenantRun(
            name=name,
            slot=-1,
            examples=examples,
            held_out=held_out,
            batch_size=settings.batch_size,
            total_steps=total_steps(
                len(examples), settings.batch_size, settings.epochs, settings.max_steps
            ),
            seed=settings.seed,
        )
        start, run.target_scale = self.fleet.start(examples, self._stored(name))
        run.slot = self.fleet.free.pop()
        self.fleet.enter(run.slot, start if kept is None else kept.values)
        if kept is not None:
            for key, value in kept.run.items():
                setattr(run, key, value)
            self.fleet.optimizer.exp_avg[run.slot] = kept.exp_avg
            self.fleet.optimizer.exp_avg_sq[run.slot] = kept.exp_avg_sq
            if self.best_rows is not None and kept.best is not None:
                self.best_rows[run.slot] = kept.best
        return run

    def _stored(self, name: str) -> Adapter | None:
        """The adapter that a tenant starts from, if any."""
        stored = None if self.source is None else self.source.get(name)
        return self.population if stored is None else stored

    def _examples(self, name: str) -> tuple[list[Example], list[Example]]:
        """A tenant's encoded training and evaluation examples."""
        fleet = self.fleet_settings
        rows = self.data.examples(name)
        if fleet.max_examples:
            rows = rows.select(range(min(len(rows), fleet.max_examples)))
        if not len(rows):
            raise DataError(f"tenant {name!r} has no examples")
        held_out: list[Example] = []
        if self.held_out is not None:
            if name in self.held_out:
                held_out = self._encode(self.held_out.examples(name), training=False)
        elif fleet.eval_fraction:
            count = round(len(rows) * fleet.eval_fraction)
            if count and count < len(rows):
                order = torch.randperm(
                    len(rows), generator=torch.Generator().manual_seed(self.settings.seed)
                ).tolist()
                held_out = self._encode(rows.select(sorted(order[:count])), training=False)
                rows = rows.select(sorted(order[count:]))
        return self._encode(rows, training=True), held_out

    def _encode(self, rows: Any, training: bool) -> list[Example]:
        return list(self.task.encode(rows, self.processor, training=training))

    def _finish(self, run: TenantRun) -> None:
        row = self.fleet.values[run.slot]
        if self.best_rows is not None and run.best is not None:
            row = self.best_rows[run.slot]
        size = self.sink.put(run.name, self.fleet.adapter(row))
        self._leave(
            run,
            {
                "tenant": run.name,
                "status": "trained",
                "examples": len(run.examples),
                "held_out": len(run.held_out),
                "steps": run.step,
                "best_step": run.best_step or run.step,
                "loss": run.loss_sum / max(1, run.step),
                "before": run.before,
                "after": run.after,
                "bytes": size,
                "seconds": round(run.seconds, 3),
            },
        )

    def _refuse(self, name: str, reason: str, run: TenantRun | None = None) -> None:
        if self.fleet_settings.strict:
            raise DataError(f"tenant {name!r}: {reason}")
        self._leave(run, {"tenant": name, "status": "refused", "reason": reason})

    def _leave(self, run: TenantRun | None, line: dict[str, Any]) -> None:
        if run is not None:
            self.fleet.free.append(run.slot)
        self.log.add(line)
        self.totals.add(line)
        if self.finished is not None:
            self.finished(line, self.totals.finished, len(self.names))

    def _checkpoint(self) -> None:
        optimizer = self.fleet.optimizer
        write_state(
            self.state_file,
            list(self.active),
            {
                "values": self.fleet.values,
                "exp_avg": optimizer.exp_avg,
                "exp_avg_sq": optimizer.exp_avg_sq,
            },
            self.best_rows,
        )


def fleet_options(settings: TrainSettings, fleet: FleetSettings) -> FleetOptions:
    """The numeric options of a run's settings."""
    auto = settings.mixed_precision == "auto" and settings.base_dtype == "bfloat16"
    return FleetOptions(
        lr=settings.lr,
        b_lr=settings.b_lr,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler=settings.lr_scheduler,
        warmup=settings.warmup_steps or settings.warmup_ratio,
        max_active=fleet.max_active,
        max_batch_tokens=fleet.max_batch_tokens,
        bfloat16=settings.mixed_precision == "bf16" or (auto and _on_gpu(settings)),
    )


def _on_gpu(settings: TrainSettings) -> bool:
    return torch.cuda.is_available() and settings.device != "cpu"
