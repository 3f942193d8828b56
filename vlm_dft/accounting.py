"""Accounting: what became of each row of each source in; counts, ids and tokens, as JSON, as a table and as lines, out.

read = used + dropped always holds for every source: a row is used, or it is dropped for one reason. Tokens are those of an epoch:
rows that a mixture repeats count as often as they are trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_dft.errors import RowError

MOST_IDS = 1_000  # of each reason that are kept; the number of rows is exact whatever it is
KINDS = ("all", "text", "media", "response")


@dataclass(slots=True)
class Rows:
    """How many rows, and the ids of the first of them."""

    rows: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, row_id: str) -> None:
        """One more."""
        self.rows += 1
        if len(self.ids) < MOST_IDS:
            self.ids.append(row_id)

    def extend(self, more: Rows) -> None:
        """Those too."""
        self.rows += more.rows
        self.ids += more.ids[: MOST_IDS - len(self.ids)]

    def as_dict(self) -> dict[str, Any]:
        """As written to accounting.json."""
        return {"rows": self.rows, "ids": list(self.ids)}


@dataclass(slots=True)
class Accounting:
    """What became of every row of a source: nothing is lost in silence."""

    source: str
    read: int = 0
    used: int = 0  # rows; each once, however often it is trained on
    dropped: dict[str, Rows] = field(default_factory=dict)  # by reason
    changed: dict[str, Rows] = field(default_factory=dict)  # by what was done to rows that are used
    duplicates: Rows = field(default_factory=Rows)  # of an earlier row of the source, used or not
    notes: Counter[str] = field(default_factory=Counter)  # what is to be said of rows -> rows
    examples: int = 0  # of an epoch: a row that is repeated counts each time
    tokens: Counter[str] = field(default_factory=Counter)  # KINDS: of the examples
    share: float = 1.0  # of all sources' input tokens
    response_share: float = 1.0  # of all sources' response tokens, which carry the loss
    sources: Counter[str] = field(default_factory=Counter)  # examples, by what they say they are of
    licence: str = ""

    def drop(self, reason: str, row_id: str) -> None:
        """Count a row that is not trained on."""
        self.dropped.setdefault(reason, Rows()).add(row_id)

    def leave_out(self, reason: str, ids: Sequence[str], rows: int) -> None:
        """Count so many rows that are not trained on; ids: of the first of them."""
        self.dropped.setdefault(reason, Rows()).extend(Rows(rows, list(ids)))

    def change(self, effect: str, row_id: str) -> None:
        """Count a row that is trained on otherwise than it was read."""
        self.changed.setdefault(effect, Rows()).add(row_id)

    def count(self, tokens: int, media: int, response: int) -> None:
        """Count the tokens of an example, or of several."""
        self.tokens.update(all=tokens, text=tokens - media, media=media, response=response)

    def merge(self, later: Accounting) -> None:
        """Add the account of later rows of the same source."""
        self.read += later.read
        self.used += later.used
        for mine, theirs in ((self.dropped, later.dropped), (self.changed, later.changed)):
            for what, rows in theirs.items():
                mine.setdefault(what, Rows()).extend(rows)
        self.duplicates.extend(later.duplicates)
        self.notes.update(later.notes)
        self.examples += later.examples
        self.tokens.update(later.tokens)
        self.sources.update(later.sources)

    def check(self) -> None:
        """Assert that no row is lost and none is counted twice."""
        lost = self.read - self.used - sum(found.rows for found in self.dropped.values())
        assert not lost, (
            f"{self.source}: {self.read} rows read, {self.used} used, {self.dropped}: {lost} are not accounted for"
        )

    def as_dict(self) -> dict[str, Any]:
        """As written to accounting.json."""
        return {
            "source": self.source,
            "read": self.read,
            "used": self.used,
            "dropped": {reason: found.as_dict() for reason, found in self.dropped.items()},
            "changed": {effect: found.as_dict() for effect, found in self.changed.items()},
            "duplicates": self.duplicates.as_dict(),
            "notes": dict(self.notes),
            "examples": self.examples,
            "repeated": round(self.examples / self.used, 4) if self.used else 0.0,
            "tokens": {kind: self.tokens[kind] for kind in KINDS} if self.tokens else {},  # where they were counted
            "share": round(self.share, 6),
            "response_share": round(self.response_share, 6),
            "used_by_source": dict(self.sources),
            **({"licence": self.licence} if self.licence else {}),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Accounting:
        """An account as it was written."""
        by_name = {
            name: {what: Rows(rows["rows"], list(rows["ids"])) for what, rows in found.get(name, {}).items()}
            for name in ("dropped", "changed")
        }
        twice = found.get("duplicates") or {"rows": 0, "ids": []}
        return cls(
            found["source"], found["read"], found["used"], **by_name, duplicates=Rows(twice["rows"], list(twice["ids"])),
            notes=Counter(found.get("notes", {})), examples=found.get("examples", found["used"]), tokens=Counter(found.get("tokens", {})),
            share=found.get("share", 1.0), response_share=found.get("response_share", 1.0),
            sources=Counter(found.get("used_by_source", {})), licence=found.get("licence", ""),
        )  # fmt: skip


def whole(accounts: Sequence[Accounting], *, fingerprint: str, **more: Any) -> dict[str, Any]:
    """{"sources": [of each], "total": of all, with the fingerprint of what is trained on, in order}; shares are set. Checked."""
    tokens = sum((account.tokens for account in accounts), Counter[str]())
    for account in accounts:
        account.check()
        account.share = account.tokens["all"] / max(1, tokens["all"])
        account.response_share = account.tokens["response"] / max(1, tokens["response"])
    total = {
        "read": sum(account.read for account in accounts),
        "used": sum(account.used for account in accounts),
        "dropped": _summed([account.dropped for account in accounts]),
        "changed": _summed([account.changed for account in accounts]),
        "duplicates": sum(account.duplicates.rows for account in accounts),
        "examples": sum(account.examples for account in accounts),
        "tokens": {kind: tokens[kind] for kind in KINDS},
        **more,
        "fingerprint": fingerprint,
    }
    return {"sources": [account.as_dict() for account in accounts], "total": total}


def _summed(found: Sequence[Mapping[str, Rows]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in found:
        total.update({what: rows.rows for what, rows in one.items()})
    return dict(total)


def account_table(accounting: Mapping[str, Any]) -> Any:
    """A rich table of what `whole` gives: a row for each source, and one for all."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    for name in TITLES:
        table.add_column(name, justify="right", no_wrap=True)
    sources, total = accounting["sources"], accounting["total"]
    for source in sources:
        table.add_row(source["source"], *account_cells(source))
    if len(sources) > 1:
        table.add_row("all", *account_cells(total), style="bold")
    return table


