"""Runs compressed models: the modules that compute with weight expressions, and the integration with transformers."""
