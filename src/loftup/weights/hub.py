"""The Hub, with its errors turned into what to do about them."""

import os
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoftUpError, translate
from ..version import __version__

__all__ = ["Repository", "UnreachableError", "upload"]

OFFLINE_HELP = (
    "Without a network: fetch the repository once where there is one, then either copy the Hub cache here and pass "
    "local_files_only=True (on the command line: set the environment variable HF_HUB_OFFLINE=1), or pass the path of "
    "the file or folder instead of the name (on the command line: --weights PATH and --backbone-weights FILE)"
)
CLIENT: dict[str, Any] = {"library_name": "loftup", "library_version": __version__}


class UnreachableError(LoftUpError):
    """A file is not in the cache, and the Hub does not answer or must not be asked."""


@dataclass
class Repository:
    """Files of one Hub repository, through the Hub's cache."""

    repo: str  # "user/name"
    _: KW_ONLY
    revision: str | None = None  # branch, tag or commit; None means the default branch
    cache_dir: "str | os.PathLike[str] | None" = None  # where files are kept; None means the Hub's default cache
    local_files_only: bool = False  # never ask the network
    unreachable: bool = field(default=False, init=False)  # the Hub has not answered

    def __str__(self) -> str:
        return f"the Hub repository {self.repo!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def fetch(self, file: str) -> Path | None:
        """Path of a file in the cache, downloaded if need be; None if the repository has no such file.

        Raises:
            LoftUpError: the repository or revision does not exist, is private, the Hub is unreachable, or the
                download broke off.
        """
        import huggingface_hub as hf
        from huggingface_hub import errors

        cache_dir = None if self.cache_dir is None else Path(self.cache_dir)
        where: dict[str, Any] = {"revision": self.revision, "cache_dir": cache_dir}
        # Once the client has given up after its retries, further files come from the cache alone.
        client: dict[str, Any] = {"local_files_only": self.local_files_only or self.unreachable, **CLIENT}
        try:
            return Path(hf.hf_hub_download(self.repo, file, **where, **client))
        except errors.LocalEntryNotFoundError as error:
            if hf.try_to_load_from_cache(self.repo, file, **where) is hf._CACHED_NO_EXIST:
                self.unreachable = True
                return None
            message = f"the Hub cannot be reached for {file!r} of {self}. {OFFLINE_HELP}"
            if self.local_files_only:
                message = f"{file!r} of {self} is not in the Hub cache, and local_files_only=True"
            raise UnreachableError(message) from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # requests, httpx, disk: which ones differs between versions of the client
            login = "log in with `hf auth login`"
            messages = {
                errors.GatedRepoError: f"{self} is gated: ask for access on its page, then {login}",
                errors.RepositoryNotFoundError: f"there is no Hub repository {self.repo!r}, or it is private (then "
                f"{login}); `loftup list` shows the published weights",
                errors.RevisionNotFoundError: f"the Hub repository {self.repo!r} has no revision {self.revision!r}",
                errors.HFValidationError: f"{self.repo!r} is not a valid Hub repository id: {error}",
                Exception: f"downloading {file!r} of {self} failed: {error}. Try again: what has arrived is kept. "
                f"{OFFLINE_HELP}",
            }
            raise LoftUpError(next(text for kind, text in messages.items() if isinstance(error, kind))) from error


def upload(folder: str, repo: str, *, private: bool, token: str | None, commit_message: str) -> str:
    """Create the repository where needed and commit all files of ``folder``; returns the commit's address."""
    import huggingface_hub as hf

    if token is None and hf.get_token() is None:
        raise LoftUpError("pushing needs a Hub token: log in with `hf auth login` or pass token=")
    api = hf.HfApi(token=token, **CLIENT)
    with translate(Exception, lambda error: f"pushing to the Hub repository {repo!r} failed: {error}"):  # as in fetch
        target = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit: Any = api.upload_folder(repo_id=target, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)
