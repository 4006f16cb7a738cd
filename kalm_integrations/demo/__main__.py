"""`python -m kalm_integrations.demo`."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from kalm_integrations.demo import Part, main
from kalm_integrations.errors import KalmError

parser = argparse.ArgumentParser(
    "python -m kalm_integrations.demo", description="Rerank a small sample, and show what happens."
)
parser.add_argument("--model", default="pico", help="alias, hub id or folder of a checkpoint (default: %(default)s)")
parser.add_argument("--part", choices=get_args(Part), help="run only this part")
arguments = parser.parse_args()
try:
    main(arguments.model, arguments.part)
except KalmError as error:
    sys.exit(f"error: {error}")
