"""The synthetic world of the laptop configuration: an invented country as corpora, conversations and benchmarks.

`build(directory, seed=7)` makes everything from the seed; nothing is downloaded and no sentence comes from elsewhere.
"""

from dllm.synthetic.write import build

__all__ = ["build"]
