"""Text to train on: bytes in labelled domains.

    corpus = load_corpus("python")                    # needs no network: the Python installation itself
    corpus.domains                                    # ("prose", "code", "tables")
    tokens, domain = corpus.batch(rng, 16, 128)       # [16, 129] token ids, [16] domain of each sequence

A token is a byte. Because every sequence comes from one domain, whether the experts specialise by
domain can be measured against true labels.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

VOCABULARY = 256
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class DataError(RuntimeError):
    """The text cannot be had, or is too short to train on."""


@dataclass(frozen=True)
class Corpus:
    """Text in D domains, each split into a part to train on and a part held out.

    Attributes:
        domains: D names.
        train, validation: for each domain its bytes, uint8 [n].
    """

    domains: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]

    def only(self, domain: str) -> Corpus:
        """The corpus of one of the domains."""
        d = self.domains.index(domain)
        return Corpus((domain,), (self.train[d],), (self.validation[d],))

    def batch(
        self, rng: np.random.Generator, size: int, context: int, *, held_out: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Random windows, all domains alike: tokens int32 [size, context + 1], domain int32 [size].

        Raises:
            DataError: a domain is shorter than a window.
        """
        texts = self.validation if held_out else self.train
        for name, text in zip(self.domains, texts, strict=True):
            if len(text) <= context:
                raise DataError(
                    f"The {'held-out' if held_out else 'training'} part of the domain {name!r} has "
                    f"{len(text):,} bytes, and a window takes {context + 1:,}. Give a longer text or a "
                    f"smaller --context."
                )
        domain = rng.integers(len(texts), size=size)
        windows = []
        for d in domain:
            start = rng.integers(len(texts[d]) - context)
            windows.append(texts[d][start : start + context + 1])
        return np.stack(windows).astype(np.int32), domain.astype(np.int32)


def load_corpus(dataset: str = "python", text: str = "") -> Corpus:
    """The data set `python`, one domain of it, or `tinyshakespeare`; or the file `text` if one is named."""
    if text:
        try:
            return _split({"text": Path(text).read_bytes()})
        except OSError as error:
            advice = "Give --text a file that you can read."
            raise DataError(f"Cannot read {text}: {error.strerror}. {advice}") from error
    if dataset == "tinyshakespeare":
        path = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, "tinyshakespeare.txt")
        return _split({"shakespeare": path.read_bytes()})
    corpus = _python_corpus()
    return corpus if dataset == "python" else corpus.only(dataset)


def _python_corpus() -> Corpus:
    """The language reference, the modules of the standard library, its tables of character codes."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    codecs = [path.read_bytes() for path in sorted(library.glob("encodings/*.py"))]
    tables = [codec for codec in codecs if b"decoding_table" in codec]
    texts = {"prose": b"\n".join(_topics()), "code": b"\n".join(modules), "tables": b"\n".join(tables)}
    for name, text in texts.items():
        if not text:
            raise DataError(
                f"This Python installation has no text for the domain {name!r} (its library is {library}); "
                f"some distributions leave it out. Train on a file of your own: --text FILE."
            )
    return _split(texts)


def _topics() -> list[bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name].encode() for name in sorted(topics)]


def _split(texts: dict[str, bytes]) -> Corpus:
    """Domain -> text; the last tenth of every text is held out."""
    arrays = [np.frombuffer(text, np.uint8) for text in texts.values()]
    cuts = [len(array) * 9 // 10 for array in arrays]
    train = tuple(array[:cut] for array, cut in zip(arrays, cuts, strict=True))
    validation = tuple(array[cut:] for array, cut in zip(arrays, cuts, strict=True))
    return Corpus(tuple(texts), train, validation)


def download(url: str, sha256: str, name: str, directory: Path | None = None) -> Path:
    """The file at `url`, from the cache `directory` if it is there, else fetched with a progress bar.

    The file appears in the cache only when it is complete and its hash is right, so that an interrupted
    download leaves nothing behind that a later run would trust.

    Raises:
        DataError: there is no network, or what came is another file.
    """
    directory = directory or cache_directory()
    path = directory / name
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=directory, prefix=name)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{url} gave a file whose sha256 is {digest.hexdigest()}, not {sha256}: the download was "
                f"cut short, or a proxy answered in its place. Try again, or fetch the file by another way "
                f"and give it with --text."
            )
        os.replace(partial, path)
    except OSError as error:  # URLError, timeouts and a full disk alike
        reason = getattr(error, "reason", error)
        raise DataError(
            f"Cannot download {url}: {reason}. Without a network, put the file at {path}, give any text with "
            f"--text FILE, or leave out --dataset: the default needs no download."
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def cache_directory() -> Path:
    """Where this user's caches go: $XDG_CACHE_HOME, or what the system has in its place."""
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "moe_rules_callback"
