"""Check page: a check's report and rows read again in; one self-contained HTML page with plots and pictures out. Works offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from typing import Any

import numpy as np

from vlm_dft.benchmarks import read_benchmark
from vlm_dft.chat import Example, is_trained, text_of
from vlm_dft.check_report import Findings
from vlm_dft.check_tables import in_benchmarks, message_of, shared_line
from vlm_dft.checking import rows_at
from vlm_dft.contamination import OVERLAPS, QUESTION, Items, split_cards
from vlm_dft.errors import ImageError, RowError, UserError, printable
from vlm_dft.media import open_image
from vlm_dft.recipes import recipe_root
from vlm_dft.recurring import first_pairs
from vlm_dft.report_charts import counts_figure
from vlm_dft.report_style import STYLE
from vlm_dft.rows import locate
from vlm_dft.sources import MediaAccess

SIDE, PICTURES = 320, 3  # pixels of an embedded picture's longer side; pictures shown of a row
BUDGET = 8 * 2**20  # bytes of embedded pictures; a row's pictures beyond it are not shown, and that is said
KINDS, PAIRS, WORST, TEXT, NAME = (
    24,
    12,
    6,
    600,
    200,
)  # kinds of faults, pairs of a kind, rows of an extreme, characters
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no request and no script at all
CHECK_STYLE = """
.pair{display:grid;grid-template-columns:1fr 1fr;gap:12px;margin-top:12px}.pair article{flex-direction:column;gap:8px}
.pair .pictures{flex:none;max-width:320px}.fault{border-color:var(--bad)}.why{color:var(--bad);overflow-wrap:anywhere;
font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap}.nopicture{font-size:12px;color:var(--soft);border:1px dashed var(--line);
border-radius:4px;padding:8px;overflow-wrap:anywhere}.pictures img{margin-bottom:4px;width:auto;max-width:100%}
details{margin-top:12px}h3 small{font-weight:400}
.advice{padding-left:20px;margin:0}.advice li{margin:4px 0}header~header{border-top:1px solid var(--line);margin-top:56px;padding-top:28px}
td.said,th.said{text-align:left;white-space:normal;overflow-wrap:anywhere}
@media(max-width:640px){.pair{grid-template-columns:1fr}}
"""


class Album:
    """Pictures as data: URIs, as long as they fit into a budget of bytes."""

    def __init__(self, access: MediaAccess, budget: int) -> None:
        self.access, self.left, self.left_out = access, budget, 0

    def show(self, source: Any, what: str) -> str:
        """An <img>, or a box that says why there is none. A damaged picture is shown as far as it can be read."""
        caption, picture = "", None
        try:
            picture = open_image(source, access=self.access)
        except ImageError as error:
            with suppress(ImageError), _as_far_as_it_goes():
                picture = open_image(source, access=self.access)
                caption = "<div class=nopicture>damaged: as far as it can be read</div>"
            if picture is None:
                return f"<div class=nopicture>{_text(error, 200)}</div>"
        found = _encoded(picture)
        if len(found) > self.left:
            self.left_out += 1
            return "<div class=nopicture>not embedded: the page would be too large</div>"
        self.left -= len(found)
        return f"<img alt='{_text(what)}' src='{found}'>{caption}"


def render_page(every: Sequence[tuple[Mapping[str, Any], Findings]], mixture: Mapping[str, Any] | None = None) -> str:
    """The whole page: of one recipe, or of a mixture's sources one after the other. Every text from data or cards is escaped."""
    sections = [_mixture(mixture)] if mixture else []
    for found, findings in every:
        album = Album(MediaAccess(), BUDGET // len(every))  # nothing is fetched for a page
        sections += _sections(found, findings, album)
        if album.left_out:
            sections.append(
                f"<p class=note>{album.left_out} pictures were left out, to keep this page under 10 MB.</p>"
            )
    title = _text(f"{(mixture or every[0][0])['recipe']}: checked")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{CHECK_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


def _sections(found: Mapping[str, Any], findings: Findings, album: Album) -> list[str]:
    """All that is shown of one recipe."""
    rows = _Rows(findings)
    return [
        _header(found), _advice(found), _plots(found), _counted(found), _faults(found, rows, album),
        _worst(found, findings, rows, album), _recurring(findings, rows, album), _contamination(found, findings, rows, album),
    ]  # fmt: skip


def _mixture(mixture: Mapping[str, Any]) -> str:
    """A mixture's sources side by side."""
    rows = "".join(
        f"<tr><th class=said>{_text(found['recipe'])}</th><td>{found['rows']['read']:,}</td><td>{found['rows']['faulty']:,}</td>"
        f"<td>{found['duplicates']['rows']['extra']:,}</td><td>{in_benchmarks(found):,}</td>"
        f"<td>{found['tokens']['all'].get('median', '')}</td></tr>"
        for found in mixture["sources"]
    )
    head = "".join(
        f"<th>{what}</th>" for what in ("rows", "cannot be used", "again", "in benchmarks", "tokens, median")
    )
    lines = [f"{name} was not checked: {why}" for name, why in mixture["not_checked"].items()]
    lines += map(shared_line, mixture["shared_between_sources"])
    listed = "".join(f"<li>{_text(line, TEXT)}</li>" for line in lines)
    return (
        f"<header><h1>{_text(mixture['recipe'])} <span>checked, {len(mixture['sources'])} sources, one after the other</span></h1>"
        f"<div class=scroll><table><thead><tr><th class=said>source</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<ul class=advice>{listed}</ul></header>"
    )


class _Rows:
    """The rows that the page shows, read again in one pass."""

    def __init__(self, findings: Findings) -> None:
        self.findings, checked = findings, findings.checked
        pairs = [*_pairs(findings.recurring).values()]
        wanted = {checked.places[row] for group in pairs for pair in group for row in pair}
        wanted |= {checked.places[row] for _, rows in extremes(findings) for row, _ in rows}
        for by_what in findings.overlaps.values():
            wanted |= {checked.places[one.row] for rows in by_what.values() for one in rows[:PAIRS]}
        wanted |= {place for fault in list(checked.faults.values())[:KINDS] for place, _, _ in fault.shown[:2]}
        self.raw: dict[int, Any] = {}
        self.examples: dict[tuple[int, str], Example] = {}
        for place, row, outcome in rows_at(findings.card, findings.config.data, sorted(wanted)):
            self.raw[place] = row
            if outcome.example is not None:
                self.examples[place, outcome.id] = outcome.example

    def card(self, row: int, album: Album, note: str = "") -> str:
        """A usable row as a card."""
        checked = self.findings.checked
        return _example(self.examples.get((checked.places[row], checked.ids[row])), checked.ids[row], album, note)


def _encoded(picture: Any) -> str:
    """A picture made small, as PNG or JPEG, whichever is smaller."""
    picture.thumbnail((SIDE, SIDE))
    found = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found[kind] = buffer.getvalue()
    kind = min(found, key=lambda kind: len(found[kind]))
    return f"data:image/{kind};base64," + base64.b64encode(found[kind]).decode()


@contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _text(value: Any, longest: int = 10_000) -> str:
    """Any text as HTML, also within quotes; what is obeyed or unseen by its number."""
    text = str(value)
    more = f" … ({len(text):,} characters)" if len(text) > longest else ""
    return escape(printable(text[:longest]) + more, quote=True)


def _example(example: Example | None, name: str, album: Album, note: str = "", kind: str = "") -> str:
    """A row's pictures, question and answer."""
    if example is None:
        return (
            f"<article><div class=words><code>{_text(name, NAME)}</code><p>could not be read again</p></div></article>"
        )
    asked = "\n".join(text_of(m["content"]) for m in example.messages if m["role"] == "user")
    said = "\n".join(text_of(m["content"]) for m in example.messages if is_trained(m))
    words = f"<p class=question>{_text(asked, TEXT)}</p>" + (
        f"<pre>{_text(said, TEXT)}</pre>" if kind != "item" else ""
    )
    return _article(name, _pictures(example.images, name, album), words, note)


def _article(name: str, pictures: str, words: str, note: str = "", style: str = "") -> str:
    tag = f"<span>{_text(note)}</span>" if note else ""
    return (
        f"<article class='{style}'><div class=pictures>{pictures}</div><div class=words><div class=tags>{tag}"
        f"<code>{_text(name, NAME)}</code></div>{words}</div></article>"
    )


def _pictures(sources: Sequence[Any], name: str, album: Album) -> str:
    shown = "".join(album.show(source, f"image {k + 1} of {name}") for k, source in enumerate(sources[:PICTURES]))
    more = len(sources) - PICTURES
    return shown + (f"<div class=nopicture>and {more} more</div>" if more > 0 else "")


def _header(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    facts = [
        ("Rows", f"{rows['read']:,}"), ("Looked at", found["looked_at"]), ("Usable", f"{rows['usable']:,}"),
        ("Cannot be used", f"{rows['faulty']:,}"), ("Dropped by the card", f"{rows['dropped']:,}" if rows["dropped"] else None),
        ("Licence", found["licence"]), ("Data", found["data"]), ("Tokens as of", found["model"]),
    ]  # fmt: skip
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts if v is not None)
    stopped = f"<p class=alarm>Reading stopped: {_text(found['stopped'], TEXT)}</p>" if found["stopped"] else ""
    return (
        f"<header><h1>{_text(found['recipe'])} <span>checked</span></h1><dl class=facts>{items}</dl>{stopped}</header>"
    )


def _advice(found: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in found["advice"])
    return f"<section><h2>What to do</h2><ul class=advice>{lines or '<li>Nothing: no fault was found.</li>'}</ul></section>"


def _plots(found: Mapping[str, Any]) -> str:
    tokens, pictures = found["tokens"], found["pictures"]
    wanted = [
        (tokens["all"], "tokens a row", "tokens"), (tokens["response"], "response tokens a row", "tokens"),
        (tokens["media"], "picture tokens a row", "tokens"), (pictures["width"], "picture widths", "pixels"),
        (pictures["height"], "picture heights", "pixels"), (pictures["aspect"], "long over short side", ""),
    ] if tokens["all"]["count"] else []  # fmt: skip
    figures = "".join(counts_figure(f["histogram"], title, unit) for f, title, unit in wanted if f["count"])
    note = (
        "<p class=note>Where the largest lies far out, bins grow from left to right; point at one for its bounds.</p>"
    )
    return f"<section><h2>Distributions</h2><div class=figures>{figures}</div>{note}</section>" if figures else ""


def _counted(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th class=said>{_text(what)}</th><td>{one['rows']:,}</td>"
        f"<td class=said>{_text(', '.join(k[:NAME] for k in one['ids'][:8]), TEXT)}</td></tr>"
        for name in ("dropped", "changed", "remarks", "notes")
        for what, one in found[name].items()
    )
    letters = ", ".join(
        f"{name} in {count:,} row{'s' * (count != 1)}" for name, count in found["text"]["rows_with_letters_of"].items()
    )
    head = "<thead><tr><th>what</th><th>rows</th><th class=said>such as</th></tr></thead>"
    table = f"<div class=scroll><table>{head}<tbody>{rows}</tbody></table></div>" if rows else ""
    return f"<section><h2>To know</h2><p class=note>Letters: {_text(letters or 'none')}.</p>{table}</section>"


def _faults(found: Mapping[str, Any], rows: _Rows, album: Album) -> str:
    blocks = []
    for kind, fault in list(found["faults"].items())[:KINDS]:
        cards = "".join(_faulty(one, rows, album) for one in fault["first"][:2])
        blocks.append(
            f"<h3>{_text(kind)} <small>{fault['rows']:,} row{'s' * (fault['rows'] != 1)}</small></h3><div class=cards>{cards}</div>"
        )
    more = len(found["faults"]) - KINDS
    blocks += [f"<p class=note>and {more} more kinds, in --json</p>"] if more > 0 else []
    return f"<section><h2>Cannot be used</h2>{''.join(blocks)}</section>" if blocks else ""


def _faulty(one: Mapping[str, Any], rows: _Rows, album: Album) -> str:
    """A row that cannot be used: why, what it says, and those of its pictures that open."""
    raw = rows.raw.get(one["place"])
    words = f"<p class=why>{_text(message_of(one, TEXT), TEXT)}</p>"
    pictures = ""
    if raw is not None:
        said = "\n".join(
            f"{key}: {value}" for key, value in raw.items() if isinstance(value, (str, int, float, list, type(None)))
        )
        words += f"<pre>{_text(said, TEXT)}</pre>"
        pictures = _pictures(list(_sources(raw, rows.findings)), one["id"], album)
    return _article(one["id"], pictures, words, style="fault")


def _sources(raw: Mapping[str, Any], findings: Findings) -> Iterable[Any]:
    """The pictures that a raw row names, those which can be located."""
    card, root = findings.card, recipe_root(findings.card, findings.config.data)
    if root is not None and card.get("image_root"):
        root = root / card["image_root"]
    named = [card["image"].format_map(raw)] if "image" in card and _fills(card["image"], raw) else None
    if named is None:
        column = card.get("images") or next((name for name in ("images", "image") if raw.get(name)), None)
        value = raw.get(column) if column else None
        named = list(value) if isinstance(value, (list, tuple)) else [value] if value else []
    for source in named:
        with suppress(RowError):
            yield from locate([source], root, where="picture")


def _fills(template: Any, raw: Mapping[str, Any]) -> bool:
    try:
        return bool(str(template).format_map(raw))
    except (KeyError, ValueError, IndexError, AttributeError):
        return False


def extremes(findings: Findings) -> list[tuple[str, list[tuple[int, str]]]]:
    """(what, [(row, its number)]) of the rows that lie farthest out."""
    checked = findings.checked
    if not checked.tokens:
        return []
    tokens, response = np.asarray(checked.tokens), np.asarray(checked.response)
    found = [
        ("most tokens", [(int(k), f"{tokens[k]:,} tokens") for k in np.argsort(-tokens, kind="stable")[:WORST]]),
        (
            "shortest responses",
            [(int(k), f"{response[k]:,} tokens") for k in np.argsort(response, kind="stable")[:WORST]],
        ),
    ]
    if len(checked.prints):
        h, w = np.asarray(checked.heights), np.asarray(checked.widths)
        aspect = np.maximum(h, w) / np.minimum(h, w)
        for what, order in (("largest pictures", -h * w), ("smallest pictures", h * w), ("longest shapes", -aspect)):
            places = np.argsort(order, kind="stable")[:WORST]
            found.append((what, [(checked.prints.rows[k], f"{w[k]:,}×{h[k]:,} pixels") for k in places]))
    return found


def _worst(found: Mapping[str, Any], findings: Findings, rows: _Rows, album: Album) -> str:
    blocks: list[str] = []
    for what, some in extremes(findings):
        cards = "".join(rows.card(row, album, note) for row, note in some)
        opened = "" if blocks else " open"
        blocks.append(f"<details{opened}><summary>{_text(what)}</summary><div class=cards>{cards}</div></details>")
    return f"<section><h2>Farthest out</h2>{''.join(blocks)}</section>" if blocks else ""


def _pairs(found: Any) -> dict[str, list[tuple[int, int]]]:
    return {
        "same pictures and same question: the row again": first_pairs(found.rows, PAIRS),
        "same question, look-alike picture: perhaps again, look at them": found.alike[:PAIRS],
        "same picture, another question: normal where a picture is asked about often": first_pairs(
            found.pictures, PAIRS // 2
        ),
        "look-alike picture, another question": found.looks[:PAIRS],
    }


def _recurring(findings: Findings, rows: _Rows, album: Album) -> str:
    blocks = []
    for what, pairs in _pairs(findings.recurring).items():
        shown = "".join(f"<div class=pair>{rows.card(a, album)}{rows.card(b, album)}</div>" for a, b in pairs)
        blocks += [f"<details open><summary>{_text(what)}</summary>{shown}</details>"] if pairs else []
    return f"<section><h2>Recurs in the set</h2>{''.join(blocks) or '<p>Nothing.</p>'}</section>"


def _contamination(found: Mapping[str, Any], findings: Findings, rows: _Rows, album: Album) -> str:
    if not findings.asked:
        return ""
    blocks = []
    for items in findings.compared:
        one, by_what = found["contamination"]["benchmarks"][items.name], findings.overlaps[items.name]
        lost = f"; {len(one['unreadable']):,} more items could not be read" if one["unreadable"] else ""
        blocks.append(
            f"<h3>{_text(items.name)} <small>{one['contaminated_items']:,} of its {one['items']:,} items are in the set{lost}</small></h3>"
        )
        wanted = {k for what in by_what.values() for row in what[:PAIRS] for k in row.items[:1]}
        examples = _items(items, wanted)
        for what in OVERLAPS:
            pairs = by_what.get(what, [])[:PAIRS]
            shown = "".join(
                f"<div class=pair>{rows.card(row.row, album, 'training')}"
                f"{_example(examples.get(row.items[0]), '/'.join(items.ids[row.items[0]]), album, items.name, 'item')}</div>"
                for row in pairs
            )
            opened = " open" if what != QUESTION else ""
            blocks += (
                [f"<details{opened}><summary>{_text(what)}: {len(by_what[what]):,} rows</summary>{shown}</details>"]
                if pairs
                else []
            )
    unread = "".join(
        f"<li><b>{_text(name)}</b> was not compared: {_text(why, TEXT)}</li>" for name, why in findings.unread.items()
    )
    return f"<section><h2>Shared with benchmarks</h2>{''.join(blocks)}<ul class=advice>{unread}</ul></section>"


def _items(items: Items, wanted: Iterable[int]) -> dict[int, Example]:
    """Items of a benchmark read again."""
    found: dict[int, Example] = {}
    by_split: dict[str, dict[int, int]] = {}
    for k in wanted:
        by_split.setdefault(items.ids[k][0], {})[items.places[k]] = k
    cards = split_cards(read_benchmark(items.card), items.data)
    for split, places in by_split.items():
        with suppress(UserError):
            for place, _, outcome in rows_at(cards[split], cards[split]["data"], sorted(places)):
                if outcome.example is not None:
                    found[places[place]] = outcome.example
    return found
