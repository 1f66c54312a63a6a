"""`python -m xla_ops <command>`; the one command is `doctor`."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit status."""
    if argv[:1] == ["doctor"]:
        try:
            from .doctor import diagnose
        except (ImportError, SyntaxError) as error:
            what = f"xla_ops cannot be imported ({type(error).__name__}: {error})"
            print(f"error: {what}: reinstall xla_ops", file=sys.stderr)
            return 1
        return diagnose.main(argv[1:])
    print(
        "usage: python -m xla_ops doctor [--json] [-v]\n\n"
        "doctor: says what is installed, what works here, and how to mend the rest",
        file=sys.stdout if argv in (["-h"], ["--help"]) else sys.stderr,
    )
    return 0 if argv in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
