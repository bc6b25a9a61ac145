"""Compiles grammars of strangers in a process that may be killed. Run as a script.

Reads a JSON object a line, {"grammar": text, "limits": {...}, "seconds": number}, and writes
{"error": text} or {} for each. The kernel ends the process when a grammar takes too long or too
much memory. It imports nothing of veratune, so that it starts at once.
"""

import json
import math
import resource
import sys

import llguidance

MEMORY = 2**31  # bytes of address space


def main() -> None:
    """Serve until the end of the input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    tokenizer = llguidance.LLTokenizer("byte")  # how long it takes hardly depends on the tokenizer
    for line in sys.stdin:
        task = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        end = usage.ru_utime + usage.ru_stime + task["seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(end), hard))
        limits = llguidance.LLParserLimits(**task["limits"])
        matcher = llguidance.LLMatcher(tokenizer, task["grammar"], log_level=0, limits=limits)
        found = {"error": matcher.get_error()} if matcher.is_error() else {}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
