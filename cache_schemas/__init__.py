"""The formats on disk: names of files, dtypes, shapes, versions and attributes, and how documents are parsed.

The ground of all rooms. It needs the standard library, numpy and pyarrow, and nothing else.
"""

from cache_schemas.commit import Commit, Failure
from cache_schemas.document import Document, digest_of, parse_dataclass, to_plain
from cache_schemas.embedding_store import EmbeddingStore, Skipped, SourceSummary, Status
from cache_schemas.identity import Preprocessing, TeacherIdentity
from cache_schemas.index import IndexPart, IndexSidecar, Recall
from cache_schemas.pairs import HitCounts, PairsStore
from cache_schemas.plan import FILES, IMAGE_PLAN, TEXT_PLAN, parse_plan
from cache_schemas.problems import Problem, SchemaError
from cache_schemas.run import Run, StudentSpec
from cache_schemas.text_selection import SelectionPlan, TextSelection
from cache_schemas.views import StrongViews, ViewPlan

__all__ = [
    "FILES",
    "IMAGE_PLAN",
    "TEXT_PLAN",
    "Commit",
    "Document",
    "EmbeddingStore",
    "Failure",
    "HitCounts",
    "IndexPart",
    "IndexSidecar",
    "PairsStore",
    "Preprocessing",
    "Problem",
    "Recall",
    "Run",
    "SchemaError",
    "SelectionPlan",
    "Skipped",
    "SourceSummary",
    "Status",
    "StrongViews",
    "StudentSpec",
    "TeacherIdentity",
    "TextSelection",
    "ViewPlan",
    "digest_of",
    "parse_dataclass",
    "parse_plan",
    "to_plain",
]
