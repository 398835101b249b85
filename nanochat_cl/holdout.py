"""
Which documents are held out, and how much of a text can be read in them.

A document's key alone decides its class, before anything else is known: 5 % val (recipes are chosen on it), 5 % test (the certificate
only). Overlap counts shared 13-grams of words (Brown et al. 2020, appendix C), or of characters where a script writes no spaces, as 64-bit
hashes in one sorted array: no pairs of documents.

G groups of held-out texts.
"""
import hashlib
import re
import zlib
from collections.abc import Iterable

import numpy as np

from nanochat_cl.parallel import parallel

HELD_OUT = ("val", "test")
FRACTION = 0.05  # of the keys, for each held-out class
NGRAM = 13       # words, or such characters
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Thai to Chinese
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")  # of a script that writes no spaces every character
BLOCK = 8192     # texts whose hashes are in memory at once
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
    """Sorted unique 64-bit hashes of the 13-grams of the lower-cased text, the same in every process; a shorter text is one."""
    words = np.fromiter((zlib.crc32(word.encode("utf-8", "ignore")) for word in WORD.findall(text.lower())), np.uint64)
    n = min(NGRAM, len(words))
    result = np.zeros(len(words) - n + 1 if n else 0, np.uint64)
    for i in range(n):
        result = (result + words[i:i + len(result)]) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return np.unique(result)


class Overlap:
    """The 13-grams of named groups of held-out texts, sorted, each with the text it comes from."""

    def __init__(self, groups: dict[str, Iterable[str]], workers: int = 1):
        self.groups, self.workers = list(groups), workers
        texts = [(i, text) for i, group in enumerate(groups.values()) for text in group] or [(0, "")]
        each = parallel(grams, [text for _, text in texts], workers)
        self._group, self._size = np.array([i for i, _ in texts]), np.array([max(1, len(g)) for g in each])
        grams_, owner = np.concatenate(each), np.repeat(np.arange(len(each)), [len(g) for g in each])
        order = np.argsort(grams_, kind="stable")
        self._grams, self._owner = grams_[order], owner[order]

    def shares(self, own: np.ndarray) -> np.ndarray:
        """
        (G,) float64 for the grams of a text: of each group the larger of two shares, in 0..1: of the text's own 13-grams that some text of
        the group has, and of any one of its texts' 13-grams that the text has (a long text can hold a short document whole).
        """
        first, last = np.searchsorted(self._grams, own, "left"), np.searchsorted(self._grams, own, "right")
        found, groups = np.flatnonzero(last > first), len(self.groups)
        if not found.size:
            return np.zeros(groups)
        owners = [self._owner[first[i]:last[i]] for i in found]
        pairs = np.unique(np.repeat(found, [len(o) for o in owners]) * groups + self._group[np.concatenate(owners)])
        result = np.bincount(pairs % groups, minlength=groups) / len(own)
        owner, count = np.unique(np.concatenate(owners), return_counts=True)
        np.maximum.at(result, self._group[owner], count / self._size[owner])
        return result

    def of(self, texts: list[str]) -> np.ndarray:
        """(number of texts, G): the shares of every text. The workers hash the texts, most of the time; the array is searched here."""
        blocks = (parallel(grams, texts[i:i + BLOCK], self.workers) for i in range(0, len(texts), BLOCK))
        return np.array([self.shares(own) for block in blocks for own in block]).reshape(len(texts), len(self.groups))
