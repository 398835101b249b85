"""
Which documents are held out, and how much of a text can be read in them.

A document's key alone decides its class, before anything else is known: 5 % val (recipes are chosen on it), 5 % test (the certificate
only). Overlap counts shared 13-grams of words (Brown et al. 2020, appendix C), as 64-bit hashes in one sorted array: no pairs of documents.
"""
import hashlib
import re
from collections.abc import Iterable

import numpy as np

HELD_OUT = ("val", "test")
FRACTION = 0.05  # of the keys, for each held-out class
NGRAM = 13       # words
# A copy with one word in twenty changed shares more than this. Of the embedded general corpus 19 % of the training documents share some
# 13-gram with a held-out one, most of them a licence line in a very short text, and 4 % reach this (2026-11-24).
NEAR = 0.4


def digest(text: str) -> str:
    """16 hex digits that name a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def split_of(key: str) -> str:
    """`train`, `val` or `test`, from the key alone: stable over machines, versions and everything else in the corpus."""
    place = int(digest(f"split/{key}"), 16) / 2**64
    return "val" if place < FRACTION else "test" if place < 2 * FRACTION else "train"


def grams(text: str) -> np.ndarray:
    """Sorted unique hashes of the word 13-grams of the lower-cased text; a shorter text is one. They hold in this process only."""
    words = re.findall(r"\w+", text.lower())
    n = min(NGRAM, len(words))
    return np.unique(np.fromiter(map(hash, zip(*(words[i:] for i in range(n)))), np.int64))


class Overlap:
    """The held-out texts' 13-grams, sorted, each with the documents it comes from."""

    def __init__(self, held_out: Iterable[str]):
        each = [grams(text) for text in held_out] or [grams("")]
        self._size = np.array([max(1, len(g)) for g in each])
        grams_, owner = np.concatenate(each), np.repeat(np.arange(len(each)), [len(g) for g in each])
        order = np.argsort(grams_, kind="stable")
        self._grams, self._owner = grams_[order], owner[order]

    def share(self, text: str) -> float:
        """
        The larger of two shares, in 0..1: of the text's own 13-grams that some held-out document has, and of any one held-out
        document's 13-grams that the text has (a long text can hold a short document whole).
        """
        own = grams(text)
        first, last = np.searchsorted(self._grams, own, "left"), np.searchsorted(self._grams, own, "right")
        found = last > first
        if not found.any():
            return 0.0
        owners = np.concatenate([self._owner[a:b] for a, b in zip(first[found], last[found])])
        return float(max(found.mean(), (np.bincount(owners, minlength=len(self._size)) / self._size).max()))
