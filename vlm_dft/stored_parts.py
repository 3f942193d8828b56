"""Stored parts: a prepared set and a collator in; its examples as a Part, measured as they were or again, and its account out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_dft.accounting import Accounting
from vlm_dft.chat import Example
from vlm_dft.errors import RowError
from vlm_dft.examining import fitted
from vlm_dft.fitting import fit
from vlm_dft.lazy import Lazy, at_places
from vlm_dft.measuring import within
from vlm_dft.mixed import Dress, Part
from vlm_dft.mixture_cards import Source
from vlm_dft.prepared import BLOCK
from vlm_dft.recipes import MAX_SOURCES, Outcome

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

PICTURE, FILMS = (
    0,
    (1, 2),
)  # kinds of the parts of a row in a prepared index: a picture; a video, the first frame of one
COLUMNS = ["id", "source", "tokens", "media", "response", "part_kind", "likeness", "changed"]
Fault = Callable[[RowError, str], None]


@dataclass(frozen=True, slots=True)
class Fitted(Lazy):
    """Some of a stored set's examples, those that are too long for a collator made to fit it whenever they are read."""

    rows: Sequence[Example]
    places: Sequence[int]
    changed: frozenset[int]  # of places
    collator: ChatCollator

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, ks: Sequence[int]) -> list[Example]:
        places = [int(self.places[k]) for k in ks]
        found = at_places(self.rows, places)
        return [self._fit(one) if at in self.changed else one for at, one in zip(places, found, strict=True)]

    def _fit(self, example: Example) -> Example:
        found, effect = fit(self.collator, example, f"{example.source} row {example.id}")
        assert found is not None, f"it fitted when it was measured: {effect}"
        return found


def stored_part(
    rows: Any, source: Source, dress: Dress, collator: ChatCollator, *, settings: Any, limit: int | None, fault: Fault
) -> tuple[Part, Accounting, str]:
    """A prepared set (prepared.Prepared) as a Part, its account, and what is to be said ("" where it was measured with the same settings).

    settings: the collator's, to be held against what the set was measured with. limit: of its examples. fault: called with the error and
    id of an example that this collator cannot use.
    """
    account = Accounting.from_dict({**rows.accounting, "source": source.name})
    account.licence = str(source.card.get("licence", ""))
    index = _index(rows)
    count = len(index["tokens"])
    if limit is not None and limit < count:
        account.leave_out(
            f"after the first {limit:,} (limit)", [str(one) for one in index["id"][limit:]], count - limit
        )
        index = {name: column[:limit] for name, column in index.items()}
        count = limit
    places: Sequence[int] = range(count)
    if source.card.get("duplicates") == "drop":
        places = _first_ones(index, account)
        index = {name: _some(column, places) for name, column in index.items()}
        count = len(places)
    examples: Sequence[Example] = rows if places == range(count) else Fitted(rows, places, frozenset(), collator)
    account.used, said = count, ""
    if rows.measured_with != settings:
        before = (rows.measured_with or {}).get("max_length")
        said = f"{source.name} was prepared with other settings: {count:,} examples are measured again" + (
            f"; what was over max_length = {before} then stays dropped" if before else ""
        )
        examples, index = _measured_again(rows, places, index, account, collator, fault)
    kinds = index["part_kind"]
    pictured = np.array([PICTURE in own for own in kinds], np.bool_)
    filmed = np.array([any(kind in FILMS for kind in own) for own in kinds], np.bool_)
    tokens, media, response = (np.asarray(index[name], np.int64) for name in ("tokens", "media", "response"))
    effects: dict[str, list[int]] = {}
    for k, own in enumerate(index["changed"]):
        for effect in own:
            effects.setdefault(effect, []).append(k)
    names = index["source"]
    if len(set(names)) > MAX_SOURCES:  # as where rows are read
        names = [str(rows.card["name"])] * len(names)
    content = [
        shard["sha256"] for shard in rows.shards
    ]  # what it was made from says nothing of pictures that lie in files
    print_of_all = f"{rows.fingerprint} {content} {count} {settings if said else ''}"
    return (
        Part(examples, index["id"], tokens, media, response, names, pictured, filmed, print_of_all, dress, effects),
        account,
        said,
    )


def _index(rows: Any) -> dict[str, Any]:
    """The columns of a prepared set's index: what is known of each example without reading it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(rows.store.read("index.parquet")))
    table = file.read(columns=COLUMNS, use_threads=False).combine_chunks()  # forks follow
    found: dict[str, Any] = {name: table.column(name).combine_chunks() for name in COLUMNS}
    coded = found["source"].dictionary_encode()
    names = coded.dictionary.to_pylist()
    kinds = found["part_kind"]
    sets: dict[bytes, tuple[int, ...]] = {}  # few different ones, however many rows
    values, ends = kinds.values.to_numpy(), kinds.offsets.to_numpy()
    own = (np.unique(values[a:b]) for a, b in pairwise(ends))
    return {
        **found,
        "source": [names[k] for k in coded.indices.to_pylist()],
        "part_kind": [sets.setdefault(one.tobytes(), tuple(one.tolist())) for one in own],
        "changed": [tuple(own) if own else () for own in found["changed"].to_pylist()],
        **{name: found[name].to_numpy(zero_copy_only=False) for name in ("tokens", "media", "response")},
    }


def _measured_again(
    rows: Any, places: Sequence[int], index: dict[str, Any], account: Accounting, collator: ChatCollator, fault: Fault
) -> tuple[Sequence[Example], dict[str, Any]]:
    """The examples that fit this collator, and the index of them."""
    kept, changed, tokens = list[int](), set[int](), list[tuple[int, int, int]]()
    for k, example in enumerate(_in_blocks(rows, places)):
        try:
            outcome, measured = fitted(collator, Outcome(example.id, example))
        except RowError as error:
            account.drop(error.reason, example.id)
            fault(error, example.id)
            continue
        if outcome.example is None:
            account.drop(outcome.dropped, example.id)
            continue
        kept.append(k)
        tokens.append(within(measured, collator.max_length))
        if outcome.changed:
            changed.add(places[k])
        index["changed"][k] += outcome.changed
    account.used = len(kept)
    by_kind = dict(zip(("tokens", "media", "response"), np.array(tokens, np.int64).reshape(-1, 3).T, strict=True))
    others = {name: _some(index[name], kept) for name in ("id", "source", "part_kind", "changed")}
    return Fitted(rows, [places[k] for k in kept], frozenset(changed), collator), {**others, **by_kind}


def _in_blocks(rows: Any, places: Sequence[int]) -> Iterator[Example]:
    """The examples at these places, a block read at a time."""
    for k in range(0, len(places), BLOCK):
        yield from rows.__getitems__(places[k : k + BLOCK])


def _first_ones(index: Mapping[str, Any], account: Accounting) -> list[int]:
    """The places of examples that are not there before."""
    kept, seen = list[int](), set[bytes]()
    for place, alike in enumerate(index["likeness"].to_pylist()):
        if alike in seen:
            account.drop("the same as an earlier row", str(index["id"][place]))
        else:
            seen.add(alike)
            kept.append(place)
    return kept


def _some(column: Any, places: Sequence[int]) -> Any:
    """What a column holds at these places."""
    return [column[place] for place in places]
