"""
Seeds derived by name, so that one more draw here shifts nothing there.
"""
import hashlib


def seed_for(seed: int, purpose: str) -> int:
    """A 32-bit seed for one purpose of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "big")
