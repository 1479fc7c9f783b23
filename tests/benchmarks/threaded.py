"""The threaded design that this package replaces, as its users knew it.

One object for everybody with one lock, held around `tobytes`, MD5, `save(optimize=True)` and `json.dump`, and around
every read. Nothing is synced to the disk. A thread for cleanup reads the metadata of every session there is. It is here
to be measured: improve nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image


class ThreadedSessions:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, str], Image.Image] = {}
        self._metadata: dict[str, dict[str, Any]] = {}

    def store_image(self, image: Image.Image, session: str, slot: str) -> Path:
        with self._lock:
            digest = hashlib.md5(image.tobytes()).hexdigest()
            folder = self._folder / session
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{slot}_{digest[:8]}.png"
            image.save(path, "PNG", optimize=True)
            self._metadata.setdefault(session, {})[slot] = {
                "filename": path.name,
                "hash": digest,
                "size": image.size,
                "mode": image.mode,
                "aspect_ratio": image.width / image.height,
                "pixel_count": image.width * image.height,
                "file_size_bytes": path.stat().st_size,
                "stored_at": datetime.now(UTC).isoformat(),
            }
            with (folder / "metadata.json").open("w") as file:
                json.dump(self._metadata[session], file, indent=2)
            self._cache[session, slot] = image
            return path

    def retrieve_image(self, session: str, slot: str) -> Image.Image:
        with self._lock:
            cached = self._cache.get((session, slot))
            if cached is None:
                cached = Image.open(self._folder / session / self._metadata[session][slot]["filename"])
                cached.load()
                self._cache[session, slot] = cached
            return cached.copy()

    def restore_from_session_id(self, session: str) -> None:
        with self._lock, (self._folder / session / "metadata.json").open() as file:
            self._metadata[session] = json.load(file)

    def cleanup(self, max_age: timedelta) -> int:
        """What the cleanup thread does every half hour. Returns how many sessions it removed."""
        oldest = datetime.now(UTC) - max_age
        removed = 0
        for folder in self._folder.iterdir():
            with (folder / "metadata.json").open() as file:
                metadata = json.load(file)
            if max(datetime.fromisoformat(image["stored_at"]) for image in metadata.values()) < oldest:
                shutil.rmtree(folder)
                removed += 1
        return removed
