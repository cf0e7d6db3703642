"""`python -m server` is the `jaxserve` command, and starts serving where no sub-command is named.

`python -m server --port 9000` is `jaxserve serve --port 9000`; `--version`, `--help` and sub-commands are as there.
"""

import sys

from server.cli import app


def arguments(given: list[str]) -> list[str]:
    """The arguments of `jaxserve` for those of `python -m server`."""
    own = {"--version", "--help", "--install-completion", "--show-completion"}
    serves = not given or (given[0].startswith("-") and given[0] not in own)
    return ["serve", *given] if serves else given


if __name__ == "__main__":
    app(arguments(sys.argv[1:]), prog_name="jaxserve")
