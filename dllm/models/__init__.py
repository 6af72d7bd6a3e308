"""Backbones: one loader for every checkpoint, one forward for every algorithm. No modelling code."""
