"""Data for trying things out; each folder names its source and licence in its README.md."""

from __future__ import annotations

from pathlib import Path

XQUAD_EN = Path(__file__).with_name("xquad-en")
"""240 English Wikipedia paragraphs and 1,190 questions, as a BEIR folder (CC BY-SA 4.0)."""
