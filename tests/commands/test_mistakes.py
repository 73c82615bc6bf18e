"""Forty mistakes of a newcomer, over all commands: each ends with one short error that says what is wrong and what was
meant or how it is mended. Nothing is written, and nothing heavy is run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from tests.making import make_jpeg, write_tar
from tests.tiny_onnx import write_onnx

_TEACHER = "--teacher local-dir:student"
_CACHE = f"cache-images images --out x.zarr {_TEACHER}"
_TRAIN = "train-student --images images.zarr --texts texts.zarr --out x"

MISTAKES = [
    # commands, options and values
    ("train", 2, "No such command 'train'", "did you mean 'train-student'?"),
    ("cahce-images x", 2, "No such command 'cahce-images'", "did you mean 'cache-images'"),
    ("cache-images images", 2, "Missing option", "--out"),
    (f"{_CACHE} --precison fp16", 2, "No such option '--precison'", "'--precision'"),
    (f"{_CACHE} --batch-size many", 2, "'--batch-size'", "'many' is not a valid whole number"),
    (f"{_CACHE} --retry-failed --dry-run", 2, "--dry-run says nothing about --retry-failed", "dimefm info STORE"),
    ("import-embeddings images --kind images --out x --teacher y", 2, "'images' is not one of", "'image', 'text'"),
    ("select-texts pairs.zarr --out x.selection --by hit", 2, "'hit' is not one of", "'hits', 'similarity', 'random'"),
    ("select-texts pairs.zarr --out x.selection --workers 1", 2, "--workers has no effect without", "--by similarity"),
    ("build-index texts.zarr --out x.index --recall 2", 2, "'--recall'", "2.0 is not in the range 0<=x<=1"),
    ("search texts.zarr", 2, "give --image FILE or --text SENTENCE", ""),
    ("explore texts.zarr --pretrained openai", 2, "--pretrained has no effect without --teacher", ""),
    ("explore texts.zar", 1, "texts.zar is neither a dimefm store nor an index", "did you mean 'texts.zarr'"),
    ("verify images.zarr --teacher ViT-B-32", 2, "--teacher has no effect without --sample", ""),
    ("verify images.zarr --ray-address auto", 2, "--ray-address has no effect without --workers", ""),
    ("export-embeddings texts.zarr --out x --workers 1000", 1, "--workers 1,000: this machine has", "give --workers"),
    ("export-embeddings texts.zarr --out x --clusters 9", 2, "--clusters has no effect without --format parquet", ""),
    ("evaluate student eval --task zeroshot", 2, "'zeroshot' is not one of", "'zero-shot'"),
    ("evaluate student", 2, "name a SET", "--suite or --sets with --data ROOT"),
    ("evaluate student --suite robust --data .", 2, "no suite is called 'robust'", "did you mean 'robustness'?"),
    # models
    ("cache-images images --out x --teacher ViT-B32 --pretrained openai", 1, "ViT-B32 is neither", "'ViT-B-32'"),
    ("cache-images images --out x --teacher ViT-B-32", 1, "no weights named for ViT-B-32", "--pretrained"),
    ("cache-images images --out x --teacher ViT-B-32 --pretrained openia", 1, "openia is neither a file", "'openai'?"),
    ("cache-images images --out x --teacher student", 1, "student is a folder", "name it local-dir:student"),
    ("cache-images images --out x --teacher local-dir:studnet", 1, "no such folder", "'local-dir:student'?"),
    ("cache-images images --out x --teacher run", 1, "run is a folder without", "dimefm export run --out"),
    ("search texts.zarr --text dog --teacher laion/CLIP-huge", 1, "is neither a folder", "name it hf-hub:laion/CLIP"),
    (f"{_TRAIN} --student resnet-18", 1, "no image tower is called 'resnet-18'", "did you mean 'resnet18'"),
    (f"{_TRAIN} --text-student ViT-B32", 1, "no model of open_clip is called 'ViT-B32'", "did you mean 'ViT-B-32'"),
    ("evaluate studnet eval", 1, "studnet is neither a folder", "did you mean 'student'?"),
    ("evaluate images eval", 1, "images is a folder without a model", "open_clip or dimefm export wrote"),
    ("latency studnet", 1, "studnet is neither a folder", "did you mean 'student'?"),
    ("latency ViT-B-32", 1, "no weights named for ViT-B-32", "a tag such as ViT-B-32:openai"),
    ("latency ViT-B-32:openia", 1, "openia is neither a file", "'openai'?"),
    ("latency student --batch 1,x", 2, "'1,x' is not a list of whole numbers", "such as"),
    ("latency student --threads 0", 1, "--threads takes numbers from 1 on", "remedy"),
    ("latency student --out run", 1, "run is a folder", "latency.json"),
    ("compare evaluations/student --plot x.png", 2, "--plot has no effect without --latency", ""),
    ("predict photo.jpg photo.jpg --classes a,b", 1, "photo.jpg is a file, and the model comes", "predict MODEL IMAGE"),
    ("predict studnet photo.jpg --classes a,b", 1, "studnet is neither a folder", "did you mean 'student'"),
    ("evaluate onnx eval --precision fp16", 2, "--precision has no effect on onnx, an ONNX model", ""),
    ("predict onnx photo.jpg --classes a,b --device cuda", 1, "onnx is an ONNX model", "give --device cpu"),
    ("evaluate onnx eval --weights ema", 2, "--weights has no effect: onnx is not a run", ""),
    ("export student --out x --checkpoint best", 2, "--checkpoint has no effect: student is not a run", ""),
    ("export student --out x --teacher local-dir:student", 2, "--teacher has no effect: student is not a run", ""),
    ("latency onnx --compiled", 2, "--compiled has no effect: ONNX models have their own graphs", ""),
    ("latency onnx --device cuda", 2, "--device has no effect: ONNX models run on the CPU", ""),
    ("latency onnx student --with-teacher", 2, "--with-teacher has no effect: none of the models is a run", ""),
    # images and classes of one's own
    ("predict onnx --classes a,b", 2, "name an IMAGE", "--images-from FILE"),
    ("predict onnx photo.jpg", 2, "give either --classes A,B,... or --classes-from FILE", ""),
    ("predict onnx photo.jpg --classes a --classes-from eval/classnames.txt", 2, "give either --classes A,B,...", ""),
    ("predict onnx phto.jpg --classes a,b", 1, "phto.jpg does not exist", "did you mean 'photo.jpg'?"),
    ("predict onnx photo.jpg --classes a, b", 1, "--classes has an empty name", "put a list with spaces in quotes"),
    ("predict onnx photo.jpg --classes cat", 1, "'cat' is the only class", "name two classes or more"),
    ("predict onnx photo.jpg --classes eval/classnames.txt", 1, "is a file, not a class", "give --classes-from eval/"),
    ("predict onnx photo.jpg --classes a,b --checkpoint best", 2, "--checkpoint has no effect: onnx is not a run", ""),
    ("predict onnx - --images-from - --classes a,b", 2, "- is given more than once", "one standard input"),
    # paths: not there, or of another kind
    (f"cache-images imgaes --out x {_TEACHER}", 1, "imgaes does not exist", "did you mean 'images'"),
    (f"cache-images images --out run {_TEACHER}", 1, "is not an embedding store", "give another --out"),
    (f"cache-texts images --out x.zarr {_TEACHER}", 1, "no text in images", "end in .jpg"),
    (f"import-embeddings images --kind image --out x {_TEACHER}", 1, "holds no img_emb_", "look at --kind"),
    ("build-index txts.zarr --out x.index", 1, "it does not exist", "texts.zarr'"),
    ("build-index texts.zarr --out x.idx", 1, "x.idx would be an index", "ends with .index"),
    ("retrieve images.zarr --texts images.zarr --out x.zarr", 1, "holds image embeddings", "were swapped"),
    ("retrieve images.zarr --texts texts.zarr --index texts.zarr --out x", 1, "is not a dimefm index", "build-index"),
    ("retrieve images.zarr --texts texts.zarr --out x.zarr --workers 999", 1, "this machine has", "give --workers"),
    ("retrieve images.zarr --texts txts.zarr --out x.zarr --dry-run", 1, "it does not exist", "texts.zarr'"),
    ("select-texts images.zarr --out x.selection", 1, "expected 'dimefm.pairs'", "two paths were swapped"),
    ("select-images texts.zarr --out x.selection --size 9", 1, "holds text embeddings", "were swapped"),
    ("select-images images.zarr --out x.selection", 1, "nothing says what to leave out", "change the named options"),
    ("select-images images.zarr --out x.selection --drop-near cats", 1, "needs --drop-above", "dimefm search"),
    ("leaks images.zarr evl --out x.selection", 1, "evl is no folder", "did you mean 'eval'?"),
    ("compare evaluations/studnet", 1, "does not exist", "did you mean 'evaluations/student'?"),
    ("export rnu --out x", 1, "rnu is neither a run folder nor a model", "did you mean 'run'?"),
    ("card studnet", 1, "studnet is no exported model", "did you mean 'student'?"),
    ("card student", 1, "student is no exported model", "dimefm export student --out STUDENT"),
    ("card student --license gpl3", 1, "no licence 'gpl3'", "'lgpl' or 'gpl-3.0'"),
    ("push student me", 1, "'me' is no name of a repository", "give ORG/NAME"),
    ("push studnet org/name", 1, "studnet is no exported model", "did you mean 'student'?"),
    ("report imges.zarr", 1, "imges.zarr does not exist", "did you mean 'images.zarr'"),
    ("report images.zarr --out photo.jpg", 1, "photo.jpg exists and is not a page", "give another --out"),
    ("watch rnu", 1, "rnu does not exist", "did you mean 'run'?"),
    ("watch texts.zarr", 1, "texts.zarr is not a run folder", "give the --out of train-student"),
    ("watch run --port 70000", 2, "'--port'", "70000 is not in the range 0<=x<=65535"),
    ("info imges.zarr", 1, "imges.zarr does not exist", "did you mean 'images.zarr'"),
    ("convert-checkpoint nothing.pt --out x --teacher local-dir:student", 1, "nothing.pt does not exist", "remedy"),
    ("export-embeddings text.zarr --out x", 1, "is not a dimefm store", "texts.zarr'"),
    ("evaluate student evl", 1, "evl is no folder", "did you mean 'eval'?"),
    ("evaluate student cifar10", 1, "cifar10 is no folder", "dimefm evaluate MODEL --sets cifar10 --data ROOT"),
    ("verify pairs.zarr", 1, "verify checks stores of embeddings alone", "dimefm info pairs.zarr describes it"),
    # sets, and settings of training
    ("sets cifar1", 1, "no set is called 'cifar1'", "did you mean 'cifar10' or 'cifar100'?"),
    ("submission evaluations/student --out x.zip", 1, "evaluations/student", "remedy"),
    ("recipes papr", 2, "no recipe is called 'papr'", "did you mean 'paper'?"),
    ("train-student --images images.zarr --texts texts.zarr", 2, "Missing --out", "--config"),
    (f"{_TRAIN} --recipe papr", 2, "no recipe is called 'papr'", "did you mean 'paper'?"),
    (f"{_TRAIN} --set lr_=1", 2, "no field is called 'lr_'", "did you mean 'lr'?"),
    (f"{_TRAIN} --set epochs=many", 2, "epochs: expected a number", "found 'many'"),
    (f"{_TRAIN} --loss vl2=1", 2, "'vl2' is not known", "did you mean 'vl'"),
    (f"{_TRAIN} --log-to wandbs", 2, "'wandbs' is not one of", "'wandb'"),
    (f"{_TRAIN} --allow-changes lrr", 1, "no field is called 'lrr'", "did you mean 'lr'?"),
    (f"{_TRAIN} --weight-decay -1", 1, "weight_decay must not be below 0", "remedy"),
    (f"{_TRAIN} --cache-size 10GB", 1, "cache_size has no effect without cache_dir", "remedy"),
    (f"{_TRAIN} --cache-dir s3://bucket/cache", 1, "a cache must be a local path", "remedy"),
    (f"{_TRAIN} --cache-dir here --cache-size many", 2, "'many' is not a size", "such as 800MB or 12GB"),
    (f"{_TRAIN} --batch-size 5000", 1, "a batch of 5,000 images is more than", "give a smaller --batch-size"),
]  # fmt: skip
"""What is typed, the exit code, and two pieces of the message: what is wrong, and how it is mended."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, image_store: Store, text_store: Store, sample: Path) -> Path:
    """A folder in which a first session was done."""
    folder = tmp_path_factory.mktemp("session")
    for store, name in ((image_store, "images.zarr"), (text_store, "texts.zarr")):
        shutil.copytree(store.path, folder / name)
    shutil.copytree(sample / "teacher", folder / "student")
    write_onnx(folder / "onnx")
    (folder / "photo.jpg").write_bytes(make_jpeg())
    write_tar(folder / "images" / "0.tar", {"a.jpg": make_jpeg()})
    for place, content in (("run/run.json", "{}"), ("eval/classnames.txt", "cat"), ("evaluations/student/x", "")):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text(content)
    (folder / "evaluations" / "student" / "results.jsonl").write_text("")
    retrieve(str(folder / "images.zarr"), texts=str(folder / "texts.zarr"), top_k=2, out=str(folder / "pairs.zarr"))
    return folder


