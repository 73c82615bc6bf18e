"""`dimefm push`: an exported folder as a repository of the Hub."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schemas.evaluation import RESULTS_FILE
from cache_schemas.export import CARD_FILE, EXPORT_FILE, Export
from cache_schemas.latency import LATENCY_FILE
from dimefm.errors import RUN_AGAIN, DimefmError, MismatchError, StoreError
from dimefm.export.card import own_words, read_exported, read_metadata
from dimefm.export.formats import FORMATS
from dimefm.models.exported import require_whole
from dimefm.system import notes
from dimefm.system.near_names import did_you_mean
from dimefm.system.notes import note
from dimefm.system.progress import amount
from dimefm.system.wording import counted
from dimefm.version import __version__

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PLACEHOLDER = re.compile(r"\[More Information Needed\]|\{\{.*?\}\}|\bTODO\b|\bFIXME\b")
_LOG_IN = "make a token that may write, in your settings on the Hub, and give it to `hf auth login` or in HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """An exported folder, and the repository that it goes to."""

    folder: str
    repository: str
    private: bool = False
    """Make the repository private, so that only its owners see it. A public one that exists is refused."""
    revision: str | None = None
    """Branch of the repository that exists. Default: main."""
    message: str | None = None
    """Message of the commit. Default: the name and the format of the model."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.repository) or "--" in self.repository or ".." in self.repository:
            what = f"{self.repository!r} is no name of a repository"
            raise DimefmError(what, remedy="give ORG/NAME, with letters, digits, '-', '_' and '.'")


@dataclass(frozen=True)
class Pushed:
    """Where the folder is now, and whether anything was sent: not if the same files were there."""

    url: str
    changed: bool


def push(config: PushConfig) -> Pushed:
    """Send the files of an exported folder to the Hub, as one commit; large files that are there already are not sent
    again. Everything that can be known before is checked before, the token first. Raises StoreError for a folder that
    is no whole export, and DimefmError for what the Hub refuses."""
    document = read_exported(config.folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=_token())
    with _explained(config, api):
        user = api.whoami()["name"]
    files = _files(Path(config.folder))
    require_whole(config.folder, document, FORMATS[document.format].files)
    _require_card(Path(config.folder) / CARD_FILE)
    _name_others(files, document)
    size = amount(sum(file.stat().st_size for file in files))
    note(f"{config.folder}: sending {counted(len(files), 'file')}, {size}, to {config.repository} as {user} ...")
    with _explained(config, api), _its_words():
        api.create_repo(config.repository, private=config.private or None, exist_ok=True)
        before = _look_at(api, config)
        done = api.create_commit(
            config.repository,
            [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files],
            commit_message=config.message or f"{document.model.name} ({document.format}), by dimefm {__version__}",
            revision=config.revision,
        )
    url = f"{api.endpoint}/{config.repository}" + (f"/tree/{config.revision}" if config.revision else "")
    return Pushed(url, done.oid != before)


def _token() -> str:
    from huggingface_hub import get_token

    if not (token := get_token()):
        raise DimefmError("there is no token for the Hub", remedy=_LOG_IN)
    return token


def _files(folder: Path) -> list[Path]:
    """The plain files of the folder that are not hidden. What is left out is named."""
    entries = sorted(folder.iterdir())
    files = [one for one in entries if one.is_file() and not one.is_symlink() and not one.name.startswith(".")]
    if left := [one.name for one in entries if one not in files]:
        note(f"{folder}: {', '.join(left[:3])}{', ...' * (len(left) > 3)} stay here: folders, links and hidden files")
    return files


def _name_others(files: list[Path], document: Export) -> None:
    """Note which files go, too, though dimefm did not write them: they may not be meant for others."""
    ours = {*document.files, EXPORT_FILE, CARD_FILE, RESULTS_FILE, LATENCY_FILE, "LICENSE"}
    others = [file.name for file in files if file.name not in ours]
    if others and document.files:  # an older document lists none
        note(f"{', '.join(others[:3])}{', ...' * (len(others) > 3)}: sent too, though export did not write this")


