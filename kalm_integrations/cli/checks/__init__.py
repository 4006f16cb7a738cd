"""What `kalm doctor` looks at: a module for each group of checks, each of which yields findings.

A check imports what it needs itself, so that one that is broken is a finding and not the end.
"""
