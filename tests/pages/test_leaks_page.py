"""Pages of selected images and of leaks."""

from pathlib import Path
from shutil import rmtree

from dimefm.models.clip import Clip
from dimefm.pages.report import report
from dimefm.selection.select_images import ImageSelectionConfig, select_images
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from tests.leaks.planted import COPIED, run, write_captions, write_test_set
from tests.pages.browser import Browser


def test_leaks_are_shown_side_by_side(
    browser: Browser, image_store: Store, image_tar: Path, cifar10: str, clip: Clip, tmp_path: Path
) -> None:
    write_test_set(tmp_path / "planted", image_tar, cifar10)
    (tmp_path / "planted" / "test" / "class 0" / "broken.jpg").write_bytes(b"no image")
    run(image_store, tmp_path / "planted", tmp_path / "l.selection", clip)
    browser.open(Path(report([str(tmp_path / "l.selection")], str(tmp_path / "page.html"))))

    leaks = browser.all(".pairs")[0]
    browser.run("arguments[0].scrollIntoView()", leaks)
    sizes = """return [...arguments[0].querySelectorAll('li')].map(
        item => [...item.querySelectorAll('img')].map(image => image.naturalWidth > 0))"""
    assert browser.run(sizes, leaks) == [[True, True]] * COPIED
    assert "6 training images stand in these sets" in browser.one("main").text
    assert "1 of 25 images of own-planted could not be encoded" in browser.one(".warning").text

    rmtree(tmp_path / "l.selection" / "features")
    browser.open(Path(report([str(tmp_path / "l.selection")], str(tmp_path / "again.html"))))
    assert browser.run(sizes, browser.all(".pairs")[0]) == [[True]] * COPIED
    assert any("Test images cannot be shown" in text for text in browser.texts(".warning"))


def test_captions_that_leak_are_listed(browser: Browser, text_store: Store, clip: Clip, tmp_path: Path) -> None:
    write_captions(tmp_path / "coco", text_store)
    run(text_store, tmp_path / "coco", tmp_path / "l.selection", clip)
    browser.open(Path(report([str(tmp_path / "l.selection")], str(tmp_path / "page.html"))))

    assert len([row for row in browser.texts("tbody tr") if row.endswith("leak")]) == 3
    assert "Test captions that are trained on" in browser.one("main").text


def test_kept_and_dropped_images_are_shown(browser: Browser, image_store: Store, tmp_path: Path) -> None:
    out = str(tmp_path / "i.selection")
    select_images(ImageSelectionConfig(images=image_store.path, out=out, dedup=0.9, size=40, device="cpu"))
    browser.open(Path(report([out], str(tmp_path / "page.html"))))

    kept = {one["key"] for one in image_store.samples(SelectedImages(out).rows())}
    shown = {item: browser.run("return arguments[0].className", item) for item in browser.all(".gallery li")}
    names = {item.text.splitlines()[0]: mark for item, mark in shown.items()}
    assert len(names) > 20
    assert all((name in kept) == (mark == "good") for name, mark in names.items())
    assert "What became of the images" in browser.texts("figcaption")


def test_without_its_store_there_are_words(browser: Browser, image_tar: Path, clip: Clip, tmp_path: Path) -> None:
    from tests.conftest import cached

    store = cached("image", image_tar, tmp_path / "i.zarr", clip)
    out = str(tmp_path / "i.selection")
    select_images(ImageSelectionConfig(images=store.path, out=out, by="random", size=40, device="cpu"))
    (tmp_path / "i.zarr").rename(tmp_path / "moved.zarr")
    browser.open(Path(report([out], str(tmp_path / "page.html"))))

    assert "so there are no pictures" in browser.one(".warning").text
