"""Check tables: a check's report in; tables and lines for a terminal out. Nothing here prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vlm_dft.contamination import CONTAMINATED, LOOKS
from vlm_dft.errors import printable

BLOCKS = "▁▂▃▄▅▆▇█"
FAULTY, GOOD, SOFT = "bold red", "green", "dim"
IDS, LONGEST = 4, 200  # ids named in a table, characters of a message


def tables(found: Mapping[str, Any], *, titled: bool = False) -> Iterator[Table | Text | Rule]:
    """All of a report, in the order in which it is to be read. titled: a line before it, where others follow."""
    if titled:
        yield Rule(_said(_short(found["recipe"], 60)), align="left")
    yield _headline(found)
    if found["stopped"]:
        yield Text(f"Reading stopped: {printable(found['stopped'])}", style=FAULTY)
    if found["faults"]:
        table = _table("cannot be used", "rows", "such as")
        for kind, fault in found["faults"].items():
            table.add_row(
                _said(kind),
                f"{fault['rows']:,}",
                _said("\n".join(message_of(one, 300) for one in fault["first"][:2])),
            )
        yield table
    yield from _counted(found)
    if found["tokens"]["all"]["count"]:
        yield _tokens(found["tokens"])
    if found["pictures"]["count"]:
        yield _pictures(found["pictures"])
    yield _text_line(found["text"])
    yield from _duplicates(found["duplicates"])
    yield from _contamination(found["contamination"])
    for line in found["advice"]:
        yield Text("→ ", style="bold").append(printable(line), style="bold")


def _headline(found: Mapping[str, Any]) -> Text:
    rows = found["rows"]
    text = Text().append(printable(found["recipe"]), style="bold")
    text.append(
        f": {rows['read']:,} row{'s' * (rows['read'] != 1)} read ({printable(found['looked_at'])}), {rows['usable']:,} usable, "
    )
    text.append(f"{rows['faulty']:,} cannot be used", style=FAULTY if rows["faulty"] else GOOD)
    return text.append(f", {rows['dropped']:,} dropped by the card" if rows["dropped"] else "")


def mixture_tables(mixture: Mapping[str, Any]) -> Iterator[Table | Text | Rule]:
    """A mixture's sources side by side, after what is said of each."""
    yield Rule(_said(_short(mixture["recipe"], 60)), align="left")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in ("rows", "faulty", "dropped", "again", "in benchmarks", "tokens", "most"):  # fit 80 columns
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for found in mixture["sources"]:
        rows, tokens, shared = found["rows"], found["tokens"]["all"], in_benchmarks(found)
        table.add_row(
            _said(_short(found["recipe"], 60)), f"{rows['read']:,}", Text(f"{rows['faulty']:,}", style=FAULTY if rows["faulty"] else ""),
            f"{rows['dropped']:,}", f"{found['duplicates']['rows']['extra']:,}", Text(f"{shared:,}", style=FAULTY if shared else ""),
            *([_number(tokens["median"]), _number(tokens["max"])] if tokens["count"] else ["", ""]),
        )  # fmt: skip
    yield table
    for name, why in mixture["not_checked"].items():
        yield Text(f"not checked: {printable(name)}: {printable(_short(why, 2 * LONGEST))}", style=FAULTY)
    for one in mixture["shared_between_sources"]:
        yield (
            Text("→ ", style="bold")
            .append(shared_line(one), style="bold")
            .append(" Such as " + str(_ids([f"{a} = {b}" for a, b in one["ids"]], longest=LONGEST)) + ".", style=SOFT)
        )


def shared_line(one: Mapping[str, Any]) -> str:
    """Two sources of a mixture that hold the same rows, in words."""
    left, right = map(printable, one["sources"])
    return f"{one['rows']:,} of the rows of {right} that were looked at ask what a row of {left} asks, with the same pictures."


def in_benchmarks(found: Mapping[str, Any]) -> int:
    """Rows that are surely in a benchmark; one in two of them counts twice."""
    return sum(one["contaminated_rows"] for one in found["contamination"]["benchmarks"].values())


def message_of(one: Mapping[str, Any], longest: int) -> str:
    """A fault's message, whose end is what matters: a long id in it is cut."""
    name = one["id"]
    return _short(one["message"].replace(name, _short(name, 100)) if len(name) > 100 else one["message"], longest)


def _counted(found: Mapping[str, Any]) -> Iterator[Table]:
    whats = [
        (name, what, one) for name in ("dropped", "changed", "remarks", "notes") for what, one in found[name].items()
    ]
    if whats:
        table = _table("to know", "rows", "such as")
        for name, what, one in whats:
            table.add_row(
                _said(f"{name}: {what}" if name in ("dropped", "changed") else what),
                f"{one['rows']:,}",
                _ids(one["ids"]),
            )
        yield table


