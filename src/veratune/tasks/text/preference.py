"""Preference data: pairs of a chosen and a rejected completion, and KTO's single completions."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from veratune.errors import ConfigError, DataError
from veratune.tasks.data import pick_columns
from veratune.tasks.text.base import OnOverflow
from veratune.tasks.text.language import ChatTask
from veratune.tasks.text.pairs import Pair, encode_turns, read_completion, read_pair

Loss = Literal["dpo", "ipo", "orpo", "kto", "simpo"]
Reference = Literal["base", "start"]

# beta of TRL and of the papers: DPO 0.1, IPO's tau 0.1, KTO 0.1, ORPO's lambda 0.1, SimPO 2.
BETA: dict[str, float] = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
WITHOUT_REFERENCE = ("orpo", "simpo")


class PairTask(ChatTask):
    """Base of tasks on pairs: a prompt, a chosen and a rejected completion of it.

    Each is text or a list of messages. Without a prompt column, chosen and rejected are whole
    conversations, and the prompt is what they have in common.
    """

    roles = {
        "prompt": ("prompt", "instruction", "question"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    }
    optional = frozenset({"prompt"})
    loss_per_token = False
    cross_entropy = False

    def pairs(self, examples: Dataset) -> list[Pair]:
        """The prompt, the chosen and the rejected completion of every example, as messages.

        Raises:
            DataError: A column is missing, a side is empty, or both sides are equal; the row is
                named.
        """
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        found = (
            read_pair(number, {role: row[column] for role, column in columns.items()})
            for number, row in enumerate(examples)
        )
        return [Pair(self.with_system(p.prompt), p.chosen, p.rejected) for p in found]

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        """Tokenize pairs: columns prompt_ids, chosen_ids, rejected_ids."""
        return Dataset.from_dict(_as_columns(self._encode_pairs(examples, processor)))

    def _encode_pairs(
        self, examples: Dataset, processor: PreTrainedTokenizerBase
    ) -> list[dict[str, list[int]]]:
        """Token ids of each pair that fits, after `on_overflow`."""
        rows, overflows = [], 0
        for number, pair in enumerate(self.pairs(examples)):
            prompt, chosen = encode_turns(number, pair.prompt, pair.chosen, processor)
            _, rejected = encode_turns(number, pair.prompt, pair.rejected, processor)
            length = len(prompt) + max(len(chosen), len(rejected))
            if length > self.max_length:
                overflows += 1
                if self._drops(number, length):
                    continue
                room = self._room(number, len(prompt))
                chosen, rejected = chosen[:room], rejected[:room]
                if chosen == rejected:
                    raise DataError(
                        f"row {number}: chosen and rejected are equal within max_length = "
                        f"{self.max_length}; raise it or use --on-overflow drop"
                    )
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        self.report_overflows(overflows, len(examples), self.on_overflow)
        return rows

    def _drops(self, number: int, length: int) -> bool:
        """Whether an example of that many tokens is left out; raises where it must not occur."""
        if self.on_overflow == "fail":
            raise self.overflow_error(number, length)
        return self.on_overflow == "drop"

    def _room(self, number: int, prompt: int) -> int:
        """Tokens that are left for a completion behind a prompt of that many."""
        if prompt >= self.max_length:
            raise DataError(
                f"row {number}: no token of the completion is within max_length = "
                f"{self.max_length}; raise it or shorten the prompt"
            )
        return self.max_length - prompt

    def collator(self, processor: PreTrainedTokenizerBase) -> Any:
        """None: TRL's trainers bring their own."""
        return None

    def preview(
        self, encoded: Mapping[str, Any], processor: PreTrainedTokenizerBase
    ) -> list[tuple[str, bool]]:
        sides = [name for name in ("chosen", "rejected", "completion") if f"{name}_ids" in encoded]
        pieces = [(str(processor.decode(encoded["prompt_ids"])), False)]
        for name in sides:
            text = str(processor.decode(encoded[f"{name}_ids"]))
            mark = f" {'' if encoded['label'] else 'un'}desirable" if "label" in encoded else ""
            pieces += [(f"\n[{name}{mark}] ", False), (text, True)]
        return pieces


