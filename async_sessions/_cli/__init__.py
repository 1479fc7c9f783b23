"""The commands of `async_sessions.cli` that look after a store."""
