"""Where images and sentences come from. A source lists its samples once, in a fixed order; see base.Source."""

from dimefm.sources.base import ImageSample, Source, SourceFile, TextSample
from dimefm.sources.images import ImageFolder, WebDataset, open_image_source
from dimefm.sources.json_texts import JsonArray
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.parquet_texts import ParquetTexts
from dimefm.sources.tar_texts import TarTexts
from dimefm.sources.text_tables import Delimited, JsonLines
from dimefm.sources.texts import PromptSet, TextFile, open_text_source
from dimefm.sources.tsv_images import TsvImages

__all__ = [
    "Delimited",
    "ImageFolder",
    "ImageSample",
    "JsonArray",
    "JsonLines",
    "ParquetImages",
    "ParquetTexts",
    "PromptSet",
    "Source",
    "SourceFile",
    "TarTexts",
    "TextFile",
    "TextSample",
    "TsvImages",
    "WebDataset",
    "open_image_source",
    "open_text_source",
]
