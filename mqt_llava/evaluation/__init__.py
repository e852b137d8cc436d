"""Accuracy and cost against the number of visual tokens."""
