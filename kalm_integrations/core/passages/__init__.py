"""Encoded passages: the string, its codecs, and where encodings and prefix states are kept."""
