"""What tests of your app, of your own `BlobStore`, or of anything that awaits can use.

`fixtures` (pytest), `blobs` (what every `BlobStore` must do), `fuzz` (every order of events, by seed), `cancellation`
(a cancellation at every suspension), `power` (a power cut at every step).
"""
