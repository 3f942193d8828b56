"""Report style: the CSS and the few lines of script of the report page, in light and dark."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1d21;--soft:#62656e;--line:#e3e4e8;--c0:#9a9da6;
--c1:#2f6fde;
--c2:#d9742b;--c3:#2d9d78;--c4:#9b5fc0;--c5:#c2455e;--good:#17803d;--bad:#c0312b;--weak:#f3c7bf;--middle:#f1e3b8;
--strong:#c4e4cc}
@media(prefers-color-scheme:dark){:root{--bg:#15161a;--card:#1d1f25;--ink:#e8e9ed;--soft:#9fa3ae;--line:#33363f;
--c0:#7d818c;
--c1:#6ea0f7;--c2:#eb9a5a;--c3:#58c29f;--c4:#bd8fdc;--c5:#e57a8e;--good:#5cc583;--bad:#f07f76;--weak:#5b322d;
--middle:#524722;--strong:#28492f}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0 0 4px}
h1 span{color:var(--soft);font-weight:400}
h2{font-size:18px;margin:0 0 12px}header p{margin:0 0 16px;color:var(--soft)}a{color:var(--c1)}
section{margin-top:28px;padding:20px 22px;background:var(--card);border:1px solid var(--line);border-radius:10px}
.facts{display:flex;flex-wrap:wrap;gap:10px 28px;margin:0}.facts dt{font-size:12px;color:var(--soft)}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.note{font-size:13px;color:var(--soft);margin:10px 0 0}.verdict{font-size:16px;font-weight:600;margin:8px 0}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);margin-bottom:8px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.dot.c0{background:var(--c0)}.dot.c1{background:var(--c1)}.dot.c2{background:var(--c2)}.dot.c3{background:var(--c3)}
.dot.c4{background:var(--c4)}.dot.c5{background:var(--c5)}
.figures{display:flex;flex-wrap:wrap;gap:18px 24px}.figures svg{flex:1 1 420px;max-width:500px;min-width:0;
height:auto}
.figures svg.curve{flex:1 1 280px;max-width:330px}svg.gauge{width:100%;max-width:640px;height:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .tick{font-size:10.5px;fill:var(--soft)}
svg .title{font-weight:600;font-size:13px}
svg .strong{font-weight:700}svg .grid{stroke:var(--line)}svg .whisker{stroke:var(--ink);stroke-width:1.2;fill:none}
svg .c0{fill:var(--c0)}svg .c1{fill:var(--c1)}svg .c2{fill:var(--c2)}svg .c3{fill:var(--c3)}svg .c4{fill:var(--c4)}
svg .c5{fill:var(--c5)}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .line.c1{stroke:var(--c1)}
svg .line.c2{stroke:var(--c2)}
svg .line.c3{stroke:var(--c3)}svg .line.c4{stroke:var(--c4)}svg .line.c5{stroke:var(--c5)}
svg .zone.weak{fill:var(--weak)}svg .zone.middle{fill:var(--middle)}svg .zone.strong{fill:var(--strong)}
svg .zonetext{font-size:11px}
svg .needle{stroke:var(--ink);fill:var(--ink);stroke-width:2}
.alarm{font-size:14px;border-left:3px solid var(--bad);padding-left:10px;margin:6px 0}
.scroll{overflow-x:auto;margin-top:16px}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:14px}
.scroll table{width:100%}th,td{padding:4px 12px;text-align:right;white-space:nowrap}th:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
tr.whole>*{font-weight:650;border-top:1px solid var(--line)}tr.part th{font-weight:400;padding-left:28px}
td.up{color:var(--good)}td.down{color:var(--bad)}td.flat{color:var(--soft)}
.plain td{text-align:left;white-space:normal;overflow-wrap:anywhere}.plain th{font-weight:500;color:var(--soft)}
.watch td,.watch th{text-align:left;white-space:normal;vertical-align:top;overflow-wrap:anywhere}.watch img{width:110px;height:auto;
border-radius:4px;background:#fff;display:block}.watch small{color:var(--soft)}h3{font-size:15px;margin:16px 0 0}
summary{cursor:pointer}
.filter{display:flex;flex-wrap:wrap;gap:8px;margin:12px 0 16px}button{font:inherit;font-size:13px;padding:4px 12px;
border-radius:999px;border:1px solid var(--line);background:none;color:inherit;cursor:pointer}
button[aria-pressed=true]{background:var(--ink);color:var(--bg);border-color:var(--ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:16px}
article{display:flex;gap:16px;border:1px solid var(--line);border-radius:8px;padding:14px;min-width:0}
article[hidden]{display:none}
.pictures{flex:0 0 38%}.pictures img{width:100%;height:auto;border-radius:4px;background:#fff}
.pictures:empty{display:none}.words{flex:1;min-width:0}
.words p{margin:4px 0}.question{font-weight:600;white-space:pre-line;overflow-wrap:anywhere}
.tags{display:flex;flex-wrap:wrap;gap:6px;font-size:12px;color:var(--soft)}.tags span{border:1px solid var(--line);
border-radius:4px;padding:0 6px}.tags code{overflow-wrap:anywhere}
.response{margin-top:10px;padding-left:10px;border-left:3px solid var(--line)}
.response.right{border-color:var(--good)}.response.wrong{border-color:var(--bad)}
.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}pre{margin:2px 0;font:13px/1.45 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:220px;overflow:auto}
small{color:var(--soft)}@media(max-width:560px){article{flex-direction:column}.pictures{flex:none;max-width:260px}}
"""

SCRIPT = """
const has=(list,name)=>!name||list.split(" ").includes(name);
const buttons=document.querySelectorAll(".filter button");
buttons.forEach(button=>button.addEventListener("click",()=>{
  buttons.forEach(other=>other.setAttribute("aria-pressed",other===button));
  let shown=0;
  document.querySelectorAll("article").forEach(card=>{
    card.hidden=!(has(card.dataset.right,button.dataset.right)&&has(card.dataset.wrong,button.dataset.wrong));
    shown+=!card.hidden;
  });
  document.querySelector(".empty").hidden=shown>0;
}));
"""