def _tokens(tokens: Mapping[str, Any]) -> Table:
    table = _numbers("tokens a row", "share")
    whole = max(1, tokens["all"]["sum"])
    for name, key in (("all", "all"), ("pictures", "media"), ("prompt text", "text"), ("response", "response")):
        table.add_row(name, *_figures(tokens[key]), f"{tokens[key]['sum'] / whole:.0%}", histogram(tokens[key]))
    return table


def _pictures(pictures: Mapping[str, Any]) -> Table:
    formats = ", ".join(f"{kind} {count:,}" for kind, count in pictures["formats"].items())
    table = _numbers(f"{pictures['count']:,} pictures ({formats})")
    for name, key in (("width", "width"), ("height", "height"), ("long / short side", "aspect")):
        table.add_row(name, *_figures(pictures[key]), histogram(pictures[key]))
    return table


def _text_line(text: Mapping[str, Any]) -> Text:
    scripts = ", ".join(
        f"{name} in {rows:,} row{'s' * (rows != 1)}" for name, rows in text["rows_with_letters_of"].items()
    )
    share = text["non_ascii"] / max(1, text["characters"])
    return Text(f"text: {text['characters']:,} characters, {share:.1%} not ASCII; letters: {scripts or 'none'}")


def _duplicates(found: Mapping[str, Any]) -> Iterator[Table | Text]:
    rows = (
        ("same pictures and same question: the row again", "rows", "groups"),
        ("same question, look-alike picture: perhaps again", "look_alike_same_question", "pairs"),
        (
            "same picture, another question (normal where a picture is asked about often)",
            "picture_of_another_row",
            "groups",
        ),
        ("look-alike picture, another question", "look_alike_other_question", "pairs"),
        (
            "same question, another picture (normal where questions come from templates)",
            "question_of_another_row",
            "groups",
        ),
    )
    table = _table("recurs in the set", "found", "such as")
    for what, key, unit in rows:
        if count := found[key][unit]:
            table.add_row(
                what,
                f"{count:,} {unit if count > 1 else unit[:-1]}",
                _ids(
                    [" = ".join(_short(one, 40) for one in group[:3]) for group in found[key]["ids"]], longest=LONGEST
                ),
            )
    yield table if table.row_count else Text("recurs in the set: nothing")


def _contamination(found: Mapping[str, Any]) -> Iterator[Table | Text]:
    if not found["asked"]:
        yield Text("compared with no benchmark (--against none)")
        return
    table = _table("shared with a benchmark", "rows", "row = item")
    for name, one in found["benchmarks"].items():
        for what, rows in one["overlaps"].items():
            pairs = [f"{_short(pair['row'], 40)} = {pair['items'][0]}" for pair in rows["pairs"][:IDS]]
            table.add_row(
                Text(f"{printable(name)}: {what}", style={LOOKS: "yellow"}.get(what, FAULTY if what in CONTAMINATED else "")), f"{rows['rows']:,}",
                _ids(pairs, rows["rows"], longest=LONGEST),
            )  # fmt: skip
    if table.row_count:
        yield table
    for name, one in found["benchmarks"].items():
        lost = (
            f"; {len(one['unreadable']):,} more could not be read, the first: {_short(one['unreadable'][0])}"
            if one["unreadable"]
            else ""
        )
        shared = f"{one['contaminated_items']:,} of its {one['items']:,} items are in the set"
        yield Text(
            f"compared with {printable(name)}: {shared}{printable(lost)}",
            style=FAULTY if one["contaminated_rows"] else GOOD,
        )
    for name, why in found["not_compared"].items():
        yield Text(f"not compared with {printable(name)}: {printable(_short(why))}", style="yellow")


def histogram(found: Mapping[str, Any]) -> str:
    """A histogram as one line of blocks; a bin without any is a point."""
    counts = [one["count"] for one in found["histogram"]]
    most = max(counts)
    return "".join(BLOCKS[(count * len(BLOCKS) - 1) // most] if count else "·" for count in counts)


def _figures(found: Mapping[str, Any]) -> list[str]:
    return [_number(found[key]) for key in ("min", "median", "p95", "max")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:,.1f}"


def _numbers(title: str, *more: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for name in ("min", "median", "95%", "max", *more):
        table.add_column(name, justify="right")
    table.add_column("min to max", no_wrap=True)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, overflow="fold", ratio=2)
    table.add_column(columns[0], justify="right", no_wrap=True)
    table.add_column(columns[1], overflow="fold", ratio=3)
    return table


def _said(text: str) -> Text:
    """A text from the data: nothing in it is markup or obeyed."""
    return Text(printable(text))


def _ids(ids: Sequence[str], count: int | None = None, longest: int = 40) -> Text:
    count = len(ids) if count is None else count
    return _said(
        ", ".join(_short(one, longest) for one in ids[:IDS]) + (f" and {count - IDS:,} more" if count > IDS else "")
    )


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
