"""Vectors in a LanceDB table, in the index's folder or in object storage; slots are a column.

A commit of the index names a version of the table. Whoever searches reads that version, and what a
kill left behind it is taken back by the next writer.
"""

from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from e5v_jax.search.matrix import MatrixVectors, order, score

_INDEXED = 200_000  # rows from which an approximate index (IVF-PQ) is made and kept
_PROBES, _REFINE = 40, 10  # of such an index: lists that are read, and candidates compared exactly
_KEPT = timedelta(hours=1)  # who began to read an older version may go on so long
_MOST = 1000  # slots in one condition


class LanceTables:
    """The tables ``vectors_ID_N`` at an address, by the ``id`` and ``generation`` of an index."""

    def __init__(self, address: str) -> None:
        """Connect. Raises ImportError: lancedb is not installed."""
        try:
            import lancedb
        except ModuleNotFoundError as error:
            raise ImportError("lancedb is missing: pip install -e '.[lancedb]'") from error
        self._database = lancedb.connect(address)
        self._address = address

    def open(self, meta: dict[str, Any]) -> "LanceVectors | MatrixVectors":
        """See :class:`e5v_jax.search.vectors.Place`."""
        if not meta["slots"]:
            return MatrixVectors(np.zeros((0, meta["dimensions"] or 0), np.float16))
        name = _name(meta)
        try:
            table = self._database.open_table(name)
            table.checkout(meta["version"])
        except ValueError as error:  # so says lancedb of both
            raise FileNotFoundError(f"{self._address}/{name}: {error}") from error
        return LanceVectors(table, meta["dimensions"])

    def append(self, meta: dict[str, Any], vectors: np.ndarray) -> dict[str, Any]:
        """See :class:`e5v_jax.search.vectors.Place`."""
        rows, dimensions = vectors.shape
        schema = pa.schema([("slot", pa.int64()), ("vector", pa.list_(pa.float16(), dimensions))])
        if meta["slots"]:
            table = self._latest(meta)
        else:
            table = self._database.create_table(_name(meta), schema=schema, mode="overwrite")
        slots = pa.array(np.arange(meta["slots"], meta["slots"] + rows), pa.int64())
        values = pa.array(np.ascontiguousarray(vectors).ravel())
        lists = pa.FixedSizeListArray.from_arrays(values, dimensions)
        table.add(pa.table([slots, lists], schema=schema))
        return {"version": table.version}

    def compact(
        self, meta: dict[str, Any], used: np.ndarray
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """See :class:`e5v_jax.search.vectors.Place`. Slots stay as they are."""
        if not meta["slots"] or (len(used), meta["version"]) == tuple(meta.get("compacted", ())):
            return {}, []
        table = self._latest(meta)
        there = table.search().select(["slot"]).to_arrow()["slot"].to_numpy()
        dropped = np.setdiff1d(there, used).tolist()
        for start in range(0, len(dropped), _MOST):
            table.delete(f"slot IN ({','.join(map(str, dropped[start : start + _MOST]))})")
        if len(used) >= _INDEXED and not table.list_indices():
            from lancedb.index import IvfPq

            table.create_index("vector", config=IvfPq(distance_type="dot"))
        table.optimize(cleanup_older_than=_KEPT)
        return {"version": table.version, "compacted": [len(used), table.version]}, []

    def clear(self, meta: dict[str, Any]) -> None:
        """See :class:`e5v_jax.search.vectors.Place`."""
        for name in self._database.list_tables().tables:
            if name.startswith(_name({**meta, "generation": ""})) and name != _name(meta):
                self._database.drop_table(name)

    def _latest(self, meta: dict[str, Any]) -> Any:
        """The table for writing, as the database knows it: a kill may have left more in it."""
        table = self._database.open_table(_name(meta))
        if table.version != meta["version"]:
            table.restore(meta["version"])
        return table


class LanceVectors:
    """A version of a table."""

    def __init__(self, table: Any, dimensions: int) -> None:
        """Search ``table``, which is checked out at the version."""
        self._table, self.dimensions = table, dimensions

    def take(self, slots: list[int]) -> np.ndarray:
        """See :class:`e5v_jax.search.vectors.Vectors`."""
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(slots), _MOST):
            some = sorted(set(slots[start : start + _MOST]))
            where = f"slot IN ({','.join(map(str, some))})"
            found |= self._read(self._table.search().where(where).limit(len(some)))
        return np.stack([found[slot] for slot in slots])

    def nearest(
        self, vector: np.ndarray, count: int, live: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`e5v_jax.search.vectors.Vectors`. Of many rows, nearly all of the nearest.

        Scores are computed from the vectors, as LanceDB's are of fp16.
        """
        wanted = count + min(count, len(live))  # some may be dropped by now
        query = self._table.search(vector).distance_type("dot").limit(wanted)
        found = self._read(query.nprobes(_PROBES).refine_factor(_REFINE))
        slots = np.fromiter(found, np.int64)
        alive = np.isin(slots, live)
        slots = slots[alive]
        if not slots.size:
            return slots, np.zeros(0, np.float32)
        scores = score(np.stack([found[slot] for slot in slots.tolist()]), vector)
        best = order(scores, slots)[:count]
        return slots[best], scores[best]

    def _read(self, query: Any) -> dict[int, np.ndarray]:
        """The vectors that a query gives, fp16 [D], by their slots."""
        table = query.to_arrow()
        lists = table["vector"].combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dimensions)
        return dict(zip(table["slot"].to_pylist(), values, strict=True))


def _name(meta: dict[str, Any]) -> str:
    return f"vectors_{meta['id']}_{meta['generation']}"
