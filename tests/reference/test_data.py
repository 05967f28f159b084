"""Texts, windows, and the download against a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from reference import data
from reference.data import Corpus, DataError, download, load_corpus

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(HTTPServer):
    """Gives `answer`, claims `length` bytes of it, and remembers in `paths` what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.length, self.paths = CONTENT, len(CONTENT), []
        self.url = f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_cached(server, tmp_path):
    first = download(server.url, SHA256, "text.txt", tmp_path / "cache")
    assert first == tmp_path / "cache" / "text.txt"
    assert first.read_bytes() == CONTENT
    assert download(server.url, SHA256, "text.txt", tmp_path / "cache") == first
    assert server.paths == ["/input.txt"]
    assert list(first.parent.iterdir()) == [first]


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    (tmp_path / "text.txt").write_bytes(CONTENT[:-1])
    assert download(server.url, SHA256, "text.txt", tmp_path).read_bytes() == CONTENT


def test_another_file_is_refused_and_leaves_nothing(server, tmp_path):
    server.answer = b"<html>Please log in.</html>"
    server.length = len(server.answer)
    got = hashlib.sha256(server.answer).hexdigest()
    with pytest.raises(DataError) as raised:
        download(server.url, SHA256, "text.txt", tmp_path)
    assert str(raised.value) == (
        f"{server.url} gave a file whose sha256 is {got}, not {SHA256}: the download was cut short, or a "
        f"proxy answered in its place. Try again, or fetch the file by another way and give it with --text."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.answer = CONTENT[:-100]
    with pytest.raises(DataError, match="the download was cut short"):
        download(server.url, SHA256, "text.txt", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_what_to_do(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as raised:
        download(server.url, SHA256, "text.txt", tmp_path)
    message = str(raised.value)
    assert message.startswith(f"Cannot download {server.url}: ")
    assert "refused" in message
    assert message.endswith(
        f"Without a network, put the file at {tmp_path / 'text.txt'}, give any text with --text FILE, or "
        f"leave out --dataset: the default needs no download."
    )
    assert list(tmp_path.iterdir()) == []


def test_tinyshakespeare_comes_from_its_address(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", SHA256)
    corpus = load_corpus("tinyshakespeare")
    assert corpus.domains == ("shakespeare",)
    assert corpus.train[0].tobytes() + corpus.validation[0].tobytes() == CONTENT
    assert (tmp_path / "moe_rules_callback" / "tinyshakespeare.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
)
def test_cache_directory_of_each_system(platform, expected, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(data.sys, "platform", platform)
    assert data.cache_directory() == tmp_path / expected / "moe_rules_callback"


def test_the_python_corpus_has_three_labelled_domains():
    corpus = load_corpus()
    assert corpus.domains == ("prose", "code", "tables")
    prose, code, tables = (text.tobytes() for text in corpus.train)
    assert b'The "assert" statement' in prose
    assert b"def main" in code
    assert b"decoding_table" in tables
    for train, validation in zip(corpus.train, corpus.validation, strict=True):
        assert len(validation) / (len(train) + len(validation)) == pytest.approx(0.1, abs=1e-3)


def test_a_python_without_sources_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no text for the domain 'code' .* --text FILE"):
        load_corpus()


def test_a_file_of_any_encoding(tmp_path):
    content = bytes(range(256)) * 10
    (tmp_path / "any.txt").write_bytes(content)
    corpus = load_corpus(text=str(tmp_path / "any.txt"))
    assert (corpus.train[0].tobytes(), corpus.validation[0].tobytes()) == (content[:2304], content[2304:])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"No such file or directory\. Give --text a file that you can"):
        load_corpus(text=str(tmp_path / "absent.txt"))


CORPUS = Corpus(
    ("low", "high"),
    (np.arange(0, 60, dtype=np.uint8), np.arange(100, 160, dtype=np.uint8)),
    (np.arange(60, 80, dtype=np.uint8), np.arange(160, 180, dtype=np.uint8)),
)


@pytest.mark.parametrize(("held_out", "low", "end"), [(False, 0, 60), (True, 60, 80)])
def test_windows_are_runs_of_text_from_their_domain(held_out, low, end):
    tokens, domain = CORPUS.batch(np.random.default_rng(0), 400, 9, held_out=held_out)
    assert tokens.shape == (400, 10)
    assert (tokens.dtype, domain.dtype) == (np.int32, np.int32)
    assert (np.diff(tokens, axis=1) == 1).all()
    assert (tokens // 100 == domain[:, None]).all()
    assert 150 < domain.sum() < 250
    first, last = tokens[:, 0] - 100 * domain, tokens[:, -1] - 100 * domain
    assert (first.min(), last.max()) == (low, end - 1)  # the first and the last window occur too


def test_the_generator_decides():
    one, same, other = (CORPUS.batch(np.random.default_rng(seed), 8, 9)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_window_longer_than_the_text():
    with pytest.raises(DataError) as raised:
        CORPUS.batch(np.random.default_rng(0), 8, 20, held_out=True)
    assert str(raised.value) == (
        "The held-out part of the domain 'low' has 20 bytes, and a window takes 21. Give a longer text or a "
        "smaller --context."
    )
