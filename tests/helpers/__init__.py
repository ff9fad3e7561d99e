"""What tests share: small models, worlds in one process, fake wires, runs started as a user starts them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
