"""Reading a model folder block by block, and finding the linear maps in it."""
