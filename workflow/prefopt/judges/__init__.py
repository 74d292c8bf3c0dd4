"""Pairwise judges: how a pair of answers is put to a language model, near or far, and how its answer is read."""
