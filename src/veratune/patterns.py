"""The target language: which layer names a word, a glob or a regular expression matches."""

import fnmatch

import re2

from veratune.errors import ConfigError

# Between a fused layer's path and the name of its part: torch allows no module to have it in its
# name.
PART = ":"

REGEX = "re:"
MAX_REGEX = 256  # characters; RE2 matches in linear time, and this bounds what it compiles

# The field's words for a projection, and the names that model families give it.
ROLES: dict[str, tuple[str, ...]] = {
    # BERT, RoBERTa, ViT; Llama, Qwen, CLIP; DistilBERT; T5, fused parts; DeBERTa v2; diffusers;
    # wav2vec 2.0 conformers; CPM-Ant; CTRL; CvT
    role: (
        role,
        f"{letter}_proj",
        f"{letter}_lin",
        letter,
        f"{role}_proj",
        f"to_{letter}",
        f"linear_{letter}",
        f"project_{letter}",
        f"W{letter}",
        f"projection_{role}",
    )
    for role, letter in (("query", "q"), ("key", "k"), ("value", "v"))
}


def matches(pattern: str, name: str) -> bool:
    """Return whether a word of the target language matches the layer called `name`.

    A part of a fused layer is called "layer:part"; "layer.part" matches it too, and "layer"
    matches all of its parts.

    Args:
        pattern: A layer name or its end ("q_proj"), a role ("query"), a glob ("*.0.*"), or a
            regular expression in RE2 syntax that matches the whole name ("re:.*_proj").
        name: The full layer name.

    Raises:
        ConfigError: The regular expression is malformed or longer than 256 characters.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj")
    True
    >>> matches("query", "model.layers.0.self_attn.q_proj")
    True
    >>> matches("c_attn", "h.0.attn.c_attn:q"), matches("c_attn.q", "h.0.attn.c_attn:q")
    (True, True)
    >>> matches("proj", "h.0.q_proj"), matches("h.0.*", "h.0.attn.c_attn:q")
    (False, True)
    >>> matches(r"re:h\\.[02]\\..*:[qv]", "h.1.attn.c_attn:q")
    False
    """
    if is_regex(pattern):
        return _fullmatch(pattern, name)
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    layer = name.partition(PART)[0]
    dotted = name.replace(PART, ".")
    if any(form == pattern or form.endswith("." + pattern) for form in (name, dotted, layer)):
        return True
    return dotted.rpartition(".")[2] in ROLES.get(pattern, ())


def is_regex(pattern: str) -> bool:
    """Return whether a word of the target language is a regular expression."""
    return pattern.startswith(REGEX)


def exact_pattern(name: str, names: list[str]) -> str:
    """Return a word of the target language that matches `name` and no other of `names`."""
    if sum(matches(name, other) for other in names) == 1:
        return name
    return REGEX + re2.escape(name)


def _fullmatch(pattern: str, name: str) -> bool:
    expression = pattern.removeprefix(REGEX)
    if len(expression) > MAX_REGEX:
        raise ConfigError(
            f"the regular expression {expression[:20]!r}... has {len(expression)} characters; "
            f"at most {MAX_REGEX} are allowed: name the layers or use a glob"
        )
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.fullmatch(expression, name, options) is not None
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise ConfigError(
            f"{pattern!r} is not a regular expression in RE2 syntax: {reason}"
        ) from None
