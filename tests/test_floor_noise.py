"""runs/floor_noise.py: the table against numbers worked out by hand."""
import importlib.util
import math

import numpy as np

from nanochat_cl import probes
from nanochat_cl.upstream import REPO

spec = importlib.util.spec_from_file_location("floor_noise", REPO / "runs" / "floor_noise.py")
floor_noise = importlib.util.module_from_spec(spec)
spec.loader.exec_module(floor_noise)


def rows(x: np.ndarray, *tags: str) -> dict[str, list[str]]:
    table = floor_noise.table(x, floor_noise.parse([*tags, "--seeds", "0,1"]))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for line in table.splitlines() if line.startswith("|") and (cells := line.strip("|").split("|"))}


def test_means_noise_and_smallest_difference_are_those_computed_by_hand():
    x = np.zeros((2, 2, len(probes.KINDS), 2, 2))      # models, seeds, kinds, twins, (bpb, right)
    x[0, 0, 0, :, 0], x[0, 1, 0, :, 0] = (1, 3), (3, 5)  # first kind, first model: bpb of two pairs of twins for each seed of items
    x[1, :, 0, :, 0] = x[0, :, 0, :, 0] + [[1, 2], [1, 4]]
    x[:, :, 1, :, 1] = .5
    found = rows(x, "a", "b")
    se = np.std([1, 3, 3, 5], ddof=1) / 2
    assert found["agreement"][:3] == [f"2.000 ({se:.3f}), 0.0% 0.0%".replace("2.000", "3.000"), f"5.000 ({np.std([2, 5, 4, 9], ddof=1) / 2:.3f}), 0.0% 0.0%",
                                      f"{(math.sqrt(2) + np.std([3.5, 6.5], ddof=1)) / 2:.3f}, 0.0%"]
    assert found["agreement"][3:] == ["+2.000, +0.0%", f"{1.96 * np.std([1, 2, 1, 4], ddof=1) / 2:.3f}, 0.0%"]
    assert found["order"] == ["0.000 (0.000), 50.0% 50.0%"] * 2 + ["0.000, 0.0%", "+0.000, +0.0%", "0.000, 0.0%"]
    kinds = len(probes.KINDS)
    assert found["mean of all"][3:] == [f"{2 / kinds:+.3f}, +0.0%", f"{1.96 * np.std([1, 2, 1, 4], ddof=1) / 2 / kinds:.3f}, 0.0%"]


def test_one_model_has_no_difference():
    found = rows(np.zeros((1, 2, len(probes.KINDS), 3, 2)), "a")
    assert set(found) == {"kind", "---", *probes.KINDS, "mean of all"} and {len(cells) for cells in found.values()} == {2}
