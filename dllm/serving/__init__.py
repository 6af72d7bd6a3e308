"""Answering many at once: one loop over everything that is asked of a model. No HTTP.

engine      requests in, events out: answers, infills, edits and scores share the model
"""
