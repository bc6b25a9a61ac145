"""write_report: a training run before and after, as one HTML page."""

import base64
import dataclasses
import html
import io
import json
import math
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from veratune.errors import DataError
from veratune.formats.atomic import write_atomic
from veratune.inference.adapted import ADAPTER_NAME, LoadedModel, load_with_adapter
from veratune.inference.generate import generate_completions
from veratune.selection import use
from veratune.tasks.text.language import Instruction
from veratune.training.prepare import build_task
from veratune.training.run_folder import HISTORY, RESULTS, RUN
from veratune.training.settings import TrainSettings

REPORT = "report.html"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 58rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #d5dae1; text-align: right;
  vertical-align: top; } td:first-child, th:first-child { text-align: left; }
table.text td { text-align: left; white-space: pre-wrap; }
img { max-width: 100%; } mark { background: #c8ecd0; }
pre { white-space: pre-wrap; background: #f4f6f8; padding: 1rem; border-radius: .3rem; }
.note { color: #596575; }
"""


@dataclasses.dataclass(frozen=True)
class _RunFiles:
    """What a run's folder holds."""

    settings: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, Any]]


def write_report(folder: Path, samples: int = 4, max_new_tokens: int = 128) -> Path:
    """Write report.html into a run's folder: scores, curves, loss mask, samples and settings.

    Args:
        folder: The folder of a finished run.
        samples: Prompts that the base model and the adapter complete (task instruction); 0 for
            none, which also needs no model.
        max_new_tokens: Longest completion, in tokens.

    Returns:
        The page.

    Raises:
        DataError: The folder holds no finished run.
        VeratuneError: The model or the data cannot be loaded.
    """
    run = _read(folder)
    parts = [
        f"<h1>{_text(run.settings['task'])}: {_text(Path(run.settings['model']).name)}</h1>",
        _scores(run),
        _curves(run),
        _range_test(folder),
    ]
    if samples and run.settings["task"] == Instruction.name:
        parts += _model_parts(run, samples, max_new_tokens)
    parts.append(_settings(run))
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Training run</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    write_atomic(folder / REPORT, page.encode())
    return folder / REPORT


def _read(folder: Path) -> _RunFiles:
    try:
        return _RunFiles(
            yaml.safe_load((folder / RUN).read_text()),
            json.loads((folder / RESULTS).read_text()),
            json.loads((folder / HISTORY).read_text()),
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no {Path(str(error.filename)).name}; the folder of a finished run is wanted"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None


def _scores(run: _RunFiles) -> str:
    before, after = run.results["before"], run.results["after"]
    rows = [
        f"<tr><td>{_text(name)}</td><td>{before.get(name, math.nan):.4f}</td>"
        f"<td>{value:.4f}</td></tr>"
        for name, value in after.items()
    ]
    facts = (
        f"{run.results['trained']:,} values in d and b, {run.results['head']:,} in the head, "
        f"{run.results['bytes'] / 1024:,.1f} KiB on disk, {run.results['steps']:,} steps, "
        f"{run.results['seconds']:,.0f} s, "
        f"{run.results['peak_memory'] / 2**30:,.2f} GiB peak memory."
    )
    table = (
        f"<table><tr><th></th><th>before</th><th>after</th></tr>{''.join(rows)}</table>"
        if rows
        else '<p class="note">The run had no evaluation data.</p>'
    )
    return f"<h2>Scores</h2>{table}<p>{facts}</p>"


def _curves(run: _RunFiles) -> str:
    """Loss and learning rate by step, as one picture."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(line["step"], line[key]) for line in run.history if key in line]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss")
    if left.lines:
        left.legend()
    rates = [
        (line["step"], line["learning_rate"]) for line in run.history if "learning_rate" in line
    ]
    if rates:
        right.plot(*zip(*rates, strict=True), marker="o", markersize=3, color="tab:orange")
    right.set(xlabel="step", ylabel="learning rate")
    for axes in (left, right):
        if not axes.lines:
            axes.text(0.5, 0.5, "no step was logged", ha="center", transform=axes.transAxes)
    return f"<h2>Training</h2>{_image(figure)}"


def _range_test(folder: Path) -> str:
    picture = folder / "lr-find.png"
    if not picture.is_file():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="range test" src="data:image/png;base64,{data}">'
    return f"<h2>Range test of the learning rate</h2>{image}"


def _model_parts(run: _RunFiles, samples: int, max_new_tokens: int) -> list[str]:
    """The loss mask of one example, and completions of the base model and of the adapter."""
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    given = {key: value for key, value in run.settings.items() if key in known}
    settings = TrainSettings(**given, out="")
    task = build_task(settings)
    assert isinstance(task, Instruction)
    is_vera = settings.method == "vera"
    loaded = load_with_adapter(
        settings.model,
        run.results["path"] if is_vera else None,
        task=None if is_vera else task.name,
        dtype=settings.base_dtype,
        quantize=settings.quantize,
        device=settings.device,
    )
    processor = task.load_processor(settings.model)
    examples = task.load_examples(settings.data, settings.split, settings.data_config)
    encoded = task.encode(examples.select(range(min(len(examples), 8))), processor)
    pieces = "".join(
        f"<mark>{_text(piece)}</mark>" if on else _text(piece)
        for piece, on in task.preview(encoded[0], processor)
    )
    mask = (
        f"<h2>Loss mask</h2><p>The loss is on the <mark>marked</mark> part.</p><pre>{pieces}</pre>"
    )
    if not is_vera:
        note = f"Samples are drawn of VeRA adapters, not of method {_text(settings.method)}."
        return [mask, f'<p class="note">{note}</p>']
    held_out = settings.eval_data or settings.data
    has_split = task.has_split(held_out, settings.eval_split)
    split = settings.eval_split if settings.eval_data or has_split else settings.split
    rows = task.load_examples(held_out, split, settings.data_config)
    table = _samples(task, loaded, rows.select(range(min(len(rows), samples))), max_new_tokens)
    return [mask, table]


def _samples(task: Instruction, loaded: LoadedModel, rows: Any, max_new_tokens: int) -> str:
    conversations = task.conversations(rows)
    prompts = [c.messages[: c.assistant_turns[-1]] for c in conversations]
    columns = [[str(prompt[-1]["content"]) for prompt in prompts]]
    for name in (None, ADAPTER_NAME):
        use(loaded.model, name)
        completions = generate_completions(
            loaded.model,
            loaded.processor,
            prompts,
            max_new_tokens=max_new_tokens,
            tools=[c.tools for c in conversations],
        )
        columns.append(list(completions))
    columns.append(task.last_completions(conversations, loaded.processor))
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    head = "".join(f"<th>{name}</th>" for name in ("prompt", "base", "adapter", "reference"))
    return f'<h2>Samples</h2><table class="text"><tr>{head}</tr>{body}</table>'


def _settings(run: _RunFiles) -> str:
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td>{_text(json.dumps(value))}</td></tr>"
        for key, value in run.settings.items()
        if value is not None and value not in ("", [], {})
    )
    return f"<h2>Settings</h2><table>{rows}</table>"


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="curves" src="data:image/png;base64,{data}">'


def _text(value: object) -> str:
    return html.escape(str(value))
