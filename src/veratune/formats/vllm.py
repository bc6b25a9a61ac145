"""vLLM adapter folders: a PEFT LoRA within what vLLM's checks allow.

vLLM takes linear layers of a causal language model, one alpha / r for all layers, no
`modules_to_save` of a language model, and ranks up to the largest of `RANKS`.
Source: vllm 0.33.0, config/lora.py and lora/peft_helper.py.
"""

from collections.abc import Mapping
from pathlib import Path

from veratune.adapter import Adapter
from veratune.errors import UnsupportedError
from veratune.formats.expert_lora import is_expert
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.peft_files import write_checkpoint
from veratune.formats.peft_lora import lora_settings, pair_tensors
from veratune.formats.reduction import padded

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def write_vllm(adapter: Adapter, pairs: Mapping[str, LoraPair], folder: str | Path) -> str:
    """Write a LoRA folder for vLLM, exact: lower ranks are filled with zeros to the highest one.

    Args:
        adapter: The adapter.
        pairs: Its LoRA pairs (see `lora_pairs`), possibly reduced.
        folder: The folder; absent or empty.

    Returns:
        The `vllm serve` command that loads it.

    Raises:
        UnsupportedError: A rank over 512, a convolution, an expert, or a trained head.
        OutputError: The folder is in use or cannot be written.
    """
    refuse_all_but_linear(adapter, pairs, "vLLM")
    layer, rank = max(
        ((layer, pair.rank) for layer, pair in pairs.items()), key=lambda entry: entry[1]
    )
    if rank > RANKS[-1]:
        raise UnsupportedError(
            f"layer '{layer}' has rank {rank}; vLLM takes at most {RANKS[-1]}: give --reduce "
            f"{RANKS[-1]} or --tolerance"
        )
    pairs = padded(pairs, rank)
    settings = lora_settings(adapter, pairs) | {
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
    }
    write_checkpoint(folder, settings, pair_tensors(pairs))
    limit = next(allowed for allowed in RANKS if allowed >= rank)
    name = Path(folder).name
    return (
        f"vllm serve {adapter.base_id or 'BASE_MODEL'} --enable-lora --max-lora-rank {limit} "
        f"--lora-modules {name}={folder}"
    )


def refuse_all_but_linear(adapter: Adapter, pairs: Mapping[str, LoraPair], program: str) -> None:
    """Raise UnsupportedError for what a language-model program cannot hold."""
    instead = "merge the adapter into a folder instead"
    if adapter.head:
        raise UnsupportedError(
            f"{program} loads no trained head, and the adapter has "
            f"{', '.join(adapter.config.head)}; {instead}"
        )
    for layer, pair in pairs.items():
        what = "a convolution" if pair.kernel else "one expert of a fused weight"
        if pair.kernel or is_expert(layer):
            raise UnsupportedError(
                f"{program} adapts linear layers, and '{layer}' is {what}; {instead}"
            )
