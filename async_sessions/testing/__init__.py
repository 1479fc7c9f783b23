"""What tests of your app, or of your own `BlobStore`, can use: `testing.fixtures` and `testing.blobs`."""
