"""Where runs lie: a folder of this machine, or a URL of any file system that fsspec knows.

    as_path("runs/demo")                a pathlib.Path
    as_path("gs://bucket/runs/demo")    a UPath, which has the same methods

`Path("gs://bucket")` is a local folder, `gs:/bucket`: what may be a URL becomes a path here and nowhere
else. Credentials and such come from where its file system looks for them, or with a UPath:
`UPath("s3://bucket/runs/demo", profile="me")`.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .errors import HistoryError, MoeRulesError, TryAgain

if TYPE_CHECKING:
    from upath import UPath
    from zarr.abc.store import Store

AnyPath: TypeAlias = "Path | UPath"


def as_path(where: str | AnyPath) -> AnyPath:
    """A path on this machine, or a UPath for what has a protocol, other than `file://`.

    Raises:
        HistoryError: nobody knows the protocol, or its package is not installed; or it is a URL no more.
    """
    if re.match(r"\w\w+:/(?!/)", str(where)):
        raise HistoryError(
            f"{where} was a URL before pathlib.Path took one of its slashes. Pass the URL as text, or as a "
            "UPath of universal_pathlib."
        )
    if "://" not in str(where):
        return Path(str(where))
    from upath import UPath

    try:
        path = UPath(where)
        _ = path.fs  # imports its package
    except (ImportError, ValueError) as error:
        raise HistoryError(
            f"{where} cannot be reached: {error}. Most file systems are packages of their own; install "
            "that of this one: gcsfs for gs://, s3fs for s3://, adlfs for az://, aiohttp and requests for "
            "https://."
        ) from error
    return Path(path.path) if path.protocol in ("file", "local") else path


@contextlib.contextmanager
def retried(path: AnyPath) -> Iterator[None]:
    """What is done in here may succeed later if the file system of `path` fails now.

    Raises:
        TryAgain: in the place of its errors. Those of a remote one may be of any kind.
    """
    errors = OSError if isinstance(path, Path) else Exception
    try:
        yield
    except MoeRulesError:
        raise
    except errors as error:
        raise TryAgain(f"{type(error).__name__}: {error}") from error


def claim(path: AnyPath) -> None:
    """Make an empty file that must not be there yet: of several processes that try, one succeeds.

    That is promised by local disks, gs://, s3:// and az://. Other file systems may look first and then
    write, so that two processes within the same instant both succeed.

    Raises:
        FileExistsError: it is there.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    else:
        path.fs.pipe_file(path.path, b"", mode="create")


def put(files: Mapping[AnyPath, bytes]) -> None:
    """Write files of one file system, each in one piece: who reads it finds what was there, or all of this.

    They are written one after the other here, and all at once in an object store.
    """
    remote = [path for path in files if not isinstance(path, Path)]
    if remote:
        remote[0].fs.pipe({path.path: files[path] for path in remote})
    for path in files:
        if isinstance(path, Path):
            _replace(path, files[path])


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            partial.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
        partial.replace(path)
    except BaseException:  # a disk that is full is not to be filled with these
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def is_there(path: AnyPath) -> bool:
    """Whether a file exists. Of a remote one `exists` says no, too, where its file system fails."""
    if isinstance(path, Path):
        return path.exists()
    try:
        path.fs.info(path.path)
    except FileNotFoundError:
        return False
    return True


def names_in(folder: AnyPath) -> Iterator[str]:
    """What a folder holds at this moment; nothing if there is none."""
    try:
        if isinstance(folder, Path):
            yield from (path.name for path in folder.iterdir())
        else:  # not `iterdir`, for which there is no folder where its file system fails
            folder.fs.invalidate_cache()  # fsspec remembers listings, and others write there too
            yield from (Path(found).name for found in folder.fs.ls(folder.path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return


def zarr_store(path: AnyPath, read_only: bool = False) -> Store:
    """The zarr store at a path, there or not."""
    from zarr.storage import FsspecStore, LocalStore

    if isinstance(path, Path):
        return LocalStore(path, read_only=read_only)
    # by its URL: zarr needs a file system of its own, whose connections belong to zarr's event loop
    return FsspecStore.from_url(str(path), storage_options=dict(path.storage_options), read_only=read_only)
