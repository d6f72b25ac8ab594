"""Commands that need a file of their own; the command line lists them."""
