"""What a mistyped name was probably meant to be."""

from pathlib import Path

import pytest

from dimefm.system.near_names import did_you_mean, did_you_mean_path, near_names

KNOWN = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50", "RN101"]


def test_the_nearest_comes_first_whatever_its_capitals_and_hyphens() -> None:
    assert near_names("vit_b_32", KNOWN)[0] == "ViT-B-32"
    assert near_names("ViT-B32", KNOWN)[0] == "ViT-B-32"


def test_a_remedy_names_them_or_says_something_else() -> None:
    assert did_you_mean("RN5O", ["RN50"]) == "did you mean 'RN50'?"
    assert did_you_mean("vit-b-3", ["ViT-B-32", "ViT-B-16"]).startswith("did you mean 'ViT-B-32'")
    assert " or " in did_you_mean("vit-b-3", ["ViT-B-32", "ViT-B-16"])
    assert did_you_mean("elephant", KNOWN, "dimefm sets lists all") == "dimefm sets lists all"


def test_names_that_differ_in_capitals_alone_are_both_offered() -> None:
    assert near_names("abc", ["ABC", "Abc"]) == ["ABC", "Abc"]


def test_a_path_is_mended_at_the_part_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "evaluations" / "student").mkdir(parents=True)
    right = f"did you mean '{tmp_path}/evaluations/student'?"
    assert did_you_mean_path(f"{tmp_path}/evaluations/studnet") == right
    assert did_you_mean_path(f"{tmp_path}/evalations/student/") == right
    assert did_you_mean_path(f"{tmp_path}/evalations/studnet", "look there") == "look there"
    assert did_you_mean_path(f"{tmp_path}/evaluations", "look there") == "look there"
    assert did_you_mean_path(f"{tmp_path}/elephant", "look there") == "look there"
    assert did_you_mean_path(f"{tmp_path}/evaluatons", begin="local-dir:") == (
        f"did you mean 'local-dir:{tmp_path}/evaluations'?"
    )


def test_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:" / "store").mkdir(parents=True)
    assert did_you_mean_path("memry:/store", "look there") == "did you mean 'memory:/store'?"
    assert did_you_mean_path("memry://store", "look there") == "look there"


def test_a_part_of_a_name_finds_it() -> None:
    commands = ["cache-images", "cache-texts", "build-index", "train-student", "evaluate"]
    assert near_names("train", commands) == ["train-student"]
    assert near_names("cache", commands) == ["cache-images", "cache-texts"]
    assert near_names("Index", commands) == ["build-index"]
    assert near_names("eval", commands) == ["evaluate"]
    assert near_names("e", commands) == []
