"""An HTTP server for a base model and its fine-tunes; its dependencies are in the extra `serve`."""
