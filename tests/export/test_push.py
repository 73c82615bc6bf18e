"""`push` against a stand-in of the Hub on loopback: one commit, nothing sent twice, and the token to its host alone."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from cache_schemas.export import EXPORT_FILE
from dimefm.errors import DimefmError, MismatchError, StoreError
from dimefm.export.card import CardConfig, write_card
from dimefm.export.push import PushConfig, Pushed, push
from dimefm.models.exported import read_export
from tests.hub import PART, TOKEN, Hub, running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield found


def send(folder: Path, repository: str = "org/student", **options: Any) -> Pushed:
    return push(PushConfig(folder=str(folder), repository=repository, **options))


def uploads(hub: Hub) -> int:
    return sum(request.startswith("PUT ") for request in hub.requests)


def test_a_folder_becomes_a_repository_by_one_commit(
    hub: Hub, student: Path, evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(str(student), CardConfig(evaluation=(str(evaluation),), license="mit"))
    (student / "features").mkdir()
    (student / ".hidden").write_text("x")
    (student / "link").symlink_to("/etc/hostname")
    done = send(student)
    assert done == Pushed(f"{hub.endpoint}/org/student", True)
    names = {file.name for file in student.iterdir()} - {"features", ".hidden", "link"}
    assert set(hub.repositories["org/student"].branches["main"]) == names
    assert "too, though" not in capsys.readouterr().err
    for name in names:
        assert hub.content("org/student", name) == (student / name).read_bytes()
    assert (student / WEIGHTS).stat().st_size > PART  # it went in parts
    assert [message for _, message in hub.repositories["org/student"].commits] == [
        "student (open_clip), by dimefm 0.1.0"
    ]
    assert hub.tokens["storage"] == {None}


def test_the_same_folder_twice_is_one_commit(hub: Hub, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(student, private=True)
    before = uploads(hub)
    capsys.readouterr()
    assert not send(student, private=True).changed
    assert "empty commit" not in capsys.readouterr().err  # huggingface_hub's own words
    assert uploads(hub) == before
    write_card(str(student), CardConfig(license="mit"))
    (student / "notes.txt").write_text("mine")
    assert send(student, message="A licence").changed
    assert uploads(hub) == before  # the weights are there
    assert "notes.txt: sent too, though export did not write this" in capsys.readouterr().err
    repository = hub.repositories["org/student"]
    assert repository.private
    assert [message for _, message in repository.commits][1:] == ["A licence"]


def test_what_was_uploaded_before_a_failure_is_not_sent_again(hub: Hub, student: Path) -> None:
    parts = -(-(student / WEIGHTS).stat().st_size // PART)
    tokenizer = -(-(student / "tokenizer.json").stat().st_size // PART)
    hub.refuse_uploads_after = parts + tokenizer - 1
    with pytest.raises(DimefmError, match=r"the upload has expired(?s:.*)not sent again"):
        send(student)
    assert not hub.repositories["org/student"].commits
    kept = set(hub.objects)
    assert len(kept) == 1
    hub.refuse_uploads_after = None
    before = len(hub.requests)
    assert send(student).changed
    again = [request for request in hub.requests[before:] if request.startswith("PUT ")]
    assert again
    assert not [request for request in again if request[5:].partition("/")[0] in kept]


def test_a_branch_must_exist(hub: Hub, student: Path) -> None:
    send(student)
    with pytest.raises(DimefmError, match=r"has no branch next(?s:.*)branch create org/student next"):
        send(student, revision="next")
    hub.repositories["org/student"].branches["next"] = {}
    assert send(student, revision="next").url == f"{hub.endpoint}/org/student/tree/next"
    assert hub.content("org/student", "README.md", "next") == (student / "README.md").read_bytes()


def test_what_may_be_known_before_is_refused_before_anything_is_made(
    hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(message: str, error: type[DimefmError] = DimefmError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            send(student, **options)
        assert not hub.repositories

    for name in ("student", "org/a/b", "org/-x", "org/a--b", "org/ä", "", "https://x/y"):
        refused("is no name of a repository", repository=name)
    refused(r"may not write to others/student \(You don't have", repository="others/student")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("does not know the token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.requests.clear()
    refused(r"there is no token(?s:.*)hf auth login")
    assert not hub.requests


def test_a_folder_that_is_not_whole_is_not_published(hub: Hub, student: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(StoreError, match=message):
            send(student)
        assert not hub.repositories

    readme = student / "README.md"
    card = readme.read_text()
    readme.write_text(card + "[More Information Needed]\n")
    refused("a place that is not filled in")
    readme.unlink()
    refused(r"README.md is missing(?s:.*)dimefm card")
    readme.write_text(card)
    weights = student / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("is not what export wrote")
    weights.unlink()
    refused(f"{WEIGHTS} is missing")
    document = dataclasses.replace(read_export(str(student)), files={})  # as an earlier release wrote it
    (student / EXPORT_FILE).write_text(json.dumps(document.to_json()))
    refused(f"{WEIGHTS} is missing")


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, student: Path) -> None:
    send(student)
    (student / "LICENSE").write_text("mine")
    with pytest.raises(MismatchError, match="exists and is public"):
        send(student, private=True)
    assert "LICENSE" not in hub.repositories["org/student"].branches["main"]


def test_metadata_that_the_hub_refuses(hub: Hub, student: Path) -> None:
    readme = student / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mine\n", 1))
    with pytest.raises(StoreError, match=r"does not take(?s:.*)license"):
        send(student)


def test_no_way_to_the_hub(hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DimefmError, match=r"Hub at http://127.0.0.1:9 cannot be reached(?s:.*)run the same command"):
        send(student)
