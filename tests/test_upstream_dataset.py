"""nanochat.dataset: which shards there are, reading them, and downloading them (from a server on this machine)."""
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.command import UserError


def write_shard(path, documents: list[str], row_group_size: int) -> None:
    pq.write_table(pa.table({"text": documents}), path, row_group_size=row_group_size)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    folder = tmp_path / "base_data_climbmix"
    folder.mkdir()
    monkeypatch.setattr(dataset, "base_dir", str(tmp_path))
    monkeypatch.setattr(dataset, "DATA_DIR", str(folder))
    return folder


def test_shards_are_listed_by_name_and_the_last_is_validation(data_dir):
    for i in (2, 0, 1):
        write_shard(data_dir / dataset.index_to_filename(i), [f"{i}{c}" for c in "abcde"], row_group_size=2)
    (data_dir / "shard_00009.parquet.tmp").write_bytes(b"a download that was cut off")
    assert [p.rsplit("/", 1)[1] for p in dataset.list_parquet_files()] == [f"shard_0000{i}.parquet" for i in range(3)]
    assert list(dataset.parquets_iter_batched("train")) == [["0a", "0b"], ["0c", "0d"], ["0e"], ["1a", "1b"], ["1c", "1d"], ["1e"]]
    assert list(dataset.parquets_iter_batched("val")) == [["2a", "2b"], ["2c", "2d"], ["2e"]]
    with pytest.raises(AssertionError, match="test"):
        next(dataset.parquets_iter_batched("test"))


def test_strided_readers_share_the_row_groups_without_overlap(data_dir):
    for i in range(3):
        write_shard(data_dir / dataset.index_to_filename(i), [f"{i}/{j}" for j in range(11)], row_group_size=2)
    everything = [d for group in dataset.parquets_iter_batched("train") for d in group]
    parts = [[d for group in dataset.parquets_iter_batched("train", start=r, step=4) for d in group] for r in range(4)]
    assert sorted(sum(parts, [])) == sorted(everything) and len(set(everything)) == 22


def test_without_the_current_folder_the_legacy_one_serves_and_without_both_the_command_is_named(data_dir, tmp_path, capsys):
    data_dir.rmdir()
    with pytest.raises(FileNotFoundError, match="base_data_climbmix.*nanochat.dataset"):
        dataset.list_parquet_files()
    (tmp_path / "base_data").mkdir()
    write_shard(tmp_path / "base_data" / "shard_00000.parquet", ["a"], 1)
    assert dataset.list_parquet_files() == [str(tmp_path / "base_data" / "shard_00000.parquet")]
    assert capsys.readouterr().out == ""
    dataset.list_parquet_files(warn_on_legacy=True)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_truncated_shard_and_one_without_text_are_named_with_what_to_do(data_dir):
    good = data_dir / "shard_00000.parquet"
    write_shard(good, ["a" * 1000], 1)
    cut = data_dir / "shard_00001.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    pq.write_table(pa.table({"body": ["a"]}), data_dir / "shard_00002.parquet")
    with pytest.raises(ValueError, match=r"shard_00001\.parquet.*Delete it"):
        dataset.open_shard(str(cut))
    with pytest.raises(ValueError, match=r"shard_00002\.parquet.*`text` column"):
        list(dataset.parquets_iter_batched("val"))


def test_damage_inside_a_row_group_is_named(data_dir):
    path = data_dir / "shard_00000.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 50 for i in range(100)]}), path, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[40:400] = bytes(360)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"shard_00000\.parquet \(row group 0\)"):
        list(dataset.parquets_iter_batched("val"))


# --- download ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(data_dir, monkeypatch):
    """Serves every path as its own name in bytes; `failures` many requests fail first, in turn by status and by a short body."""
    class Handler(BaseHTTPRequestHandler):
        failures, requests = 0, 0

        def do_GET(self):
            Handler.requests += 1
            body = self.path.encode() * 100
            if Handler.failures > 0:
                Handler.failures -= 1
                if Handler.failures % 2:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:50])
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: httpd.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    monkeypatch.setattr(dataset, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setattr(dataset.time, "sleep", lambda seconds: Handler.slept.append(seconds))
    Handler.slept = []
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def test_a_download_survives_failed_and_short_answers_and_appears_only_when_complete(server, data_dir):
    server.failures = 4
    assert dataset.download_single_file(7)
    assert (data_dir / "shard_00007.parquet").read_bytes() == b"/shard_00007.parquet" * 100
    assert [p.name for p in data_dir.iterdir()] == ["shard_00007.parquet"]
    assert server.slept == [2, 4, 8, 16]


def test_a_shard_that_is_there_is_not_fetched_again(server, data_dir):
    (data_dir / "shard_00003.parquet").write_bytes(b"mine")
    assert dataset.download_single_file(3)
    assert server.requests == 0 and (data_dir / "shard_00003.parquet").read_bytes() == b"mine"


def test_after_five_failures_the_download_gives_up_and_leaves_nothing_behind(server, data_dir):
    server.failures = 99
    assert dataset.download_single_file(7) is False
    assert server.requests == 5 and list(data_dir.iterdir()) == []


def test_the_command_always_fetches_the_validation_shard_as_well(server, data_dir, monkeypatch):
    monkeypatch.setattr(dataset, "Pool", lambda processes: ThreadPool(processes))
    dataset.main(["-n", "2", "-w", "2"])
    assert sorted(p.name for p in data_dir.iterdir()) == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]


def test_an_unreachable_hub_ends_the_command_with_one_clear_line(server, data_dir, monkeypatch):
    monkeypatch.setattr(dataset, "Pool", lambda processes: ThreadPool(processes))
    server.failures = 10 ** 6
    with pytest.raises(UserError) as stop:
        dataset.main(["-n", "1"])
    assert "2 of 2 shards could not be downloaded" in str(stop.value) and "\n" not in str(stop.value)
