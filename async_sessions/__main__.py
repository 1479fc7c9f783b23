"""`async-sessions` and `python -m async_sessions`: the command line, which needs the extra `cli`."""

from __future__ import annotations

import importlib
import importlib.util
import sys


def main() -> None:
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The command line needs {' and '.join(missing)}: pip install 'async-sessions[cli]'")
    importlib.import_module("async_sessions.cli").app()


if __name__ == "__main__":
    main()
