"""What the choices in build-index are worth: recall of image queries among sentences, one choice changed at a time."""

import click
import faiss

from benchmarks.measure import machine, table
from benchmarks.retrieval import draw, recall
from dimefm.retrieval.choose_index import TRAIN_PER_CENTROID
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.faiss_index import FaissIndex
from dimefm.retrieval.index_build import sample_rows
from dimefm.retrieval.index_search import IndexSearch, SearchParameters
from dimefm.retrieval.recall import RECALL_K
from dimefm.store.embedding_store import Store


@click.command()
@click.option("--texts", required=True, help="Text store.")
@click.option("--images", required=True, help="Image store: its embeddings are the queries.")
@click.option("--queries", default=1000, show_default=True)
@click.option("--lists", default=2048, show_default=True)
@click.option("--depth", default=50, show_default=True, help="Candidates over k that are scored again.")
def index_choices(texts: str, images: str, queries: int, lists: int, depth: int) -> None:
    """Recall@10 by codes of residuals or vectors, bytes of a code, and how lists are chosen."""
    store = Store(texts)
    dim, queries_QD = store.schema.dim, draw(Store(images), queries)
    _, truth_QK = ExactSearch(store).search(queries_QD, RECALL_K)
    sample = sample_rows(store, TRAIN_PER_CENTROID * lists, seed=0)
    rows = []
    for codes, residuals in ((dim // 4, False), (dim // 4, True), (dim // 2, True)):
        factory = f"IVF{lists},PQ{codes}x4fs"
        built = FaissIndex.from_factory(factory, dim)
        faiss.extract_index_ivf(built.inner).by_residual = residuals
        built.train(sample, 0)
        built.add_rows(store, [(0, store.schema.rows)])
        for chosen, spread in (("nearest centroid", ""), ("best row expected", built.spread)):
            index = IndexSearch(FaissIndex(built.inner, spread=spread), store, SearchParameters(0, 1))
            found = [
                recall(index.search_with(SearchParameters(probes, depth), queries_QD, RECALL_K)[1], truth_QK)
                for probes in (lists // 32, lists // 16, lists // 8)
            ]
            kind = "residuals" if residuals else "vectors"
            rows.append((f"{codes // 2} bytes", kind, chosen, *(f"{value:.3f}" for value in found)))
        head = ("codes", "of", "lists by", *(f"nprobe {probes}" for probes in (lists // 32, lists // 16, lists // 8)))
        click.echo(table(head, rows))
    facts = f"{store.schema.rows:,} sentences {dim} wide, {queries:,} image queries, {lists:,} lists, x{depth}, seed 0"
    click.echo(f"{machine()}; {facts}; recall@{RECALL_K}")
