"""The contestants: one model, adapted in each of the ways that are compared."""

import copy
import dataclasses
from collections.abc import Sequence

import peft
import torch
from torch import nn

from veratune.attach import attach
from veratune.config import VeraConfig
from veratune.errors import ConfigError, near

FROZEN = "frozen"
OURS = "veratune"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to adapt. kind: frozen, full, lora, peft-vera, or veratune; rank where it has one; plan and basis of veratune's."""

    kind: str
    rank: int = 0
    plan: str = "auto"
    basis: str = "random"

    @property
    def name(self) -> str:
        words = [self.kind, *([f"r={self.rank}"] if self.rank else [])]
        return " ".join(words + [w for w in (self.plan, self.basis) if w not in ("auto", "random")])


# Every benchmark's common field: the limit, and what is not VeRA.
OTHERS = (Peer(FROZEN), Peer("full"), Peer("lora", 8), Peer("lora", 64))


def adapted(model: nn.Module, peer: Peer, targets: Sequence[str]) -> nn.Module:
    """A copy of `model`, adapted; every trained vector has left its start, as after some steps.

    Raises ConfigError for a kind that is not known.
    """
    model = copy.deepcopy(model).requires_grad_(False).train()
    if peer.kind == FROZEN:
        return model
    if peer.kind == "full":
        return model.requires_grad_(True)
    if peer.kind == OURS:
        model = attach(
            model,
            VeraConfig(
                rank=peer.rank,
                targets=tuple(targets),
                plan=peer.plan,  # type: ignore[arg-type]
                basis=peer.basis,  # type: ignore[arg-type]
            ),
        )
    elif peer.kind == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=peer.rank, lora_alpha=peer.rank, target_modules=list(targets))
        )  # type: ignore[arg-type]
    elif peer.kind == "peft-vera":
        model = peft.get_peft_model(
            model, peft.VeraConfig(r=peer.rank, target_modules=list(targets), save_projection=False)
        )  # type: ignore[arg-type]
    else:
        raise ConfigError(
            f"no contestant {peer.kind!r}{near(peer.kind, (FROZEN, 'full', 'lora', 'peft-vera', OURS))}"
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01
                )
    return model
