"""Method: what a run trains. VeRA, and what it is compared with, on one loop and the same batches.

Method (abstract)
├── Vera     the vectors of an adapter, and the head; the file is the adapter's
└── BaselineMethod    parameters of the model itself: all, biases, or those of a baseline
"""

import abc
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from veratune.adapter import Adapter, extract, install, update
from veratune.attach import attach
from veratune.basis.basis import Basis
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, ConfigError, VeratuneError, near
from veratune.formats import native
from veratune.formats.atomic import write_atomic
from veratune.inference.adapted import ADAPTER_NAME
from veratune.model_state import heads_of, set_task_metadata, vectors_of
from veratune.targets import find_heads, find_sites
from veratune.training.baselines.adalora import AdaLoraCallback
from veratune.training.baselines.modules import NAME as BASELINE_MODULE
from veratune.training.baselines.registry import BASELINES, add_baseline


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Peak learning rates: adapter (d and b, or what else the method trains), of the head, of b
    where it has its own.
    """

    adapter: float
    head: float
    b: float | None = None


class Method(abc.ABC):
    """One way to train a model. `file` is the name of what it writes; callbacks: what it wants to
    do while the model is trained.
    """

    file: ClassVar[str]
    callbacks: Sequence[TrainerCallback] = ()

    @abc.abstractmethod
    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Mapping[str, Any]) -> None:
        """Change the model in place: freeze, add, and ask for gradients. heads: modules trained in
        full, by path.
        """

    @abc.abstractmethod
    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters trained at the head's learning rate."""

    def adapter_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters trained at the vectors' learning rate: all others that require gradients."""
        head = {id(p) for p in self.head(model)}
        return [p for p in model.parameters() if p.requires_grad and id(p) not in head]

    def groups(
        self, model: nn.Module, rates: LearningRates
    ) -> list[tuple[list[nn.Parameter], float]]:
        """Everything that is trained, with its learning rate."""
        return [(self.adapter_parameters(model), rates.adapter), (self.head(model), rates.head)]

    @abc.abstractmethod
    def write(self, model: nn.Module, folder: Path, is_main: bool = True) -> int:
        """Write what was trained into a folder, if it is this process' turn. Returns the file's
        bytes.
        """

    @abc.abstractmethod
    def read(self, model: nn.Module, folder: Path) -> None:
        """Take it back out of a folder."""

    @abc.abstractmethod
    def check(self, folder: Path) -> None:
        """Raise VeratuneError or OSError where a folder's file is not whole."""


class VeraMethod(Method):
    """VeRA as `config` says, on a basis of the user's where one is given."""

    file = "adapter.safetensors"

    def __init__(
        self, config: VeraConfig, basis: Basis | None = None, start: Adapter | None = None
    ) -> None:
        """Bind the method to a configuration.

        Args:
            config: The adapter's configuration; that of `start` where there is one.
            basis: A basis of the user's.
            start: An adapter whose values training starts from.
        """
        self.config, self.basis, self.start = config, basis, start

    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Mapping[str, Any]) -> None:
        if self.start is not None:
            self._install_start(model, self.start, heads)
            set_task_metadata(model, ADAPTER_NAME, task)
            return
        config = dataclasses.replace(self.config, head=heads)
        if self.basis is None:
            check_basis_memory(model, config)
        attach(model, config, ADAPTER_NAME, basis=self.basis)
        set_task_metadata(model, ADAPTER_NAME, task)

    def _install_start(self, model: nn.Module, start: Adapter, heads: tuple[str, ...]) -> None:
        """Put the starting adapter into the model, ready for training."""
        stored = {name.rpartition(".")[0] for name in start.head}
        missing = [path for path in heads if not any(h.startswith(path) for h in stored)]
        if missing:
            raise ConfigError(
                f"the task trains '{missing[0]}' in full, which the adapter to start from does not "
                "hold; leave --start-adapter out, or start from an adapter of the same task"
            )
        install(model, start, ADAPTER_NAME, trainable=True, basis=self.basis)

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for module in heads_of(model, ADAPTER_NAME).values() for p in module.parameters()]

    def adapter_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for v in vectors_of(model, ADAPTER_NAME) for p in v.parameters()]

    def groups(
        self, model: nn.Module, rates: LearningRates
    ) -> list[tuple[list[nn.Parameter], float]]:
        if rates.b is None:
            return super().groups(model, rates)
        named = [
            (name, p) for v in vectors_of(model, ADAPTER_NAME) for name, p in v.named_parameters()
        ]
        d, b = ([p for name, p in named if name == which] for which in ("d", "b"))
        return [(d, rates.adapter), (b, rates.b), (self.head(model), rates.head)]

    def write(self, model: nn.Module, folder: Path, is_main: bool = True) -> int:
        adapter = extract(model, ADAPTER_NAME)  # every process: a sharded adapter is gathered here
        return native.write(adapter, folder / self.file) if is_main else 0

    def read(self, model: nn.Module, folder: Path) -> None:
        update(model, native.read(folder / self.file), ADAPTER_NAME)

    def check(self, folder: Path) -> None:
        native.read(folder / self.file)


