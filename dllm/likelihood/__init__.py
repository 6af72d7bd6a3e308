"""What a text is worth to a model: bounds on its likelihood, and whether greedy decoding gives it."""
