"""runs/floor_noise.py: the table against numbers worked out by hand."""
import importlib.util
import math

import numpy as np
import pytest

from nanochat_cl import probes
from nanochat_cl.command import UserError
from nanochat_cl.upstream import REPO

spec = importlib.util.spec_from_file_location("floor_noise", REPO / "runs" / "floor_noise.py")
floor_noise = importlib.util.module_from_spec(spec)
spec.loader.exec_module(floor_noise)


def rows(x: np.ndarray, *tags: str) -> dict[str, list[str]]:
    table = floor_noise.table(x, floor_noise.parse([*tags, "--seeds", "0,1"]))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for line in table.splitlines() if line.startswith("|") and (cells := line.strip("|").split("|"))}


def test_means_noise_and_smallest_difference_are_those_computed_by_hand():
    x = np.zeros((2, 2, len(probes.KINDS), 3, 2))      # models, seeds, kinds, twins, (bpb, right)
    x[0, 0, 0, :, 0], x[0, 1, 0, :, 0] = (1, 3, 2), (3, 5, 4)  # first kind, first model: bpb of three pairs of twins for each seed of items
    x[1, :, 0, :, 0] = x[0, :, 0, :, 0] + [[1, 2, 3], [1, 4, 1]]
    x[:, :, 1, :, 1] = [1, .5, 0]                      # second kind: one pair at each level
    found, se = rows(x, "a", "b"), lambda *values: np.std(values, ddof=1) / math.sqrt(6)
    none = "0.0% 0.0%; 0.0% 0.0% 0.0%"
    assert found["agreement"][:3] == [f"3.000 ({se(1, 3, 2, 3, 5, 4):.3f}), {none}", f"5.000 ({se(2, 5, 5, 4, 9, 5):.3f}), {none}",
                                      f"{(math.sqrt(2) + np.std([4, 6], ddof=1)) / 2:.3f}, 0.0%"]
    assert found["agreement"][3:] == ["+2.000, +0.0%", f"{1.96 * se(1, 2, 3, 1, 4, 1):.3f}, 0.0%"]
    assert found["order"] == ["0.000 (0.000), 50.0% 50.0%; 100.0% 50.0% 0.0%"] * 2 + ["0.000, 0.0%", "+0.000, +0.0%", "0.000, 0.0%"]
    kinds = len(probes.KINDS)
    assert found["mean of all"][3:] == [f"{2 / kinds:+.3f}, +0.0%", f"{1.96 * se(1, 2, 3, 1, 4, 1) / kinds:.3f}, 0.0%"]


def test_a_checkpoint_that_is_not_there_is_one_line_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "base_checkpoints" / "d4_dense_s42").mkdir(parents=True)
    (tmp_path / "base_checkpoints" / "d4_dense_s42" / "model_000001.pt").touch()
    with pytest.raises(UserError, match="no checkpoint d4_cl_s42 in .*base_checkpoints, where there are: d4_dense_s42; set NANOCHAT_BASE_DIR"):
        floor_noise.main(["d4_dense_s42", "d4_cl_s42", "--out", str(tmp_path / "out.md"), "--device-type", "cpu"])


def test_one_model_has_no_difference():
    found = rows(np.zeros((1, 2, len(probes.KINDS), 3, 2)), "a")
    assert set(found) == {"kind", "---", *probes.KINDS, "mean of all"} and {len(cells) for cells in found.values()} == {2}
