"""The pocket world of the laptop configuration: a small invented country, written out as corpora, chats and benchmarks.

`build(directory, seed=7)` makes everything from the seed; nothing is downloaded and no sentence comes from elsewhere.
"""

from dllm.data.world.write import build

__all__ = ["build"]