class BaselineMethod(Method):
    """Parameters of the model itself. The file holds them by name, and the head's batch
    statistics.
    """

    file = "trained.safetensors"

    def __init__(self, method: str, config: VeraConfig, options: Mapping[str, Any]) -> None:
        """method: as `build_method` knows it, but vera; config: its targets are those of LoRAs;
        options: the method's own settings.
        """
        self.method, self.config, self.options = method, config, dict(options)
        self.callbacks: list[TrainerCallback] = []
        self._heads: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Mapping[str, Any]) -> None:
        self._heads = heads
        if self.method == "head" and not heads:
            raise ConfigError(
                "method is 'head', but the task has no output of its own to train; use another "
                "method"
            )
        for parameter in model.parameters():
            parameter.requires_grad_(
                self.method == "full" and parameter.requires_grad
            )  # what came frozen stays so
        if self.method == "bitfit":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.rpartition(".")[2] in ("bias", "in_proj_bias"))
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ConfigError(
                    f"{type(model).__name__} has no biases, so method 'bitfit' would train nothing "
                    "beside the head; use method vera or head"
                )
        elif self.method in BASELINES:
            add_baseline(self.method, model, self.config, self.options)
        elif self.method.startswith("peft:"):
            self._inject(model)
        for parameter in self.head(model):
            parameter.requires_grad_(True)

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for _, module in find_heads(model, self._heads) for p in module.parameters()]

    def write(self, model: nn.Module, folder: Path, is_main: bool = True) -> int:
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._state(model).items()}
        data = safetensors.torch.save(tensors, {"method": self.method})
        if is_main:
            write_atomic(folder / self.file, data)
        return len(data) if is_main else 0

    def read(self, model: nn.Module, folder: Path) -> None:
        stored, own = safetensors.torch.load_file(folder / self.file), self._state(model)
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in own.items()}:
            raise AdapterFileError(
                f"{folder / self.file}: its tensors are not those that {self.method} trains on "
                "this model"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])

    def check(self, folder: Path) -> None:
        try:
            with safetensors.safe_open(folder / self.file, "pt") as file:
                file.keys()
        except safetensors.SafetensorError as error:
            raise AdapterFileError(
                f"{folder / self.file}: not a whole safetensors file ({error})"
            ) from None

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """Trained parameters and their batch statistics by name, each tensor once."""
        kept: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        whole = [("", model)] if self.method == "full" else find_heads(model, self._heads)
        for path, module in whole:
            kept |= {
                f"{path}.{name}".lstrip("."): buffer
                for name, buffer in module.named_buffers()
                if buffer is not None
            }
        return kept | {
            name: buffer for name, buffer in model.named_buffers() if f".{BASELINE_MODULE}." in name
        }

    def _inject(self, model: nn.Module) -> None:
        import peft

        kinds = {
            kind.value.lower(): made
            for kind, made in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()
        }
        name = self.method.removeprefix("peft:").lower()
        if name not in kinds:
            raise ConfigError(
                "PEFT has no method "
                f"{name!r}{near(name, kinds) or '; it has ' + ', '.join(sorted(kinds))}"
            )
        paths = list(dict.fromkeys(site.module for site in find_sites(model, self.config)))
        own: dict[str, Any] = {"target_modules": "|".join(map(re.escape, paths))}
        if name == "adalora":
            own["total_step"] = 10**9  # known when training begins
        try:
            config = kinds[name](**own | self.options)
            if config.is_prompt_learning:
                raise TypeError("it adds tokens, and no parameters to the model's layers")
            tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](  # type: ignore[index]
                model, config, "default"
            )
            if name == "adalora":
                self.callbacks.append(
                    AdaLoraCallback(model, tuner, bool({"tinit", "tfinal"} & set(self.options)))
                )
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"PEFT refuses {self.method} with {self.options}: {' '.join(str(error).split())}"
            ) from error


def check_basis_memory(model: nn.Module, config: VeraConfig) -> None:
    """Refuse a rank whose frozen matrices A and B need more than the machine's memory.

    Args:
        model: The base model.
        config: The adapter's configuration.

    Raises:
        ConfigError: A and B do not fit; the message names the rank and both sizes.
    """
    if config.basis == "lora":
        return
    sites = find_sites(model, config)
    rank = max(site.rank for site in sites)
    wide = max(site.shape[1] for site in sites), max(site.shape[0] for site in sites)
    # The largest A and B alone: a lower bound for every basis that stores dense matrices.
    needed = 4 * rank * sum(wide) if config.basis != "monarch" else 4 * rank
    there = total_memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"rank {rank:,} needs {needed / 2**30:,.1f} GiB for A and B; this machine has "
            f"{there / 2**30:,.1f} GiB. Lower --rank"
        )


def total_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def read_start(path: str, config: VeraConfig) -> Adapter:
    """Read an adapter to start from.

    Args:
        path: The adapter file.
        config: The run's configuration; where it is not the default, it must be the adapter's.

    Raises:
        AdapterFileError: The file cannot be read.
        ConfigError: A setting differs from the adapter's.
    """
    start, plain = native.read(path), VeraConfig()
    for field in dataclasses.fields(VeraConfig):
        given, stored = getattr(config, field.name), getattr(start.config, field.name)
        if given not in (getattr(plain, field.name), stored):
            raise ConfigError(
                f"{field.name} is {given!r}, but the adapter to start from has {stored!r}; leave "
                "it out"
            )
    return start


def build_method(
    name: str, config: VeraConfig, options: Mapping[str, Any], start: str | None = None
) -> Method:
    """The method of a name, on the adapter of file `start` where one is given.

    Raises:
        ConfigError: The name is unknown.
    """
    if name == "vera":
        adapter = None if start is None else read_start(start, config)
        return VeraMethod(config if adapter is None else adapter.config, start=adapter)
    known = ("vera", "head", "bitfit", "full", *BASELINES)
    if name not in known and not name.startswith("peft:"):
        raise ConfigError(
            f"unknown method {name!r}; there are {', '.join(known)} and "
            f"peft:NAME{near(name, (*known, 'peft:lora'))}"
        )
    return BaselineMethod(name, config, options)


def has_whole_file(method: Method, folder: Path) -> bool:
    """Whether a folder holds a whole file of this method."""
    try:
        method.check(folder)
    except (OSError, ValueError, VeratuneError):
        return False
    return True
