"""The same jobs by us and by other tools, on one machine: seconds, memory, and what is left of the model."""
