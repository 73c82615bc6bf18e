"""Files and folders by local path or fsspec URL: the few operations that stores need.

    places     what a path or URL is, and its fsspec file system
    failures   errors of any storage made the same: OSErrors that name a file, StoreErrors with a remedy
    durable    local files seen through to the disk
    files      read, write atomically, remove; JSON
    folders    list, publish whole, clean up, remove

Use it as `from dimefm.system import storage`, and `storage.read_bytes(...)`.
"""

from dimefm.system.storage.durable import flush, flush_tree, make_folder, missing, remove_empty
from dimefm.system.storage.failures import GONE, asking, cannot_write, naming, remedy_for, writing_to
from dimefm.system.storage.files import (
    create,
    digest_file,
    exists,
    json_bytes,
    read_bytes,
    read_json,
    refuses_second,
    remove_file,
    size,
    write_atomic,
    write_json,
    writing_atomically,
)
from dimefm.system.storage.folders import (
    listing,
    publishing,
    remove_folder,
    remove_leftovers,
    tree,
    walk,
    walk_local,
)
from dimefm.system.storage.places import CONNECTIONS, absolute, filesystem, is_url, join, local

__all__ = [
    "CONNECTIONS", "GONE", "absolute", "asking", "cannot_write", "create", "digest_file", "exists", "filesystem",
    "flush", "flush_tree", "is_url", "join", "json_bytes", "listing", "local", "make_folder", "missing", "naming",
    "publishing", "read_bytes", "read_json", "refuses_second", "remedy_for", "remove_empty", "remove_file",
    "remove_folder", "remove_leftovers", "size", "tree", "walk", "walk_local", "write_atomic", "write_json",
    "writing_atomically", "writing_to",
]  # fmt: skip