TITLES = ("read", "used", "dropped", "duplicates", "examples", "tokens", "text", "media", "response", "share")


def account_cells(account: Mapping[str, Any]) -> list[str]:
    """The cells of a source, or of the total, under TITLES; the share is that of the response tokens."""
    twice = account["duplicates"]
    repeated = account["examples"] / account["used"] if account["used"] else 0
    numbers = (
        account["read"], account["used"], account["read"] - account["used"], twice if isinstance(twice, int) else twice["rows"],
    )  # fmt: skip
    often = f" ({repeated:.2f}x)" if account["examples"] != account["used"] else ""
    return [
        *(f"{number:,}" for number in numbers),
        f"{account['examples']:,}{often}",
        *(f"{account['tokens'].get(kind, 0):,}" for kind in KINDS),
        f"{account.get('response_share', 1.0):.1%}",
    ]


def account_lines(accounting: Mapping[str, Any]) -> list[str]:
    """What a table does not say: why rows were dropped, what was done to others, and notes; each with its source and first ids."""
    lines, several = [], len(accounting["sources"]) > 1
    for source in accounting["sources"]:
        of = f"{source['source']}: " if several else ""
        dropped = [(f"dropped, {why}", rows) for why, rows in source["dropped"].items()]
        twice = [("the same as an earlier row", source["duplicates"])] if source["duplicates"]["rows"] else []
        for what, found in (*dropped, *source["changed"].items(), *twice):
            lines.append(f"{of}{found['rows']:,} rows {what}{_some(found['ids'], found['rows'])}")
        lines += [f"{of}{rows:,} rows: {note}" for note, rows in source["notes"].items()]
    return lines


def _some(ids: Sequence[str], rows: int, most: int = 3) -> str:
    """' (a, b, c and 4 more)'."""
    shown = [one if len(one) <= 40 else f"{one[:37]}..." for one in ids[:most]]
    more = f" and {rows - len(shown):,} more" if rows > len(shown) else ""
    return f" ({', '.join(shown)}{more})" if shown else ""


@dataclass(slots=True)
class Faults:
    """Rows that cannot be used where the card refuses them: counted until all were looked at, then one error."""

    looked_at: int = 0
    first: str = ""  # message
    reason: str = ""
    reasons: dict[str, Rows] = field(default_factory=dict)

    def add(self, error: RowError, row_id: str) -> None:
        """One more."""
        self.first, self.reason = (self.first, self.reason) if self.first else (str(error), error.reason)
        self.reasons.setdefault(error.reason, Rows()).add(row_id)

    def merge(self, later: Faults) -> None:
        """Add those of later rows."""
        self.looked_at += later.looked_at
        self.first, self.reason = (self.first, self.reason) if self.first else (later.first, later.reason)
        for reason, rows in later.reasons.items():
            self.reasons.setdefault(reason, Rows()).extend(rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        reasons = {reason: found.as_dict() for reason, found in self.reasons.items()}
        return {"looked_at": self.looked_at, "first": self.first, "reason": self.reason, "reasons": reasons}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Faults:
        """As they were written."""
        reasons = {reason: Rows(rows["rows"], list(rows["ids"])) for reason, rows in found["reasons"].items()}
        return cls(found["looked_at"], found["first"], found["reason"], reasons)

    def refuse(self, of: str = "", advice: str = "") -> None:
        """Raise RowError if there was any. of: whose rows; advice: what to do, but for mending them."""
        count = sum(found.rows for found in self.reasons.values())
        if not count:
            return
        said = "; ".join(
            f"{found.rows:,} {reason} ({', '.join(found.ids[:5])}{', ...' if found.rows > 5 else ''})"
            for reason, found in self.reasons.items()
        )
        what = advice or "Mend them, or leave them out: `bad_rows: drop` in a copy of the card, or --bad_rows drop."
        raise RowError(
            f"{self.first}\n{count:,} of {self.looked_at:,} rows{of} cannot be used: {said}. {what}", self.reason
        )
