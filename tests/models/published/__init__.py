"""The published architectures as plain tensor equations: what the stock classes are held against.

Each module has CONFIG (a tiny config.json in the published form), SIZES (the published one, and how many parameters
it makes), `shapes` (published tensor names and shapes) and `logits`. Nothing here knows transformers.
"""
