"""nanochat_cl.tokenizer: when a trained one is kept, and when it is refused."""
import pytest

from nanochat_cl import corpus, files, tokenizer
from nanochat_cl.command import UserError


def test_another_domain_does_not_cost_the_tokenizer_and_another_vocabulary_is_refused(tmp_path, monkeypatch, capsys):
    from nanochat import common
    monkeypatch.setattr(common, "get_base_dir", lambda: str(tmp_path))
    monkeypatch.setattr(corpus, "complete", lambda profile: {"files": {"shard_00000.parquet": "pruned for a second domain"}})
    args = tokenizer.parse(["--vocab-size", "1024", "--max-chars", "100"])
    files.write_json(tmp_path / "tokenizer" / "made_with.json",
                     {"vocab_size": 1024, "max_chars": 100, "corpus_files": {"shard_00000.parquet": "as it was"}})
    tokenizer.train(args)
    assert "complete: 1,024 entries" in (said := capsys.readouterr().out) and "has changed since" in said
    with pytest.raises(UserError, match="vocab_size: 1024 -> 2048"):
        tokenizer.train(tokenizer.parse(["--vocab-size", "2048", "--max-chars", "100"]))
