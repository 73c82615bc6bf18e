"""More views for a finished store: those from the number on that it has, without encoding any again."""

from __future__ import annotations

from cache_schemas import ViewPlan
from dimefm.errors import MismatchError
from dimefm.store.added_views import plan_addition, planned_additions
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import ANOTHER_OUT


def stores_to_write(store: Store, asked: ViewPlan | None) -> list[Store]:
    """What to complete, in this order, for a store to have the views that are asked for: the store as it was made, then
    its additions, of which the last is planned here if it is not there yet. An addition that was begun is completed
    before another; where no more views are asked for than are complete, it is left as it is.

    Raises MismatchError where views are asked for that end within an addition.
    """
    made = Store(store.path, additions=0)
    if asked is None or made.schema.views is None:
        return [made]
    found, end = [made], made.schema.views.end
    for added in planned_additions(made):
        if asked.count == end:
            break
        assert added.schema.views is not None
        found.append(added)
        end = added.schema.views.end
    if asked.count < end:
        what = f"{store.path}: {end} views were begun, and {asked.count} are asked for"
        raise MismatchError(what, remedy=f"give --views {end} to complete them, or {ANOTHER_OUT}")
    if asked.count > end:
        found.append(plan_addition(made, end, asked.count))
    return found
