"""The Hub, with its errors turned into what to do about them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoftUpError, translate
from ..version import __version__

__all__ = ["Repository", "UnreachableError", "cache_alone_if_unreachable", "upload"]

OFFLINE_HELP = (
    "Without a network: 'any' and 'tiny' come with the package. For others, fetch the repository once where there is a "
    "network, then either copy the Hub cache here and pass local_files_only=True (on the command line: set the "
    "environment variable HF_HUB_OFFLINE=1), or pass the path of the file or folder instead of the name (on the "
    "command line: --weights PATH and --backbone-weights FILE)"
)
PATIENCE = 5  # seconds for the Hub's first answer, unless HF_HUB_ETAG_TIMEOUT is set
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
    reachable: bool | None = field(default=None, init=False)  # whether the Hub answers; None until it was asked
    silence: str = field(default="", init=False)  # why it does not

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
        if self.reachable is None:
            self.reachable = not self.local_files_only and self.answers(file)
        client: dict[str, Any] = {"local_files_only": not self.reachable, **CLIENT}
        try:
            return Path(hf.hf_hub_download(self.repo, file, **where, **client))
        except errors.LocalEntryNotFoundError:
            # Neither a path nor None: the cache knows that there is no such file.
            if not isinstance(hf.try_to_load_from_cache(self.repo, file, **where), str | None):
                return None
            message = f"the Hub cannot be reached for {file!r} of {self} ({self.silence}). {OFFLINE_HELP}"
            if self.local_files_only:
                message = f"{file!r} of {self} is not in the Hub cache, and local_files_only=True"
            raise UnreachableError(message) from None  # the client's own account is of some 80 lines
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

    def answers(self, file: str) -> bool:
        """Ask the Hub once; the client itself would ask for a minute and more."""
        import huggingface_hub as hf
        from huggingface_hub import constants, errors

        patience = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else PATIENCE
        try:
            address = hf.hf_hub_url(self.repo, file, revision=self.revision)
            hf.get_hf_file_metadata(address, timeout=patience, **CLIENT)
        except (errors.HFValidationError, errors.EntryNotFoundError, errors.RepositoryNotFoundError):
            return True
        except Exception as error:  # of requests or httpx: no network, a server that fails, offline by setting
            self.silence = str(error).partition("\n")[0] or type(error).__name__
            # What the Hub refuses the client explains.
            return isinstance(error, errors.HfHubHTTPError) and 400 <= error.response.status_code < 429
        return True


@contextlib.contextmanager
def cache_alone_if_unreachable(repo: str) -> Iterator[None]:
    """Keep other libraries to the Hub's cache meanwhile if the Hub does not answer: they would ask for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not Repository(repo).answers("config.json")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
