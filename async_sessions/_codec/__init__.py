"""From untrusted bytes to a checked file and its pixels, and from pixels to a PNG. Sync code, for a worker thread."""