def test_there_are_forty_of_all_commands() -> None:
    assert len(MISTAKES) >= 40
    assert {typed.split()[0] for typed, *_ in MISTAKES} >= set(cli.commands) - {"doctor"}


@pytest.mark.parametrize(("typed", "code", "what", "remedy"), MISTAKES, ids=[typed for typed, *_ in MISTAKES])
def test_a_mistake(
    session: Path, monkeypatch: pytest.MonkeyPatch, typed: str, code: int, what: str, remedy: str
) -> None:
    monkeypatch.chdir(session)
    before = sorted(path.name for path in session.iterdir())
    result = CliRunner().invoke(cli, shlex.split(typed))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.output.count("Error: ") == 1
    assert what in result.output
    assert remedy in result.output
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert len(lines) <= 12
    assert max(line.count(", ") for line in lines) <= 10, "a list of names is shown in full"
    assert sorted(path.name for path in session.iterdir()) == before, "something was written"


def test_an_empty_value_is_refused(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(session)
    for typed in (
        "train-student --images images.zarr --image-selection ''",
        "search texts.zarr --text ''",
        "select-images images.zarr --out x.selection --drop-near ''",
        "info ''",
    ):
        result = CliRunner().invoke(cli, shlex.split(typed))
        assert (result.exit_code, "it is empty" in result.output) == (2, True), result.output
