"""Structured output: grammars compiled by llguidance, and one matcher for each sequence.

A matcher gives the mask of the tokens that may come next. The sampler applies the masks of a batch
before it samples, so constrained and free sequences share one batch.
"""

import json
import threading
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.grammar_check import GrammarChecker

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
MAX_GRAMMAR_BYTES = 64 * 1024
# Bounds on llguidance's work: a grammar over them fails instead of holding up the engine.
_LIMITS: dict[str, int | bool] = {
    "max_grammar_size": 200_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
# One way to write a value: a model cannot spend its tokens on white space.
JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class GrammarMatcher:
    """State of one sequence in its grammar.

    Attributes:
        bits: Mask of the tokens that may come next, as 32-bit words on the CPU.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self.vocab_size, self._matcher = vocab_size, matcher
        self.bits = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
        self._fill()

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and allows nothing but the end."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Advance by a sampled token and compute the mask of the next one.

        Raises:
            UnsupportedError: the grammar forbids the token, or became too complex.
        """
        self._matcher.consume_token(token)
        self._raise_error()
        if not self.finished:
            self._fill()

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.numel() * 4)
        self._raise_error()

    def _raise_error(self) -> None:
        _raise_error(self._matcher)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from any thread.

    Args:
        tokenizer: The model's fast tokenizer.
        vocab_size: Width of the model's logits.
        eos_token_ids: Tokens that end a completion.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, eos_token_ids: set[int]
    ) -> None:
        self.vocab_size = vocab_size
        self._hf_tokenizer = tokenizer
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self.checker = GrammarChecker(_LIMITS)
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> "LLTokenizer":
        """The tokenizer in llguidance's form, built at the first use (about a second)."""
        with self._lock:
            if self._tokenizer is None:
                try:
                    import llguidance.hf
                    from transformers import PreTrainedTokenizerFast
                except ImportError as error:
                    raise UnsupportedError(
                        "structured output needs llguidance: pip install veratune[serve]"
                    ) from error
                if not isinstance(self._hf_tokenizer, PreTrainedTokenizerFast):
                    raise UnsupportedError(
                        f"structured output needs a fast tokenizer; this model has a "
                        f"{type(self._hf_tokenizer).__name__}"
                    )
                self._tokenizer = llguidance.hf.from_tokenizer(
                    self._hf_tokenizer,
                    n_vocab=self.vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            return self._tokenizer

    def compile(self, kind: GrammarKind, source: str | list[str] = "") -> "Grammar":
        """Translate a schema, a regular expression or choices into a grammar.

        Args:
            kind: What `source` is.
            source: A JSON schema as text, a regular expression, a list of choices, or Lark text;
                ignored for "json_object".

        Raises:
            ConfigError: the source is too large, or no JSON.
            UnsupportedError: llguidance is not installed.
        """
        size = len(source.encode()) if isinstance(source, str) else sum(map(len, source))
        if size > MAX_GRAMMAR_BYTES:
            raise ConfigError(
                f"the grammar has {size:,} bytes; at most {MAX_GRAMMAR_BYTES:,} are accepted"
            )
        try:
            import llguidance
        except ImportError as error:
            raise UnsupportedError(
                "structured output needs llguidance: pip install veratune[serve]"
            ) from error
        matcher = llguidance.LLMatcher
        if kind == "choice":
            if isinstance(source, str) or not source or not all(source):
                raise ConfigError("choice wants a list of texts that are not empty")
            alternatives = " | ".join(json.dumps(text) for text in source)
            return Grammar(self, matcher.grammar_from_lark(f"start: {alternatives}"))
        if not isinstance(source, str):
            raise ConfigError(f"a {kind} grammar is one text, not a list")
        if kind == "regex":
            return Grammar(self, matcher.grammar_from_regex(source))
        if kind == "lark":
            return Grammar(self, matcher.grammar_from_lark(source))
        return Grammar(
            self, _from_schema('{"type": "object"}' if kind == "json_object" else source)
        )


def _from_schema(source: str) -> str:
    """A JSON schema in llguidance's form. Raises ConfigError."""
    import llguidance

    try:
        schema = json.loads(source)
        if not isinstance(schema, dict):
            raise ValueError(f"it is {source[:20]}; an object is wanted")
        # llguidance's own options would let a schema switch its checks off.
        schema.pop("x-guidance", None)
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    except (ValueError, RecursionError) as error:
        message = " ".join(str(error).split())[:300]
        raise ConfigError(f"the JSON schema cannot be read: {message}") from None


class Grammar:
    """A grammar in llguidance's form. The first `matcher` compiles it (up to some 100 ms)."""

    def __init__(self, compiler: GrammarCompiler, source: str) -> None:
        self.compiler, self.source = compiler, source
        self._start: LLMatcher | None = None
        self._lock = threading.Lock()

    def matcher(self) -> GrammarMatcher:
        """Return a matcher at the start of the grammar.

        Raises:
            UnsupportedError: the grammar is wrong or too complex.
        """
        with self._lock:
            if self._start is None:
                self._start = self._compile()
            return GrammarMatcher(self._start.deep_copy(), self.compiler.vocab_size)

    def _compile(self) -> "LLMatcher":
        import llguidance

        self.compiler.checker.check(self.source)
        matcher = llguidance.LLMatcher(
            self.compiler.tokenizer,
            self.source,
            log_level=0,
            limits=llguidance.LLParserLimits(**_LIMITS),  # type: ignore[arg-type]
        )
        _raise_error(matcher)
        return matcher


def _raise_error(matcher: "LLMatcher") -> None:
    if matcher.is_error():
        message = " ".join(str(matcher.get_error()).split())[:300]
        raise UnsupportedError(f"the grammar cannot be used: {message}")


def forbidden_tokens(
    matchers: list[GrammarMatcher], vocab_size: int, device: torch.device
) -> Tensor:
    """Return which tokens the grammars forbid, (len(matchers), vocab_size), bool."""
    bits = torch.stack([matcher.bits for matcher in matchers])
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    allowed = (bits.to(device)[:, :, None] >> shifts) & 1
    return allowed.flatten(1)[:, :vocab_size] == 0
