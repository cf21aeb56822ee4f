"""How fast the input and the training step are, and what stands in their way."""
