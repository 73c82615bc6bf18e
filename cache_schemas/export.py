"""The folder of an exported model, in one of several formats.

OUT/
  open_clip_config.json, open_clip_model.safetensors                            open_clip
  vision_model.onnx, text_model.onnx                                            onnx
  config.json, model.safetensors, preprocessor_config.json                      transformers
  tokenizer.json              the tokenizer, in the format of Hugging Face's tokenizers
  dimefm_export.json          this document
  README.md                   the model card
  results.jsonl               the results that the card shows, of evaluations of these weights, without paths
  latency.json                the measurements of speed that it shows, of these weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cache_schemas.document import Document
from cache_schemas.identity import TeacherIdentity
from cache_schemas.run import Change, Weights

ExportFormat = Literal["open_clip", "onnx", "transformers"]
ImageInput = Literal["float32", "uint8"]
Quantization = Literal["dynamic int8", "static int8"]

EXPORT_FILE, TOKENIZER_FILE, CARD_FILE = "dimefm_export.json", "tokenizer.json", "README.md"
TRANSFORMERS_CONFIG, TRANSFORMERS_WEIGHTS = "config.json", "model.safetensors"
TRANSFORMERS_IMAGES = "preprocessor_config.json"
IMAGE_ONNX, TEXT_ONNX = "vision_model.onnx", "text_model.onnx"
"""The two towers of an ONNX export. The first takes `pixel_values` (B, 3, H, W) and gives `image_embeds` (B, D); the
second takes `input_ids` int64 (B, L) and gives `text_embeds` (B, D). Both outputs are float32 of unit norm."""


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """How the graphs of an ONNX export compute. Pixels of `image_input` uint8 are 0 to 255, and are normalised within
    the graph; those of float32 are normalised before, by the mean and the std of the preprocessing. A quantized tower
    is named with its way in `quantized`, by its file."""

    opset: int
    image_input: ImageInput
    quantized: dict[str, Quantization]


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """Images, sentences or captions of the images that a student was trained on: the base name of the store, the base
    names of what was cached into it, the rows with an embedding, and the digest of these embeddings, by which another
    machine can tell that it has the same. Where the store could not be read any more, `unknown` says why, and names and
    rows are left out; an older run has no digest."""

    kind: Literal["image", "text", "caption"]
    store: str
    names: tuple[str, ...] = ()
    rows: int | None = None
    digest: str | None = None
    unknown: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportOrigin:
    """The training run that a model comes from, after `step` of its `steps`. It holds base names and no paths, since
    the folder may be published. `pretrained` is the tag of the teacher's weights, `repository` where the Hub has them.
    Of several teachers these are of the one whose text tower it has, and `more_teachers` names the others. `config` is
    the training config, and `changes` are those that the user made during the run. None of it is known of a model that
    dimefm did not train."""

    student: str
    teacher: str
    teacher_weights: str
    step: int
    steps: int
    weights: Weights
    images_seen: int
    seed: int
    config: dict[str, object]
    sources: tuple[ExportSource, ...]
    versions: dict[str, str]
    machine: str | None = None
    pretrained: str | None = None
    repository: str | None = None
    changes: tuple[Change, ...] = ()
    more_teachers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Export(Document):
    """What an exported model is, where it comes from, and how it was checked.

    `model` has the facts of the exported model, as a store has those of its teacher. Its `name` is that of the folder;
    its `weights` are the digest of the weights, of an ONNX export that of its two graphs. `text_tower` is the digest by
    which evaluations share the embeddings of texts. `parameters` are those of both towers, `image_parameters` of the
    image tower. `image_flops` and `text_flops` are floating-point operations per image and per sentence, a product and
    its sum counted as two; None where they could not be counted. `checks` are what the check after writing measured, by
    name. `files` are the sha256 of the files beside the document, without the model card and its results; empty in a
    document that has none.
    """

    SCHEMA: ClassVar[str] = "dimefm.export"

    format: ExportFormat
    model: TeacherIdentity
    text_tower: str
    parameters: int
    image_parameters: int
    image_flops: int | None
    text_flops: int | None
    versions: dict[str, str]
    origin: ExportOrigin | None = None
    onnx: OnnxFacts | None = None
    checks: dict[str, float] | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def number_format(self) -> str:
        """What it computes in, or what its weights are kept in: fp32, fp16, or int8 for quantized graphs."""
        return "int8" if self.onnx and self.onnx.quantized else self.model.precision
