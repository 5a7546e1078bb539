"""Softmax attention over arrays, three ways that agree; models/attention.py chooses."""
