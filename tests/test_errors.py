import inspect
import re

import veratune
from veratune import errors


def test_every_error_is_in_the_drawing_and_under_its_parent():
    depth: dict[int, str] = {}
    drawn = {}
    for line in errors.__doc__.splitlines():
        found = re.match(r"^(\s*(?:│\s+)?(?:[├└]── )?)(\w+)(?:\s{2,}|$)", line)
        if found and found.group(2).endswith(("Error",)):
            level = len(found.group(1)) // 4
            depth[level] = found.group(2)
            drawn[found.group(2)] = depth.get(level - 1)
    classes = {
        n: c for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)
    }
    assert set(drawn) == set(classes)
    for name, parent in drawn.items():
        if parent in classes:
            assert issubclass(classes[name], classes[parent])


def test_all_descend_from_the_root():
    for _, c in inspect.getmembers(
        errors, lambda c: inspect.isclass(c) and c.__module__ == errors.__name__
    ):
        assert issubclass(c, errors.VeratuneError)


def test_public_names_exist():
    for name in veratune.__all__:
        assert hasattr(veratune, name)


def test_near_names():
    assert errors.near("quary", ["query", "value"]) == "; did you mean 'query'?"
    assert errors.near("xyz", ["query"]) == ""
