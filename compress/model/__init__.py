"""Reading a model folder block by block, and finding the linear layers (sites) in it."""
