"""Which paths a process touches; for a process of its own, since no audit hook can be taken off again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class Watch:
    """Notes in `touched`, while it is `on`, what is opened, listed, moved or removed."""

    def __init__(self) -> None:
        self.touched: set[str] = set()
        self.on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.on and event.startswith(("open", "os.", "shutil.")):
            paths = arguments[:1] if event == "open" else arguments
            self.touched.update(
                os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | Path)
            )
