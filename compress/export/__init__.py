"""Writing an artifact in other people's formats."""
