"""The Hub of Hugging Face: what may be fetched or run when a document, and not the user, names a model."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import open_clip
from huggingface_hub import constants
from open_clip import factory

from cache_schemas.run import CONFIG_FILE, WEIGHTS_FILE
from dimefm.errors import TeacherError
from dimefm.models.names import TIMM

_T = TypeVar("_T")

_OTHER_WEIGHTS = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")  # of older repositories
_HUB = ("hf-hub:", "hf_hub:")
_TOKENIZER = frozenset(
    ("clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens", "use_fast", "padding_side",
     "do_lower_case", "add_prefix_space", "model_max_length")
)  # fmt: skip


def require_cached(name: str, where: str) -> None:
    """Raises TeacherError if loading `name`, which the document `where` names, would fetch a model from the Hub for the
    first time: an hf-hub: name, and the models that a folder's config names, must be in the cache of huggingface_hub.

    Names and tags from the lists of open_clip and timm are not checked: these decide where they come from.
    """
    if name.startswith(f"{TIMM}{_HUB[0]}") and not _cached(name.removeprefix(f"{TIMM}{_HUB[0]}"), "config.json"):
        raise _would_be_fetched(name, name, where)
    if name.startswith(_HUB[0]):
        repository = name.removeprefix(_HUB[0])
        weights = (WEIGHTS_FILE, *_OTHER_WEIGHTS)
        if not (_cached(repository, CONFIG_FILE) and any(_cached(repository, file) for file in weights)):
            raise _would_be_fetched(name, name, where)
    if name.startswith(("hf-hub:", "local-dir:")):
        try:
            config = open_clip.get_model_config(name)
        except (OSError, ValueError):  # a folder that is not there: loading it will say so
            return
        _require_towers_here(config, name, where)


def repository_of(name: str, pretrained: str | None) -> str | None:
    """The repository of the Hub, ORG/MODEL, that a model comes from: that of an hf-hub: name, or of a tag of open_clip;
    None where there is none."""
    known = name.partition(":")[2].partition("@")[0] if name.startswith(_HUB) else ""
    if pretrained:
        known = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained).get("hf_hub", "")
    found = re.match(r"[\w.-]+/[\w.-]+", known)
    return found[0] if found else None


def require_plain_tokenizer(name: str, model_cfg: Mapping[str, Any]) -> None:
    """Raises TeacherError if the config of a model hands its tokenizer more than options for cutting text. open_clip
    passes all of them on, and trust_remote_code would run code from the folder. No option of dimefm allows that."""
    unknown = sorted(model_cfg.get("text_cfg", {}).get("tokenizer_kwargs", {}).keys() - _TOKENIZER)
    if unknown:
        what = f"the config of {name} hands its tokenizer {', '.join(unknown)}, which could fetch or run something"
        raise TeacherError(what, remedy=f"take that out of tokenizer_kwargs in its {CONFIG_FILE}")


@contextmanager
def offline() -> Iterator[None]:
    """Within the block nothing is asked of the Hub: files come from its cache on this machine."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_first(load: Callable[[], _T]) -> _T:
    """What `load` returns without asking the Hub; if that fails, what it returns when it may ask. Of the processes of a
    machine that come to that at once, one asks; the others wait for it, and then find the files in the cache.

    So many processes do not ask for what one of them has fetched: the Hub soon refuses requests (429), and weights that
    change on the Hub in between are not mixed. If it must be asked, its client waits for as long as a 429 says.
    """
    with suppress(TeacherError, OSError), offline():  # OSError: from a tokenizer or a config
        return load()
    with _one_of_this_machine():
        with suppress(TeacherError, OSError), offline():
            return load()
        return load()


@contextmanager
def _one_of_this_machine() -> Iterator[None]:
    """For the block, other processes that come here wait. Those that have waited enter it together, because by then
    they need not ask. Where there can be no lock, as in some caches on a network, huggingface_hub still sees to it that
    each file is fetched once; it asks about each file in every process, though."""
    lock = Path(constants.HF_HUB_CACHE, ".locks", "dimefm.lock")
    with ExitStack() as stack:
        with suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def fetch_weights(name: str) -> None:
    """Fetch the weights of ``hf-hub:ORG/MODEL``, if they are not in the cache. Raises FileNotFoundError if that fails,
    where open_clip would only log why."""
    factory.download_pretrained_from_hf(name.removeprefix(_HUB[0]))


def preprocess_config(name: str) -> dict[str, Any]:
    """The part on images of the config of ``hf-hub:ORG/MODEL`` or ``local-dir:FOLDER``, which open_clip has read."""
    where, _, model = name.partition(":")
    path = Path(model, CONFIG_FILE)
    if where == "hf-hub":
        path = Path(factory.download_pretrained_from_hf(model, filename=CONFIG_FILE))
    return json.loads(path.read_text(encoding="utf-8")).get("preprocess_cfg") or {}


def _require_towers_here(config: Mapping[str, Any], name: str, where: str) -> None:
    """Raises TeacherError if a model of timm or transformers that a config names is not in the cache."""
    tower = config.get("vision_cfg", {}).get("timm_model_name") or ""
    text = config.get("text_cfg", {}).get("hf_model_name") or ""
    if tower.startswith(_HUB) and not _cached(tower[len(_HUB[0]) :], "config.json"):
        raise _would_be_fetched(tower, name, where)
    if text and not _cached(text, "config.json"):
        raise _would_be_fetched(text, name, where)


def _cached(repository: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repository, file), str)
    except ValueError:  # it is not the name of a repository
        return False


def _would_be_fetched(model: str, name: str, where: str) -> TeacherError:
    what = f"{where} names the teacher {name}, and {model} is not on this machine: it would be fetched"
    remedy = f"to allow that, name it yourself: --teacher {name}; for evaluate, give that to dimefm export first"
    return TeacherError(what, remedy=remedy)
