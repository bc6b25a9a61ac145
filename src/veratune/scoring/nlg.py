"""The five scores of the E2E challenge: BLEU, NIST, METEOR, ROUGE-L and CIDEr, each over several references.

BLEU is sacrebleu's and NIST our own, both on mteval-v13a's tokens in lower case; METEOR, ROUGE-L and CIDEr are those of the
COCO caption evaluation on its own tokens, whose tokenizer and METEOR run on Java.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from veratune.errors import DataError

Tokens = Sequence[str]


@dataclasses.dataclass(frozen=True)
class NlgScores:
    """bleu, meteor, rouge_l in %; nist and cider as they are printed. None: Java is not there to compute them."""

    bleu: float
    nist: float
    meteor: float | None
    rouge_l: float | None
    cider: float | None


def nlg_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> NlgScores:
    """All five scores of one output for each input.

    outputs: a text each; references: one or more texts each. Raises DataError for other numbers of them, or an input without
    a reference.

    Source: Dušek, Novikova and Rieser, "Evaluating the state-of-the-art of end-to-end natural language generation", 2020.
    """
    if len(outputs) != len(references) or not outputs:
        raise DataError(
            f"{len(outputs)} outputs and {len(references)} groups of references; one output for each group is wanted"
        )
    for number, group in enumerate(references):
        if not any(text.strip() for text in group):
            raise DataError(
                f"group {number} of the references is empty; at least one text is wanted"
            )
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    bleu = metric.corpus_score(list(outputs), streams).score  # type: ignore[arg-type]
    cut = Tokenizer13a()
    tokens = [cut(text.lower()).split() for text in outputs]
    score = nist(tokens, [[cut(text.lower()).split() for text in group] for group in references])
    if shutil.which("java") is None:
        return NlgScores(bleu, score, None, None, None)
    return NlgScores(bleu, score, *_coco(outputs, references))


def nist(
    outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5
) -> float:
    """Penalty * sum over n of (sum of info(w1 ... wn) over matches / n-grams in the outputs).

    info(w1 ... wn) = log2(count(w1 ... wn-1) / count(w1 ... wn)), counted in all references; an n-gram matches at most as often as in
    the one reference that has it most often; penalty = exp(-beta ln(min(1, length / mean reference length))^2), 1/2 at 2/3.

    Source: Doddington, "Automatic evaluation of machine translation quality using n-gram co-occurrence statistics", 2002.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for group in references:
        for text in group:
            counts[()] += len(text)
            for n in range(1, order + 1):
                counts.update(_grams(text, n))
    total = 0.0
    for n in range(1, order + 1):
        gain, made = 0.0, 0
        for output, group in zip(outputs, references, strict=True):
            made += max(len(output) - n + 1, 0)
            most: Counter[tuple[str, ...]] = Counter()
            for text in group:
                most |= Counter(_grams(text, n))
            for gram, found in (Counter(_grams(output, n)) & most).items():
                gain += found * math.log2(counts[gram[:-1]] / counts[gram])
        total += gain / made if made else 0.0
    length = sum(map(len, outputs))
    mean = sum(sum(map(len, group)) / len(group) for group in references)
    if not length or not mean:
        return 0.0
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(-beta * math.log(min(1.0, length / mean)) ** 2)


def read_texts(outputs: Path, references: Path) -> tuple[list[str], list[list[str]]]:
    """Outputs, one a line, and references, one a line with an empty line between groups. Raises DataError."""
    for path in (outputs, references):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    groups: list[list[str]] = [[]]
    for line in references.read_text("utf-8").splitlines():
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    texts = outputs.read_text("utf-8").splitlines()
    return texts, groups if groups[-1] else groups[:-1]


def _grams(text: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _coco(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """METEOR and ROUGE-L in %, and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def captions(groups: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        # A line that is empty would move all lines behind it.
        return PTBTokenizer().tokenize(
            {
                i: [{"caption": text.strip() or "."} for text in group]
                for i, group in enumerate(groups)
            }
        )

    with _quiet_java():
        wanted, made = captions(references), captions([[text] for text in outputs])
        meteor = Meteor()
        try:
            score, _ = meteor.compute_score(wanted, made)
        finally:
            for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
                pipe.close()
            meteor.meteor_p.kill()
            meteor.meteor_p.wait()
    rouge, _ = Rouge().compute_score(wanted, made)
    cider, _ = Cider().compute_score(wanted, made)
    return 100 * score, 100 * float(rouge), float(cider)


@contextlib.contextmanager
def _quiet_java() -> Iterator[None]:
    """Java's tokenizer tells standard error how fast it was."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
