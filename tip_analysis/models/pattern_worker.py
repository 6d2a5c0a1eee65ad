"""A process that tries regular expressions of an adapter's config on a model's names.

In: a JSON list of patterns and one of names. Out: the number of each pattern before it is tried, so
that whoever waits in vain knows which does not end. It is a process of its own, since nothing stops
a match in the middle.
"""

import contextlib
import json
import re
import sys

FORMS = (r"{}", r"(.*\.)?({})$", r".*\.{}$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\.")
"""What peft makes of a pattern."""
MEMORY_BYTES = 2**30


def main() -> None:
    """Try each pattern, in each form, on each name."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    patterns, names = json.load(sys.stdin)
    for number, pattern in enumerate(patterns):
        print(number, flush=True)
        for form in FORMS:
            with contextlib.suppress(re.error, RecursionError, OverflowError):  # peft's to say
                _try(re.compile(form.replace("{}", pattern)), names)


def _try(compiled: re.Pattern[str], names: list[str]) -> None:
    for name in names:
        compiled.match(name)
        compiled.fullmatch(name)
        compiled.search(name)


if __name__ == "__main__":
    main()