class Preference(PairTask):
    """Alignment with preferences: DPO, IPO, ORPO, SimPO on pairs, KTO on pairs or on labels."""

    name = "preference"
    roles = {
        **PairTask.roles,
        "completion": ("completion", "response", "output"),
        "label": ("label",),
    }
    optional = frozenset(roles)
    accepted_settings = PairTask.accepted_settings | {"loss", "beta", "reference", "simpo_gamma"}

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        system: str = "",
        on_overflow: OnOverflow = "drop",
        loss: Loss = "dpo",
        beta: float | None = None,
        reference: Reference | None = None,
        simpo_gamma: float | None = None,
    ) -> None:
        """Bind the task to columns and a loss.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest prompt with a completion, in tokens.
            system: System message for prompts without one; "" for none.
            on_overflow: What `encode` does with longer examples.
            loss: The loss by its usual name.
            beta: Strength of the pull to the reference; IPO's tau, ORPO's lambda, SimPO's scale.
                Default: the loss's usual one.
            reference: The reference policy: the base model, or the policy at the start.
            simpo_gamma: SimPO's target margin; default 1.

        Raises:
            ConfigError: A value is invalid, or the loss does not take it.
        """
        super().__init__(columns, max_length, system, on_overflow)
        if loss not in get_args(Loss):
            raise ConfigError(f"loss is {loss!r}; it must be one of {', '.join(get_args(Loss))}")
        if beta is not None and not beta > 0:
            raise ConfigError(f"beta is {beta}; it must be over 0")
        if reference is not None and loss in WITHOUT_REFERENCE:
            raise ConfigError(f"reference is set, but loss {loss!r} has none; leave it out")
        if simpo_gamma is not None and loss != "simpo":
            raise ConfigError(f"simpo_gamma is set, but the loss is {loss!r}; leave it out")
        self.loss: Loss = loss
        self.beta = BETA[loss] if beta is None else beta
        self.reference: Reference = reference or "base"
        self.simpo_gamma = 1.0 if simpo_gamma is None else simpo_gamma

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"loss": self.loss}

    def used_columns(self, examples: Dataset) -> set[str]:
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        return {columns[role] for role in self._roles_read(columns, examples)}

    def pairs(self, examples: Dataset) -> list[Pair]:
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        self._roles_read(columns, examples)
        return super().pairs(examples)

    def _roles_read(self, columns: Mapping[str, str], examples: Dataset) -> tuple[str, ...]:
        """The roles that the loss reads: a pair's, or those of KTO's labelled completions."""
        if {"chosen", "rejected"} <= set(columns):
            return tuple(r for r in ("prompt", "chosen", "rejected") if r in columns)
        if self.loss == "kto" and {"prompt", "completion", "label"} <= set(columns):
            return "prompt", "completion", "label"
        wanted = "chosen and rejected"
        if self.loss == "kto":
            wanted += ", or prompt, completion and label"
        raise DataError(
            f"loss {self.loss!r} wants the columns {wanted}; the data has "
            f"{', '.join(examples.column_names)}: say which with --columns.chosen NAME"
        )

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        """Tokenize pairs, or for KTO single completions with a label.

        Returns:
            Columns prompt_ids, chosen_ids, rejected_ids; for KTO prompt_ids, completion_ids, label,
            and `pair`, the number of the pair that a completion came from (-1 without one).
        """
        if self.loss != "kto":
            return super().encode(examples, processor, training)
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        if "chosen" in self._roles_read(columns, examples):
            pairs = self._encode_pairs(examples, processor)
            rows = [
                {"prompt_ids": p["prompt_ids"], "completion_ids": p[f"{side}_ids"]}
                | {"label": side == "chosen", "pair": number}
                for number, p in enumerate(pairs)
                for side in ("chosen", "rejected")
            ]
        else:
            rows = self._encode_labelled(examples, columns, processor)
        labels = {row["label"] for row in rows}
        if training and len(labels) < 2:
            raise DataError(
                f"every completion has the label {labels.pop()}; KTO wants both true and false"
            )
        return Dataset.from_dict(_as_columns(rows))

    def _encode_labelled(
        self, examples: Dataset, columns: Mapping[str, str], processor: PreTrainedTokenizerBase
    ) -> list[dict[str, Any]]:
        """Token ids of KTO's rows: prompt, completion, label."""
        rows: list[dict[str, Any]] = []
        overflows = 0
        for number, row in enumerate(examples):
            given = {role: row[columns[role]] for role in ("prompt", "completion", "label")}
            prompt, completion, label = read_completion(number, given)
            ids, answer = encode_turns(number, self.with_system(prompt), completion, processor)
            if len(ids) + len(answer) > self.max_length:
                overflows += 1
                if self._drops(number, len(ids) + len(answer)):
                    continue
                answer = answer[: self._room(number, len(ids))]
            rows.append({"prompt_ids": ids, "completion_ids": answer, "label": label, "pair": -1})
        self.report_overflows(overflows, len(examples), self.on_overflow)
        return rows

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """Held-out win rate: the share of pairs whose chosen side is the likelier one.

        Likelihood is the mean log probability of a completion's tokens, so length does not decide.

        Args:
            model: The causal model.
            encoded: From `encode`.
            processor: Its tokenizer.
            batch_size: Not used: one pair at a time bounds the memory for logits.

        Returns:
            win_rate in [0, 1]; nothing for KTO's labelled completions, which are no pairs.
        """
        wins = [
            float(chosen > rejected)
            for prompt, sides in _pairs_of(encoded)
            for chosen, rejected in [completion_logps(model, prompt, sides)]
        ]
        return {"win_rate": sum(wins) / len(wins)} if wins else {}


def _as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _pairs_of(encoded: Dataset) -> list[tuple[list[int], list[list[int]]]]:
    """Prompt and both completions, chosen first, of each encoded pair."""
    if "chosen_ids" in encoded.column_names:
        return [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in encoded]
    sides: dict[int, dict[bool, Any]] = {}
    for row in encoded:
        if row["pair"] >= 0:
            sides.setdefault(row["pair"], {})[row["label"]] = row
    return [
        (found[True]["prompt_ids"], [found[True]["completion_ids"], found[False]["completion_ids"]])
        for found in sides.values()
    ]


def completion_logps(
    model: nn.Module, prompt: list[int], completions: list[list[int]]
) -> list[float]:
    """Mean log probability of each completion's tokens after a prompt.

    Args:
        model: The causal model.
        prompt: Token ids of the prompt, at least one.
        completions: Token ids of each completion.

    Returns:
        One number a completion.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor(prompt + completion) for completion in completions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    places = torch.arange(ids.shape[1], device=device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        mask = (places < lengths).long()
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.train(was_training)
    start = len(prompt) - 1
    losses = F.cross_entropy(
        logits[:, start:-1].float().transpose(1, 2), ids[:, start + 1 :], reduction="none"
    )
    inside = mask[:, start + 1 :]
    return (-(losses * inside).sum(1) / inside.sum(1)).tolist()
