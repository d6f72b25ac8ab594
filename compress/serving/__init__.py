"""An HTTP server for a base model and its fine-tunes; what it needs beyond the package is the extra `serve`."""
