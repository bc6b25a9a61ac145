"""The five scores of the E2E challenge: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

BLEU (sacrebleu) and NIST (computed here) use the lower-case tokens of mteval-v13a. METEOR, ROUGE-L
and CIDEr (pycocoevalcap) use the COCO caption tokenizer. That tokenizer and METEOR need Java.
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
    """Scores of a set of outputs. None: Java, which the score needs, is not installed.

    Args:
        bleu: In percent.
        nist: As printed by mteval.
        meteor: In percent.
        rouge_l: In percent.
        cider: As printed by the COCO caption evaluation.
    """

    bleu: float
    nist: float
    meteor: float | None
    rouge_l: float | None
    cider: float | None


def nlg_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> NlgScores:
    """Compute all five scores.

    Args:
        outputs: One generated text for each input.
        references: One or more reference texts for each input.

    Raises:
        DataError: The numbers of outputs and references differ, or an input has no reference.

    Source: Dušek, Novikova and Rieser, "Evaluating the state-of-the-art of end-to-end natural
    language generation: The E2E NLG challenge", 2020.
    """
    if len(outputs) != len(references) or not outputs:
        raise DataError(
            f"{len(outputs)} outputs and {len(references)} groups of references; one output for "
            "each group is wanted"
        )
    for number, group in enumerate(references):
        if not any(text.strip() for text in group):
            raise DataError(
                f"group {number} of the references is empty; at least one text is wanted"
            )
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    # sacrebleu takes the first references of all inputs, then the second ones, and so on.
    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    bleu = metric.corpus_score(list(outputs), streams).score  # type: ignore[arg-type]
    tokenizer = Tokenizer13a()

    def tokenize(text: str) -> Tokens:
        return tokenizer(text.lower()).split()

    score = nist(
        [tokenize(text) for text in outputs],
        [[tokenize(text) for text in group] for group in references],
    )
    if shutil.which("java") is None:
        return NlgScores(bleu, score, None, None, None)
    return NlgScores(bleu, score, *_coco_scores(outputs, references))


def nist(
    outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5
) -> float:
    """NIST = penalty * sum over n of (sum of info over matched n-grams) / (n-grams in the outputs).

    info(w1 ... wn) = log2(count(w1 ... wn-1) / count(w1 ... wn)), counted in all references.
    penalty = exp(-beta ln(min(1, length / mean reference length))^2), which is 1/2 at 2/3.

    Args:
        outputs: Tokens of one output for each input.
        references: Tokens of one or more references for each input. An n-gram matches at most as
            often as in the one reference that has it most often.
        order: The largest n.

    Source: Doddington, "Automatic evaluation of machine translation quality using n-gram
    co-occurrence statistics", 2002.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for group in references:
        for text in group:
            counts[()] += len(text)
            for n in range(1, order + 1):
                counts.update(_ngrams(text, n))
    total = 0.0
    for n in range(1, order + 1):
        information, length = 0.0, 0
        for output, group in zip(outputs, references, strict=True):
            length += max(len(output) - n + 1, 0)
            allowed: Counter[tuple[str, ...]] = Counter()
            for text in group:
                allowed |= Counter(_ngrams(text, n))
            for ngram, matches in (Counter(_ngrams(output, n)) & allowed).items():
                information += matches * math.log2(counts[ngram[:-1]] / counts[ngram])
        total += information / length if length else 0.0
    output_length = sum(map(len, outputs))
    mean = sum(sum(map(len, group)) / len(group) for group in references)
    if not output_length or not mean:
        return 0.0
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(-beta * math.log(min(1.0, output_length / mean)) ** 2)


def read_texts(outputs: Path, references: Path) -> tuple[list[str], list[list[str]]]:
    """Read outputs, one a line, and references, one a line with an empty line between groups.

    Raises:
        DataError: A file is missing.
    """
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


def _ngrams(text: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _coco_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """METEOR and ROUGE-L in percent, and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(groups: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        # The tokenizer drops an empty text, which would shift all later ones.
        captions = [[{"caption": text.strip() or "."} for text in group] for group in groups]
        return PTBTokenizer().tokenize(dict(enumerate(captions)))

    with _stderr_silenced():
        expected, generated = tokenize(references), tokenize([[text] for text in outputs])
        meteor = Meteor()
        try:
            score, _ = meteor.compute_score(expected, generated)
        finally:
            for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
                pipe.close()
            meteor.meteor_p.kill()
            meteor.meteor_p.wait()
    rouge, _ = Rouge().compute_score(expected, generated)
    cider, _ = Cider().compute_score(expected, generated)
    return 100 * score, 100 * float(rouge), float(cider)


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Discard standard error, on which Java's tokenizer reports its speed."""
    original = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
