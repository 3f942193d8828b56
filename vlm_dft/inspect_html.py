"""Inspection page: inspected rows in, one self-contained HTML page out, every token to be pointed at. Works offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ImageError
from vlm_dft.explain import REASONS
from vlm_dft.inspection import Inspected, Piece, turn_lines, visible
from vlm_dft.media import open_image
from vlm_dft.report_style import STYLE

LONGEST_SIDE = 1280  # pixels of an embedded picture; larger ones are shown smaller, and their caption says their size
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # no request at all
MEANINGS = {
    "prompt": "what the model is asked: read, not trained",
    "media": "the places of a picture's patches: read, not trained",
    "response": "trained: what the model is to write",
    "end of turn": "trained: how the model stops",
    "template after the answer": "written by the chat template behind the answer: not trained",
    "padding": "fills a batch up: not even read",
}

INSPECT_STYLE = """
:root{--t2:#d5f0dd;--t2b:#bfe6cb;--t2l:#17803d;--t3:#fbe3b0;--t3l:#a96500;--t1:#dbe7fb;--t1l:#2f6fde;--step:#0000000b;
--off:#eceded}
@media(prefers-color-scheme:dark){:root{--t2:#1d452d;--t2b:#265a3a;--t2l:#5cc583;--t3:#544017;--t3l:#f0b95a;
--t1:#1f3558;--t1l:#6ea0f7;--step:#ffffff0d;--off:#2a2c34}}
.bar{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-top:24px;
padding:10px 0;background:var(--bg);border-bottom:1px solid var(--line)}
.bar>span{font-size:13px;color:var(--soft)}.bar kbd{font:inherit;border:1px solid var(--line);border-radius:4px;padding:0 4px}
.bar button{display:inline-flex;align-items:center;gap:6px}.bar button[aria-pressed=true]{background:var(--card);
color:var(--ink);border-color:var(--soft)}
.bar button[aria-pressed=false]{color:var(--soft);text-decoration:line-through;border-style:dashed}
:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
.key{width:14px;height:14px;border-radius:3px;border:1px solid var(--line)}
.key.r1{background:var(--t1);border-color:var(--t1l)}.key.r2{background:var(--t2);border-bottom:3px solid var(--t2l)}
.key.r3{background:var(--t3);border-bottom:3px double var(--t3l)}.key.r4{border-bottom:2px dotted var(--soft)}
.tokens{font:14px/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin-top:12px}
.run>span{border-radius:3px;padding:2px 0}.run>span:nth-child(even){background:var(--step)}
.r0,.r4,.r5{color:var(--soft)}.r4>span{border-bottom:2px dotted var(--soft)}
.r1>span,.r1>span:nth-child(even){background:var(--t1);box-shadow:inset 0 0 0 1px var(--line)}
.r2>span{background:var(--t2);border-bottom:2px solid var(--t2l);border-radius:0}
.r2>span:nth-child(even){background:var(--t2b)}
.r3>span,.r3>span:nth-child(even){background:var(--t3);border-bottom:4px double var(--t3l);border-radius:0}
.tokens .chip{display:inline-flex;flex-direction:column;gap:4px;align-items:flex-start;vertical-align:bottom;margin:4px 2px;
padding:6px;
border-radius:6px;background:var(--t1);max-width:100%;line-height:1.4}
.chip img{max-width:100%;max-height:70vh;height:auto;width:auto;object-fit:contain;border-radius:3px;background:#fff}
.chip small,figure figcaption{font:12px/1.4 system-ui,sans-serif;color:var(--soft);white-space:normal}
.run>span:hover,.run>.now{outline:2px solid var(--ink);outline-offset:0}
.off0 .r0>span,.off1 .r1>span,.off2 .r2>span,.off3 .r3>span,.off4 .r4>span{display:none}
.off0 .run.r0::before,.off1 .run.r1::before,.off2 .run.r2::before,.off3 .run.r3::before,.off4 .run.r4::before{content:attr(data-more);
font:12px system-ui,sans-serif;background:var(--off);color:var(--soft);border-radius:999px;padding:1px 8px;margin:0 2px;
white-space:nowrap}
h2 small{font-weight:400;margin-left:8px}h2 a{color:inherit;text-decoration:none}.failed{border-color:var(--bad)}
.failed h2,.failed pre,td.said.bad{color:var(--bad)}.dropped{border-style:dashed}.failed pre,.dropped pre{max-height:none}
.turns{margin:10px 0 0;padding:0;list-style:none;font-size:13px;color:var(--soft)}.turns .said{color:var(--ink)}
.pictures.apart{display:flex;flex-wrap:wrap;gap:12px;margin-top:12px}figure{margin:0}
.pictures.apart img{width:auto;max-width:100%}
#status{position:sticky;bottom:0;z-index:2;margin-top:20px;min-height:40px;padding:9px 14px;background:var(--card);
border:1px solid var(--line);border-radius:10px 10px 0 0;font-size:13px;box-shadow:0 -4px 16px #0000001f;
overflow-wrap:anywhere}#status b{font-weight:650}
.counts th,.counts td{padding:4px 9px}.counts thead th{white-space:normal;vertical-align:bottom}
.counts .said{text-align:left;white-space:normal;min-width:150px}.counts th a{color:inherit}
.counts tfoot>tr>*{font-weight:650;border-top:1px solid var(--line)}section{scroll-margin-top:64px}
@media print{.bar,#status{position:static}}
"""

INSPECT_SCRIPT = """
const status=document.getElementById("status"),idle=status.textContent;let now=null;
const show=token=>{if(now)now.classList.remove("now");now=token;status.textContent=idle;
  if(token){token.classList.add("now");status.textContent=token.title.replaceAll("\\n"," · ")}};
document.querySelectorAll(".bar button").forEach(button=>button.addEventListener("click",()=>{
  const off=button.getAttribute("aria-pressed")==="true";button.setAttribute("aria-pressed",!off);
  document.body.classList.toggle("off"+button.dataset.reason,off)}));
document.querySelectorAll(".tokens").forEach(box=>{
  const all=[...box.querySelectorAll(".run>span")];
  box.addEventListener("mouseover",event=>{const t=event.target.closest(".run>span");if(t)show(t)});
  box.addEventListener("mouseleave",()=>show(null));box.addEventListener("blur",()=>show(null));
  box.addEventListener("keydown",event=>{
    const step={ArrowRight:1,ArrowLeft:-1}[event.key];
    const seen=all.filter(t=>t.offsetParent!==null||t.getClientRects().length);
    if(event.key==="Home"||event.key==="End"){show(seen.at(event.key==="Home"?0:-1))}
    else if(step){const at=seen.indexOf(now);
      show(seen[at<0?(step>0?0:seen.length-1):Math.min(seen.length-1,Math.max(0,at+step))])}
    else return;
    event.preventDefault();if(now)now.scrollIntoView({block:"nearest"})})});
"""


def render_page(rows: Sequence[Inspected], config: TrainConfig, collator: ChatCollator, *, start: int = 0) -> str:
    """The whole page. Every text from data, models or cards is escaped."""
    title = _text(f"{Path(config.recipe).name}: what {config.model} sees")
    sections = [_header(rows, config, start), _counts(rows, start), _bar(rows)]
    sections += [_row(row, start + k, collator) for k, row in enumerate(rows)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{INSPECT_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n<div id=status role=status>Point at a token, or focus a sample and use ← → Home End.</div>"
        + f"</main><script>{INSPECT_SCRIPT}</script></body></html>\n"
    )


def _text(value: Any) -> str:
    """Any text as HTML, also within quotes; control characters by their number."""
    return escape(visible(str(value)), quote=True)


def _header(rows: Sequence[Inspected], config: TrainConfig, start: int) -> str:
    failed, dropped = sum(bool(row.failed) for row in rows), sum(bool(row.dropped) for row in rows)
    span = f"{start} to {start + len(rows) - 1}" if len(rows) > 1 else str(start)
    facts = [
        ("Recipe", config.recipe),
        ("Model", config.model),
        ("Data", config.data),
        ("Rows", span),
        ("Cannot be trained on", failed or None),
        ("Dropped", dropped or None),
        ("Longest sample", f"{config.max_length:,} tokens"),
        ("Image area", _area(config)),
    ]
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts if v is not None)
    return (
        f"<header><h1>{_text(Path(config.recipe).name)} <span>as the model sees it</span></h1>"
        "<p>Every token the model is given, by the reason why it is or is not trained.</p>"
        f"<dl class=facts>{items}</dl></header>"
    )


def _area(config: TrainConfig) -> str | None:
    low, high = config.min_pixels, config.max_pixels
    return f"{low or 'default'} to {high or 'default'} pixels" if low or high else None


def _used(rows: Sequence[Inspected]) -> list[str]:
    """The reasons that occur, in order."""
    found = {view.reason for row in rows for view in row.explained or []}
    return [reason for reason in REASONS if reason in found]


def _counts(rows: Sequence[Inspected], start: int) -> str:
    columns = ["tokens", *_used(rows), "targets"]
    counts = [
        {"tokens": len(row.explained), **row.explained.counts} if row.explained is not None else None for row in rows
    ]
    noted = any(row.explained is None or row.explained.notes for row in rows)
    head = "".join(f"<th scope=col>{_text(column)}</th>" for column in [*columns, "share trained"])
    head += "<th scope=col class=said>notes</th>" if noted else ""
    body = "".join(
        _count_row(row, start + k, columns, found, noted)
        for k, (row, found) in enumerate(zip(rows, counts, strict=True))
    )
    totals = {column: sum(found.get(column, 0) for found in counts if found) for column in columns}
    cells = "".join(f"<td>{totals[column]:,}</td>" for column in columns)
    foot = f"<tfoot><tr><th scope=row>all shown</th>{cells}<td>{_share(totals)}</td>{'<td></td>' * noted}</tr></tfoot>"
    return (
        "<section><h2>Tokens</h2><div class=scroll style='margin-top:0'><table class=counts><thead><tr>"
        f"<th scope=col>sample</th>{head}</tr></thead><tbody>{body}</tbody>"
        f"{foot if len(rows) > 1 and any(counts) else ''}</table></div></section>"
    )


def _count_row(row: Inspected, k: int, columns: Sequence[str], found: dict[str, int] | None, noted: bool) -> str:
    name = f"<th scope=row><a href='#row{k}'>{_text(row.name)}</a></th>"
    if row.explained is None or found is None:
        what, tone = ("✗ cannot be trained on", "bad") if row.failed else ("dropped", "flat")
        return f"<tr>{name}{'<td>–</td>' * (len(columns) + 1)}<td class='said {tone}'>{what}</td></tr>"
    cells = "".join(f"<td>{found.get(column, 0):,}</td>" for column in columns)
    notes = f"<td class=said>{_text('; '.join(row.explained.notes))}</td>" if noted else ""
    return f"<tr>{name}{cells}<td>{_share(found)}</td>{notes}</tr>"


def _share(counts: dict[str, int]) -> str:
    return f"{counts['targets'] / max(1, counts['tokens']):.1%}"


def _bar(rows: Sequence[Inspected]) -> str:
    """The legend: a button a reason, which hides or shows its tokens."""
    buttons = "".join(
        f"<button aria-pressed=true data-reason={REASONS.index(reason)} title='{_text(MEANINGS[reason])}'>"
        f"<i class='key r{REASONS.index(reason)}'></i>{_text(reason)}</button>"
        for reason in _used(rows)
    )
    said = "Underlined tokens are trained. Press a name to hide or show its tokens."
    return f"<div class=bar role=toolbar aria-label='Show or hide tokens'>{buttons}<span>{said}</span></div>"


def _row(row: Inspected, k: int, collator: ChatCollator) -> str:
    heading = f"<h2><a href='#row{k}'>{_text(row.name)}</a> <small>row {k}</small></h2>"
    if row.explained is None:
        kind, what = ("failed", "✗ Cannot be trained on") if row.failed else ("dropped", "Dropped")
        reason = escape(visible(row.failed or row.dropped).replace("↵\n", "\n"), quote=True)
        return f"<section id=row{k} class={kind}>{heading}<p>{what}:</p><pre>{reason}</pre></section>"
    runs = "".join(
        _run(list(pieces), row, collator) for _, pieces in groupby(row.pieces, key=lambda piece: piece.reason)
    )
    lines = "".join(f"<li>{_text(line)}</li>" for line in turn_lines(row.explained))
    lines += "".join(f"<li class=said>note: {_text(note)}</li>" for note in row.explained.notes)
    return (
        f"<section id=row{k}>{heading}<div class=tokens tabindex=0 role=group aria-describedby=status "
        f"aria-label='tokens of {_text(row.name)}'>{runs}</div>{_apart(row, collator)}<ul class=turns>{lines}</ul></section>"
    )


def _run(pieces: Sequence[Piece], row: Inspected, collator: ChatCollator) -> str:
    reason, tokens = pieces[0].reason, sum(len(piece.tokens) for piece in pieces)
    inner = "".join(_piece(piece, row, collator) for piece in pieces)
    more = _text(f"{tokens:,} {reason}")
    return f"<span class='run r{REASONS.index(reason)}' data-more='{more}'>{inner}</span>"


def _piece(piece: Piece, row: Inspected, collator: ChatCollator) -> str:
    title, repeats = _title(piece), piece.reason in ("media", "padding") and len(piece.tokens) > 1
    words = _text(piece.text) + (f" ×{len(piece.tokens):,}" if repeats or piece.medium else "")
    if piece.medium is None:
        return f"<span title='{title}'>{words}</span>"
    kind, k = piece.medium
    caption = _text(" · ".join(filter(None, [f"{kind} {k + 1}", piece.size])))
    return (
        f"<span class=chip title='{title}'>{_picture(piece, row, collator)}<span>{words}</span>"
        f"<small>{caption}</small></span>"
    )


def _title(piece: Piece) -> str:
    """What is said of tokens pointed at: text, position, id, reason; a line each."""
    first, last = piece.tokens[0], piece.tokens[-1]
    many = len(piece.tokens) > 1
    ids = list(dict.fromkeys(str(view.id) for view in piece.tokens))
    lines = [
        f"“{visible(piece.text).replace('↵' + chr(10), '↵')}”"
        + (f" ×{len(piece.tokens)}" if many and len(ids) == 1 else ""),
        f"positions {first.position} to {last.position}" if many else f"position {first.position}",
        f"{'ids' if len(ids) > 1 else 'id'} {', '.join(ids)}",
        f"{piece.reason}, {'trained' if first.trained else 'not trained'}",
    ]
    return escape("\n".join(lines), quote=True)


def _apart(row: Inspected, collator: ChatCollator) -> str:
    """The pictures that no chip shows: where a processor cuts them into tiles, no one place stands for a picture."""
    assert row.example is not None and row.explained is not None
    if not row.example.images or any(piece.medium and piece.medium[0] == "image" for piece in row.pieces):
        return ""
    figures = "".join(
        f"<figure><img alt='image {k + 1}' src='{_data_uri(image, None, collator)}'>"
        f"<figcaption>image {k + 1}, as it came</figcaption></figure>"
        for k, image in enumerate(row.example.images)
    )
    return f"<div class='pictures apart'>{figures}</div>"


def _picture(piece: Piece, row: Inspected, collator: ChatCollator) -> str:
    """The picture of a chip, resized as the processor does where it does nothing but resize (Qwen-VL)."""
    if piece.medium is None or piece.medium[0] != "image" or row.example is None or row.explained is None:
        return ""
    k, sizes = piece.medium[1], row.explained.images
    exact = hasattr(collator.processor.image_processor, "merge_size") and k < len(sizes)
    uri = _data_uri(row.example.images[k], sizes[k] if exact else None, collator)
    return f"<img alt='image {k + 1} of {_text(row.name)}' src='{uri}'>"


def _data_uri(image: Any, size: tuple[int, int] | None, collator: ChatCollator) -> str:
    """A PNG as a data: URI, of the given (height, width). An image that cannot be opened again shows as nothing."""
    try:
        opened = open_image(image, access=collator.access)
    except ImageError:
        return ""
    if size is not None:
        opened = opened.resize((size[1], size[0]), resample=3)  # bicubic
    opened.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    opened.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
