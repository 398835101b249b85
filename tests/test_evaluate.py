"""nanochat_cl.evaluate: which documents, the same score in whatever batches and on however many ranks, against one document at a time."""
import math
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from nanochat_cl import evaluate
from nanochat_cl.command import UserError

TEXT = ["the old cat sat on the mat and the dog is near the box. All of them were small, so nobody found anything there. " * 20,
        "if it is red, then it is good. Say one two three four five. Again, say that these are those! ( [ ] ) { } " * 20]
TOKENIZER = RustBPETokenizer.train_from_iterator(iter(TEXT), 360)
TOKEN_BYTES = torch.tensor([0 if i >= 360 - len(SPECIAL_TOKENS) else len(TOKENIZER.decode_single_token_bytes(i)) for i in range(360)],
                           dtype=torch.int32)
BOS = TOKENIZER.get_bos_token_id()


def tiny_gpt(seed: int = 0, sequence_len: int = 64, noise: float = 0.3) -> GPT:
    """A random GPT whose every weight matters (upstream's init leaves the output projections at zero)."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=360, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL"))
    model.to_empty(device="cpu")
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def write_documents(path, rows: list[tuple[str, str, str]]) -> None:
    pq.write_table(pa.table(dict(zip(("text", "subdomain", "key"), map(list, zip(*rows))))), path)


def panel_of(lengths: list[int], rows: int, seed: int = 0) -> evaluate.Panel:
    r = np.random.default_rng(seed)
    sequences = [[BOS, *r.integers(0, 360, n)] for n in lengths]  # special tokens come in too
    return evaluate.plan([f"s{i % 3}" for i in range(len(lengths))], sequences, rows, first=[1 + i % 2 * (n // 2) for i, n in enumerate(lengths)])


def one_by_one(model: GPT, panel: evaluate.Panel) -> np.ndarray:
    """The slow way: no padding, no batch, log-probabilities added up token by token."""
    result = []
    for sequence, first in zip(panel.sequences, panel.first):
        ids = torch.from_numpy(sequence)
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.cat([ids[:-1], ids[-1:]])[None])[0].double(), -1)
        scored = [(-logp[t - 1, ids[t]].item(), int(TOKEN_BYTES[ids[t]])) for t in range(first, len(ids)) if TOKEN_BYTES[ids[t]] > 0]
        result.append((sum(n for n, _ in scored), sum(b for _, b in scored)))
    return np.array(result)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), rows=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_one_document_at_a_time_in_whatever_batches(lengths, rows, seed):
    model, panel = tiny_gpt(), panel_of(lengths, rows, seed)
    scores = evaluate.score(model, panel, TOKEN_BYTES)
    expected = one_by_one(model, panel)
    np.testing.assert_allclose(scores[:, 0], expected[:, 0], rtol=1e-5, atol=1e-4)
    assert scores[:, 1].tolist() == expected[:, 1].tolist()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), rows=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_the_plan_deals_out_every_sequence_once_the_longest_first(lengths, rows):
    panel = panel_of(lengths, rows)
    dealt = [i for batch in panel.batches for i in batch]
    assert sorted(dealt) == list(range(len(lengths)))
    assert [lengths[i] for i in dealt] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in panel.batches[:-1]] == [rows] * (len(panel.batches) - 1) and len(panel.batches[-1]) <= rows


def test_no_batch_has_more_tokens_than_memory_is_planned_for_unless_one_sequence_has(monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_TOKENS", 40)
    panel = evaluate.plan(["s"] * 6, [[BOS] * n for n in (9, 50, 20, 19, 2, 8)], rows=3)
    assert panel.batches == ((1,), (2, 3), (0, 5, 4))


def test_a_model_without_an_opinion_needs_ln_v_nats_per_token():
    model = tiny_gpt(noise=0)
    torch.nn.init.zeros_(model.lm_head.weight)
    panel = evaluate.plan(["s"], [[BOS] + TOKENIZER.encode("the old cat sat")], rows=1)
    nats, size = evaluate.score(model, panel, TOKEN_BYTES)[0]
    assert size == len("the old cat sat")
    assert nats == pytest.approx((len(panel.sequences[0]) - 1) * math.log(360), rel=1e-6)


def test_upstreams_bits_per_byte_agree():
    from nanochat.loss_eval import evaluate_bpb
    model, panel = tiny_gpt(), panel_of([30] * 6, rows=6)
    panel = evaluate.plan(panel.subdomains, panel.sequences, rows=6)
    rows = torch.tensor(np.stack(panel.sequences))
    expected = evaluate_bpb(model, [(rows[:, :-1], rows[:, 1:])], 1, TOKEN_BYTES)
    assert evaluate.pooled(evaluate.score(model, panel, TOKEN_BYTES))["bpb"] == pytest.approx(expected, rel=1e-5)


def test_scoring_leaves_no_gradient_and_nothing_changed():
    model, panel = tiny_gpt().train(), panel_of([5, 9], rows=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = evaluate.score(model, panel, TOKEN_BYTES)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(scores, evaluate.score(model, panel, TOKEN_BYTES))


RANKS = """
import sys, numpy as np, torch.distributed as dist
import nanochat_cl
import test_evaluate as t
rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
np.save(f"{out}{rank}.npy", t.evaluate.score(t.tiny_gpt(), t.panel_of(t.LENGTHS, rows=3), t.TOKEN_BYTES))
dist.destroy_process_group()
"""
LENGTHS = [40, 3, 17, 17, 1, 25, 8, 33, 12]


def test_two_ranks_give_the_scores_of_one_bit_for_bit(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(rank), "2", str(tmp_path / "store"), str(tmp_path / "scores")], env=env)
             for rank in range(2)]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    alone = evaluate.score(tiny_gpt(), panel_of(LENGTHS, rows=3), TOKEN_BYTES)
    for rank in range(2):
        assert np.array_equal(np.load(tmp_path / f"scores{rank}.npy"), alone), f"rank {rank} differs from one process"


DOCUMENTS = [(f"document {i} of {s}: " + "the old cat sat on the mat. " * (3 if i % 4 == 0 else 60), s, f"{s}/{i}") for s in ("b", "a") for i in range(12)]


def test_the_same_documents_are_chosen_whatever_the_order_of_the_file(tmp_path):
    write_documents(tmp_path / "val.parquet", DOCUMENTS)
    (tmp_path / "again").mkdir()
    write_documents(tmp_path / "again" / "val.parquet", DOCUMENTS[::-1])
    panels = [evaluate.load_panel(folder / "val.parquet", TOKENIZER, 5, 200, rows=4) for folder in (tmp_path, tmp_path / "again")]
    assert [s.tolist() for s in panels[0].sequences] == [s.tolist() for s in panels[1].sequences]
    assert panels[0].subdomains == ("a",) * 5 + ("b",) * 5
    assert len({tuple(s) for s in panels[0].sequences}) == 10


def test_rows_are_bos_and_the_beginning_and_long_documents_are_preferred(tmp_path):
    write_documents(tmp_path / "val.parquet", [*DOCUMENTS, ("", "a", "empty")])
    texts = {text for text, *_ in DOCUMENTS}
    panel = evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 9, 200, rows=4)
    for row in panel.sequences:
        assert row[0] == BOS and len(row) == 201 and any(text.startswith(TOKENIZER.decode(row[1:].tolist())) for text in texts)
    everything = evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 100, 200, rows=4)  # the short ones fill up, the empty one does not
    assert len(everything.sequences) == 24 and sum(len(row) < 129 for row in everything.sequences) == 6
    assert {tuple(s) for s in panel.sequences} <= {tuple(s) for s in everything.sequences}


def test_what_is_wrong_with_a_held_out_file_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="expected held-out documents .*val.parquet"):
        evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 2, 64, rows=4)
    pq.write_table(pa.table({"text": ["x"], "key": ["k"]}), tmp_path / "val.parquet")
    with pytest.raises(UserError, match="with text, subdomain and key"):
        evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 2, 64, rows=4)
    (tmp_path / "val.parquet").write_bytes(b"not a table")
    with pytest.raises(UserError, match="with text, subdomain and key") as e:
        evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 2, 64, rows=4)
    assert "\n" not in str(e.value)
    write_documents(tmp_path / "val.parquet", [("", "a", "k")])
    with pytest.raises(UserError, match="found none"):
        evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 2, 64, rows=4)


def test_the_summary_weighs_sub_domains_alike_and_documents_by_their_bytes():
    panel = evaluate.plan(["x", "y", "x"], [[BOS, 1]] * 3, rows=1)
    scores = np.array([[math.log(2) * 10, 10], [math.log(2) * 30, 10], [math.log(2) * 20, 5]])
    result = evaluate.summary(panel, scores)
    assert result["subdomains"]["x"]["bpb"] == pytest.approx(30 / 15) and result["subdomains"]["y"]["bpb"] == pytest.approx(3)
    assert result["bpb"] == pytest.approx(2.5)
    assert result["subdomains"]["x"]["docs"] == [[scores[0, 0], 10], [scores[2, 0], 5]]
    assert evaluate.bpb(1.0, 0) == math.inf


def test_the_constant_share_is_the_arms_own_and_counts_scored_tokens_only():
    panel = evaluate.plan(["x"] * 3, [[BOS, *range(1, n)] for n in (65, 11, 41)], rows=1, first=[1, 1, 13])
    # 64 targets, 16 early; 10, all early; targets 13..40 are predicted at positions 12..39, 4 of the 28 early
    for changed, early in (({}, 16 + 10 + 4), ({"reach": "row"}, 16 + 10 + 4), ({"chunk": 8}, 8 + 8), ({"reach": "token", "chunk": 1}, 1 + 1)):
        assert evaluate.constant_share(panel, {"bos": BOS, "reach": "bos", "chunk": 512, **changed}) == pytest.approx(early / (64 + 10 + 28)), changed


def test_a_row_is_full_where_a_token_is_many_characters(tmp_path):
    class Words:
        def get_bos_token_id(self):
            return 0

        def encode(self, texts, prepend):
            return [[prepend] + [1] * len(text.split()) for text in texts] if isinstance(texts, list) else [prepend] + [1] * len(texts.split())
    write_documents(tmp_path / "val.parquet", [("fourteenletter " * 900, "a", "k")])
    assert [len(s) for s in evaluate.load_panel(tmp_path / "val.parquet", Words(), 2, 50, rows=4).sequences] == [51]


def test_which_documents_are_asked_is_no_matter_of_their_names(tmp_path):
    from nanochat_cl.holdout import digest
    write_documents(tmp_path / "val.parquet", [(f"document {i} " * 100, "a", f"{i:02}") for i in range(40)])
    panel = evaluate.load_panel(tmp_path / "val.parquet", TOKENIZER, 5, 64, rows=4)
    asked = [re.match(r"document (\d+)", TOKENIZER.decode(s[1:].tolist()))[1] for s in panel.sequences]
    assert asked == [f"{i}" for i in sorted(range(40), key=lambda i: digest(f"{i:02}"))[:5]]