def _require_card(path: Path) -> None:
    """Raises StoreError for a folder without a card, or with one that has places left to fill in."""
    if not path.is_file():
        raise StoreError(f"{path} is missing", remedy=f"dimefm card {path.parent} writes it")
    head, text = read_metadata(path)
    if found := _PLACEHOLDER.search(own_words(text)):
        what = f"{path} has a place that is not filled in: {found[0]}"
        raise StoreError(what, remedy="write what belongs there, or take it out")
    if not head.get("license"):
        note(f"{path} names no licence, so that nobody may use the weights: dimefm card {path.parent} --license ID")


def _look_at(api: Any, config: PushConfig) -> str | None:
    """The last commit of the branch that is pushed to. Raises DimefmError for a branch that does not exist, and for a
    public repository where a private one is asked for."""
    info = api.repo_info(config.repository)
    if config.private and not info.private:
        what = f"{config.repository} exists and is public"
        raise MismatchError(what, remedy="make it private in its settings on the Hub, or leave --private out")
    if config.revision is None:
        return str(info.sha)
    branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(config.repository).branches}
    if config.revision not in branches:
        make = f"hf repos branch create {config.repository} {config.revision} makes it"
        what = f"{config.repository} has no branch {config.revision}"
        raise DimefmError(what, remedy=did_you_mean(config.revision, branches, make))
    return str(branches[config.revision])


@contextmanager
def _its_words() -> Iterator[None]:
    """huggingface_hub's progress bars on a terminal, unless --quiet; of its messages errors alone."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled, verbosity = are_progress_bars_disabled(), get_verbosity()
    if notes.are_muted() or not sys.stderr.isatty():
        disable_progress_bars()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if not were_disabled:
            enable_progress_bars()


@contextmanager
def _explained(config: PushConfig, api: Any) -> Iterator[None]:
    """Errors of the Hub and of the way there as a DimefmError."""
    try:
        yield
    except DimefmError:
        raise
    except Exception as error:
        found = next(filter(None, (_meaning(cause, config, api) for cause in _causes(error))), None)
        if found is None:
            raise
        raise found from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _meaning(error: BaseException, config: PushConfig, api: Any) -> DimefmError | None:
    """What an error means to the user; None for one that says nothing of the Hub."""
    names = {base.__name__ for base in type(error).__mro__}
    if "HfHubHTTPError" in names and getattr(error, "response", None) is not None:
        return _answer(error, config)
    if "OfflineModeIsEnabled" in names:
        return DimefmError("HF_HUB_OFFLINE is set, so nothing is sent", remedy="unset HF_HUB_OFFLINE")
    if names & {"TransportError", "RequestException", "ConnectionError", "TimeoutError"}:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return DimefmError(f"the Hub at {api.endpoint} cannot be reached: {reason[0]}", remedy=RUN_AGAIN)
    if isinstance(error, ValueError) and "metadata" in str(error):
        return StoreError(f"the Hub does not take {config.folder}/{CARD_FILE}: {error}", remedy="mend its metadata")
    return None


def _answer(error: Any, config: PushConfig) -> DimefmError:
    """The refusal of the Hub, by its status."""
    status, said = error.response.status_code, str(error.server_message or "").strip()
    why = f" ({said})" if said else ""
    if status == 401:
        return DimefmError(f"the Hub does not know the token{why}", remedy=_LOG_IN)
    if status == 403:
        what = f"the token may not write to {config.repository}{why}"
        return DimefmError(what, remedy="check the name, or give a token that may write there")
    if status == 404:
        return DimefmError(f"the Hub has no {config.repository}, or does not show it{why}", remedy="check the name")
    remedy = f"{RUN_AGAIN}; files that are there are not sent again"
    return DimefmError(f"the Hub answered {status} for {config.repository}{why}", remedy=remedy)
