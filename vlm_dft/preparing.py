"""Preparing: a recipe and its data in; a folder of shards, made once and gone on with after a kill, and its account, out.

The folder's files (prepared.py reads them): shard-*.parquet; index.parquet; and last prepared.json, which says that all is
there. Until then `.preparing` in it holds what has been done: for each whole shard the part of the index and of the account.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.accounting import Accounting, Faults
from vlm_dft.bars import Bar
from vlm_dft.claims import claimed
from vlm_dft.errors import CardError, ConfigError, RowError, UserError
from vlm_dft.examining import Examined, examine
from vlm_dft.ingredients import differences, fingerprint_of, ingredients
from vlm_dft.measuring import within
from vlm_dft.prepared import INDEX, VERSION, WHOLE, Prepared, read_whole, shard_name
from vlm_dft.recipes import recipe_root
from vlm_dft.shards import Pack, Packed, ShardWriter, index_table, locate, sha256_of
from vlm_dft.sources import DEFAULT_ACCESS
from vlm_dft.stores import Store

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

Echo = Callable[[Any], Any]
JOURNAL = ".preparing"
BEGUN = f"{JOURNAL}/made_from.json"
SHARD_PLACES, SHARD_BYTES = 16384, 256 * 2**20  # rows of the recipe, and bytes, after which a shard ends
LEAVE_OUT = "leave them out: bad_rows: drop in a copy of the card, or --bad-rows drop."
KEPT_OUT = f"mend them and choose another folder, or {LEAVE_OUT}"


def prepare(
    card: Mapping[str, Any],
    data: str | None,
    output: str | Path,
    *,
    collator: ChatCollator | None = None,
    workers: int = 0,
    limit: int | None = None,
    bad_rows: str | None = None,
    echo: Echo | None = None,
) -> dict[str, Any]:
    """Prepare a recipe in a folder, or below a URL that fsspec knows. Returns what prepared.json says of it.

    collator: measures the examples, drops or changes what is too long for it, and finds pictures that cannot be read.
    limit: of the recipe's rows. bad_rows: "refuse" (default, or the card's): all rows are looked at, and if any cannot be used,
    RowError tells how many and why and nothing is left; "drop": they are left out, and accounted for. The files are the same for any number
    of workers. What a killed process had done is gone on with; of two processes the second waits. Raises ConfigError where the folder holds
    something else, and UserError where the disk is full.
    """
    say: Echo = echo or (lambda line: None)
    policy = bad_rows or card.get("bad_rows", "refuse")
    if policy not in ("refuse", "drop"):
        raise ConfigError(f"bad_rows must be refuse or drop, found {policy!r}.")
    if "source" not in card:
        raise CardError(f"Recipe {card['name']!r} is a mixture. Prepare its sources, and name what was prepared in it.")
    if "prepared" in card["source"]:
        raise CardError(f"Recipe {card['name']!r} is prepared: its source is {card['source']['prepared']!r}.")
    store = Store(output)
    made_from = ingredients(card, data, collator, limit)
    refuses = policy == "refuse"
    if _is_whole(store, made_from, refuses) and not store.sizes(JOURNAL):
        return _told(store, say)
    try:
        with claimed(store, JOURNAL, say):
            if _is_whole(store, made_from, refuses):
                return _told(store, say)
            job = _Job(store, card, data, made_from, collator, workers, limit, refuses)
            job.begin(say)
            return job.work("preparing" if echo else None)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"No space left ({os.strerror(error.errno)}) while preparing {card['name']!r} in {store}.{_room(store, card, limit)} Whole "
            "shards are kept: make room, and the same command goes on; or choose another folder."
        ) from error


@dataclass(slots=True)
class _Shard:
    """A shard while it is written: its rows, and the account of the places it is of."""

    number: int
    first: int  # place of the recipe
    account: Accounting
    faults: Faults = field(default_factory=Faults)
    writer: ShardWriter | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)  # for the index
    media: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Job:
    store: Store
    card: Mapping[str, Any]
    data: str | None
    made_from: dict[str, Any]
    collator: ChatCollator | None
    workers: int
    limit: int | None
    refuses: bool
    done: list[dict[str, Any]] = field(default_factory=list)  # what the journal says of each whole shard
    faults: Faults = field(default_factory=Faults)  # of all rows so far
    seen: set[bytes] = field(default_factory=set)  # likeness of the examples before

    def begin(self, say: Echo) -> None:
        """Find out what has been done before. Raises ConfigError where the folder is not ours."""
        found = {*self.store.sizes(), *self.store.sizes(JOURNAL)} - {"lock"}
        try:
            begun = json.loads(self.store.read(BEGUN))
        except FileNotFoundError:
            begun = None
        if begun is None:
            if strange := sorted(name for name in found if not name.startswith(".")):
                raise ConfigError(
                    f"{self.store} is not empty and nothing prepared (it holds {', '.join(strange[:4])}). Choose another folder."
                )
            self.store.write(BEGUN, json.dumps(self.made_from).encode())
            return
        if begun != self.made_from:
            raise ConfigError(
                f"{self.store} was begun with something else: {differences(begun, self.made_from)}. Choose another folder, or remove it."
            )
        self.done = list(self._whole_parts())
        for said in self.done:
            self.faults.merge(Faults.from_dict(said["faults"]))
        if self.refuses:
            self.faults.refuse(f" of {self.card['name']!r}", f"{self.store} was begun without them: {KEPT_OUT}")
        self.seen = {
            alike for number, said in enumerate(self.done) if said["shard"] for alike in self._likeness(number)
        }
        if self.done:
            count = "1 shard is" if len(self.done) == 1 else f"{len(self.done)} shards are"
            say(f"going on after row {self.done[-1]['next']:,}: {count} whole")

    def work(self, title: str | None) -> dict[str, Any]:
        """Write what is missing. Returns what prepared.json says."""
        start = self.done[-1]["next"] if self.done else 0
        total = self.limit if self.limit is not None else self.card.get("rows")
        rows = self._examined(start)
        with self.store.staging(JOURNAL) as aside, Bar(total, title, "row") as bar, closing(rows):
            bar.update(start)
            shard, place = _Shard(len(self.done), start, self._account()), start - 1
            try:
                for found in rows:
                    if found.place != place:
                        bar.update(found.place - place)
                        place = found.place
                        held = shard.writer.bytes if shard.writer else 0
                        if place - shard.first >= SHARD_PLACES or held >= SHARD_BYTES:
                            self._end(shard, place, aside)
                            shard = _Shard(len(self.done), place, self._account())
                    self._take(shard, found, aside)
                self._end(shard, place + 1, aside)
            except BaseException:
                if shard.writer is not None:
                    shard.writer.abandon()
                raise
            if self._refused:
                self._leave_nothing()
                self.faults.refuse(f" of {self.card['name']!r}", f"Nothing is prepared. Mend them, or {LEAVE_OUT}")
            return self._finish(aside)

    def _examined(self, start: int) -> Generator[Examined]:
        root = recipe_root(self.card, self.data)
        pack = Pack(root, DEFAULT_ACCESS if self.collator is None else self.collator.access)
        limit = None if self.limit is None else self.limit - start
        return examine(
            self.card, self.data, collator=self.collator, facts=pack, workers=self.workers, start=start, limit=limit
        )

    @property
    def _refused(self) -> bool:
        return self.refuses and bool(self.faults.reasons)

    def _account(self) -> Accounting:
        return Accounting(str(self.card["name"]))

    def _take(self, shard: _Shard, found: Examined, aside: Path) -> None:
        """Account for what became of a row, and write its example."""
        outcome, account = found.outcome, shard.account
        account.read += 1
        self.faults.looked_at += 1
        shard.faults.looked_at += 1
        if outcome.error is not None:
            self.faults.add(outcome.error, outcome.id)
            shard.faults.add(outcome.error, outcome.id)
            account.drop(outcome.error.reason, outcome.id)
            return
        if outcome.example is None:
            account.drop(outcome.dropped, outcome.id)
            return
        packed: Packed = found.facts
        alike = packed.likeness()
        if alike in self.seen:
            account.duplicates.add(outcome.id)
            if self.card.get("duplicates") == "drop":
                account.drop("the same as an earlier row", outcome.id)
                return
        self.seen.add(alike)
        for effect in outcome.changed:
            account.change(effect, outcome.id)
        account.used += 1
        account.examples += 1
        account.sources[packed.source] += 1
        if found.measured is not None:
            account.notes.update(found.measured.notes)
        numbers: tuple[int | None, ...] = (None, None, None)
        if self.collator is not None and found.measured is not None:
            numbers = tokens, media, response = within(found.measured, self.collator.max_length)
            account.count(tokens, media, response)
        if self._refused:
            return  # nothing will be left
        if shard.writer is None:
            shard.writer = ShardWriter(aside / shard_name(shard.number))
        shard.writer.add(packed)
        shard.media.update(kind for kind in ("images", "videos") if getattr(packed, kind))
        shard.media["text"] += not (packed.images or packed.videos)
        row = {
            "id": packed.id,
            "source": packed.source,
            "shard": shard.number,
            "row": len(shard.rows),
            "likeness": alike,
            "changed": outcome.changed,
        }
        shard.rows.append(row | dict(zip(("tokens", "media", "response"), numbers, strict=True)))

    def _end(self, shard: _Shard, place: int, aside: Path) -> None:
        """Put a whole shard into the folder, then the journal's word that it is there."""
        if self._refused:
            if shard.writer is not None:
                shard.writer.abandon()
            return
        said: dict[str, Any] = {
            "shard": None,
            "next": place,
            "account": shard.account.as_dict(),
            "faults": shard.faults.as_dict(),
            "media": shard.media,
        }
        if shard.writer is not None:
            shard.writer.close()
            import pyarrow.parquet as pq

            file, index = aside / shard_name(shard.number), aside / f"index-{shard.number:05d}.parquet.new"
            pq.write_table(index_table(shard.rows, list(locate(file))), index)
            size, digest, index_digest = file.stat().st_size, sha256_of(file), sha256_of(index)
            said["shard"] = {"name": shard_name(shard.number), "rows": len(shard.rows), "bytes": size, "sha256": digest}
            said["index"] = index_digest
            shard.writer = None
            self.store.put(f"{JOURNAL}/{_index(shard.number)}", index)
            self.store.put(shard_name(shard.number), file)
        self.store.write(f"{JOURNAL}/{_part(shard.number)}", json.dumps(said).encode())
        self.done.append(said)

    def _whole_parts(self) -> Iterator[dict[str, Any]]:
        """What the journal says of the shards that are there, in order, up to the first that is not."""
        sizes, journal = self.store.sizes(), self.store.sizes(JOURNAL)
        for number in range(len(journal)):
            if _part(number) not in journal:
                return
            said = json.loads(self.store.read(f"{JOURNAL}/{_part(number)}"))
            shard = said["shard"]
            if shard is not None and (sizes.get(shard["name"]) != shard["bytes"] or _index(number) not in journal):
                return
            yield said

    def _likeness(self, number: int) -> list[bytes]:
        """Of the examples of a whole shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        raw = pa.BufferReader(self.store.read(f"{JOURNAL}/{_index(number)}"))
        table = pq.ParquetFile(raw).read(columns=["likeness"], use_threads=False)  # forks follow
        found: list[bytes] = table.column("likeness").to_pylist()
        return found

    def _finish(self, aside: Path) -> dict[str, Any]:
        """Join the parts of the index, and say that all is there."""
        import hashlib

        import pyarrow as pa
        import pyarrow.parquet as pq

        account, media = self._account(), Counter[str]()
        for said in self.done:
            account.merge(Accounting.from_dict(said["account"]))
            media.update(said["media"])
        shards = [said["shard"] for said in self.done if said["shard"] is not None]
        if not shards:
            self._leave_nothing()
            raise RowError(f"Recipe {self.card['name']!r} has no rows that can be used: {_reasons(account)}.")
        index, writer = aside / f"{INDEX}.new", None
        for number, said in enumerate(self.done):
            if said["shard"] is None:
                continue
            raw = self.store.read(f"{JOURNAL}/{_index(number)}")
            if hashlib.sha256(raw).hexdigest() != said["index"]:
                raise UserError(
                    f"{self.store}/{JOURNAL}/{_index(number)} is damaged. Remove {self.store}, and prepare again."
                )
            table = pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False)
            writer = writer or pq.ParquetWriter(index, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        size, digest = index.stat().st_size, sha256_of(index)
        self.store.put(INDEX, index)
        whole = {
            "version": VERSION,
            "fingerprint": fingerprint_of(self.made_from),
            "rows": sum(shard["rows"] for shard in shards),
            "media": {kind: media[kind] for kind in ("images", "videos", "text")},
            "accounting": account.as_dict() | {"fingerprint": fingerprint_of(self.made_from)},
            "faults": self.faults.as_dict(),
            "measured_with": self.made_from["measured_with"],
            "made_from": self.made_from,
            "card": {key: value for key, value in self.card.items() if key != "data"},
            "index": {"name": INDEX, "bytes": size, "sha256": digest},
            "shards": shards,
        }
        known = {shard["name"] for shard in shards}
        self.store.remove(name for name in self.store.sizes() if name.startswith("shard-") and name not in known)
        self.store.write(WHOLE, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
        return whole

    def _leave_nothing(self) -> None:
        shards = [name for name in self.store.sizes() if name.startswith("shard-")]
        self.store.remove([*shards, *(f"{JOURNAL}/{name}" for name in self.store.sizes(JOURNAL) if name != "lock")])


def _part(number: int) -> str:
    return f"part-{number:05d}.json"


def _index(number: int) -> str:
    return f"index-{number:05d}.parquet"


def _reasons(account: Accounting) -> str:
    found = sorted(account.dropped.items(), key=lambda one: -one[1].rows)
    return "; ".join(
        f"{reason} ({rows.rows:,}: {', '.join(rows.ids[:5])}{' ...' * (rows.rows > 5)})" for reason, rows in found
    )


def _is_whole(store: Store, made_from: Mapping[str, Any], refuses: bool) -> bool:
    """Whether the folder is prepared of the same. Raises ConfigError where it is of something else, UserError if damaged,
    and RowError where it was prepared without rows that are refused now."""
    found = read_whole(store)
    if found is None:
        return False
    if found["made_from"] != made_from:
        raise ConfigError(
            f"{store} is prepared of something else: {differences(found['made_from'], made_from)}. Choose another folder, or remove it."
        )
    if refuses:
        Faults.from_dict(found["faults"]).refuse(
            f" of {found['card']['name']!r}", f"{store} was prepared without them: {KEPT_OUT}"
        )
    return True


def _told(store: Store, say: Echo) -> dict[str, Any]:
    """What a whole folder says of itself, its files checked, what the journal left taken out."""
    found = Prepared(store.url).about
    what = f"{found['rows']:,} examples (fingerprint {found['fingerprint'][:12]})"
    say(f"{store} is prepared already: {what}; files that rows name are not read again")
    return found


def _room(store: Store, card: Mapping[str, Any], limit: int | None) -> str:
    """What there is, and what is needed, as far as that can be told from the rows that are done."""
    sizes = store.sizes()
    written = sum(size for name, size in sizes.items() if name.startswith("shard-"))
    said = f" {written / 1e6:,.1f} MB are written"
    journal = [name for name in store.sizes(JOURNAL) if name.startswith("part-")]
    total = limit if limit is not None else card.get("rows")
    if journal and total:
        rows = json.loads(store.read(f"{JOURNAL}/{max(journal)}"))["next"]
        said += f", for {rows:,} of {total:,} rows: about {written * max(0, total - rows) / max(1, rows) / 1e6:,.1f} MB more are needed"
    if not store.remote:
        there = next(folder for folder in (store.folder, *store.folder.parents) if folder.exists())
        said += f"; {shutil.disk_usage(there).free / 1e6:,.1f} MB are free"
    return said + "."
