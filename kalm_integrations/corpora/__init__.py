"""Data that evaluation, training and demo share: BEIR folders, runs, JSON lines, first stages, other models."""
