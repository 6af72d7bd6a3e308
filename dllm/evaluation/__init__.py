"""Benchmarks through lm-eval: one adapter for every algorithm, a store of answers, scores with intervals."""
