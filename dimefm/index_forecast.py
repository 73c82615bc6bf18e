"""`build-index --dry-run`: what would be built, and when exact search is the cheaper way."""

from __future__ import annotations

from dataclasses import dataclass

from dimefm.building import IndexConfig
from dimefm.factory import IndexPlan, available_memory, breakeven_queries, plan_index
from dimefm.progress import amount
from dimefm.store import Store


@dataclass(frozen=True)
class IndexForecast:
    """What `build_index` would build, and how many queries of exact search take as many products as the building."""

    rows: int
    dim: int
    memory: int
    plan: IndexPlan
    breakeven: int
    queries: int | None

    @property
    def exact_is_cheaper(self) -> bool:
        """For the queries that are known of."""
        return self.queries is not None and self.queries <= self.breakeven

    def show(self) -> str:
        """As `build-index --dry-run` prints it."""
        plan = self.plan
        size = f"{amount(plan.bytes)}, " if plan.bytes else ""
        return "\n".join(
            [
                f"rows     {self.rows:,}, {self.dim} wide",
                f"factory  {plan.factory}, trained on {plan.train_rows:,} rows",
                f"size     {size}built in parts of {plan.part_rows:,} rows within {amount(self.memory)}",
                f"exact    {self.advice()}",
            ]
        )

    def advice(self) -> str:
        """When to do without an index."""
        if not self.breakeven:
            return "the index holds all rows as they are: it saves reading them, not products"
        least = f"up to {self.breakeven:,} queries take less work than the building"
        if self.queries is None:
            return f"{least}: dimefm retrieve without --index"
        verdict = "exact search is cheaper: dimefm retrieve without --index" if self.exact_is_cheaper else "build it"
        return f"{least}; for the {self.queries:,} of --queries, {verdict}"


def forecast(config: IndexConfig) -> IndexForecast:
    """What `build_index` would do. Builds nothing."""
    store = Store(config.store)
    memory = config.memory or available_memory() // 2
    rows, dim = store.schema.rows, store.schema.dim
    plan = plan_index(rows, dim, memory, config.factory)
    queries = Store(config.queries).schema.rows if config.queries else None
    return IndexForecast(rows, dim, memory, plan, breakeven_queries(rows, plan), queries)
