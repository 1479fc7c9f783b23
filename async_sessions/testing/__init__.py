"""What tests of your app, or of your own `BlobStore`, can use. Import what you need from its module:

- `fixtures`: pytest fixtures, for `pytest_plugins`: an open store, a frozen clock, a fake pipeline, a stall detector
- `clock`, `pipeline`, `stalls`: what these fixtures give you
- `faults`: blob stores that are slow, that fail, that count
- `blobs`, `races`: the conformance tests of a blob store (pytest)
- `machine`: a state machine that drives one (hypothesis)
- `fuzz`: an event loop that tries every order of events, by seed
- `cancellation`: a cancellation at every suspension
- `power`: a power cut at every step
"""
