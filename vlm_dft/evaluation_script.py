"""Script and style of the evaluation's page: the JSON blocks of evaluation_samples in, the browsable list of samples out.

Every text is set as text, never as markup. The state is in the address after #, so that a view can be sent to others.
"""

STYLE = """
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.runs th,.runs td{text-align:left;vertical-align:top}.runs td{overflow-wrap:normal;min-width:5em}.runs td:last-child{min-width:12em}
.scroll th:first-child{position:sticky;left:0;background:var(--card)}header .scroll th:first-child{background:var(--bg)}
.extra th:first-child{white-space:normal;font-weight:400}.extra tr.name th{font-weight:600}
.scroll td,.scroll th{padding:4px 9px}.scroll .left{text-align:left}
th.plot{text-align:center}
.overview td,.overview th{padding:5px 10px}td small,th small{display:block;font-weight:400;color:var(--soft);font-size:12px}
tr.name>*{padding-top:14px;text-align:left;color:var(--soft);font-size:12.5px;font-weight:600;border-top:1px solid var(--line)}
td.left,th.left{text-align:left}td.plot{padding:0 4px;width:170px;min-width:170px}svg.interval{display:block;width:170px;height:22px}
svg .zero{stroke:var(--soft);stroke-dasharray:2 2}svg .span{stroke-width:2;fill:none}svg .span.up,svg .mid.up{stroke:var(--good)}
svg .span.down,svg .mid.down{stroke:var(--bad)}svg .span.flat,svg .mid.flat{stroke:var(--soft)}
svg .mid.up{fill:var(--good)}svg .mid.down{fill:var(--bad)}svg .mid.flat{fill:var(--soft)}
.sure{color:inherit}section>details{margin-top:14px}details[open]>summary{margin-bottom:6px}h3 .soft,h2 .soft{font-weight:400;color:var(--soft)}
.notes{margin:0 0 14px;padding-left:18px;font-size:13px;color:var(--soft)}
.said{margin:4px 0 0;padding-left:18px;font-size:14px}
.tools{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(200px,100%),1fr));gap:10px 14px;margin:12px 0}
.tools label{display:flex;flex-direction:column;gap:3px;font-size:12px;color:var(--soft);min-width:0}
select,input{font:inherit;font-size:14px;color:var(--ink);background:var(--bg);border:1px solid var(--line);border-radius:7px;
padding:6px 9px;width:100%;min-width:0}
.chips{display:flex;flex-wrap:wrap;gap:7px;margin:4px 0 12px}.chips b{font-weight:600;font-variant-numeric:tabular-nums;margin-left:5px}
.chips button[aria-pressed=false] b{color:var(--soft)}
.pager{display:flex;flex-wrap:wrap;align-items:center;gap:8px 12px;font-size:13px;color:var(--soft);margin:10px 0;justify-content:space-between}
.pager span{font-variant-numeric:tabular-nums}.pager div{display:flex;gap:8px}button:disabled{opacity:.4;cursor:default}
kbd{font:11.5px ui-monospace,monospace;border:1px solid var(--line);border-radius:4px;padding:0 5px}
:is(button,select,input,summary,pre,article,a):focus-visible{outline:2px solid var(--c1);outline-offset:2px}
#list article{display:block;padding:16px 18px;margin-bottom:14px;scroll-margin-top:12px}
#list article[aria-current=true]{border-color:var(--c1);box-shadow:0 0 0 1px var(--c1)}
.asked .question{font-weight:500}
.asked{display:flex;gap:20px;margin-top:10px}.asked .pictures{flex:0 1 auto;max-width:46%;
display:flex;flex-wrap:wrap;gap:8px;align-content:flex-start}
.asked .pictures img{width:auto;max-width:100%;height:auto;max-height:420px;object-fit:contain}
.gone{border:1px dashed var(--line);border-radius:6px;padding:14px;font-size:12.5px;color:var(--soft)}
.choices{list-style:none;margin:8px 0;padding:0}.choices li{padding:1px 0;overflow-wrap:anywhere}.choices li.gold{color:var(--good);font-weight:600}
.gold-answer{margin:8px 0 0;overflow-wrap:anywhere}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(290px,100%),1fr));gap:14px 22px;margin-top:14px}
.answers .response{margin:0;min-width:0}.who{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:baseline}
.who .draws{margin-left:auto;display:flex;gap:6px;align-items:center;font-size:12.5px;color:var(--soft)}.draws button{padding:0 9px}
.response pre{max-height:300px;padding:8px 10px;background:var(--bg);border-radius:6px;margin:6px 0}.response pre.all{max-height:70vh}
.response.none{border-color:var(--line);color:var(--soft)}
.verdicts{display:grid;grid-template-columns:auto auto 1fr;gap:1px 10px;font-size:13px;margin-top:6px}.verdicts>*{min-width:0;overflow-wrap:anywhere}
.verdicts .rule{color:var(--soft)}.ok{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}.more{font-size:12.5px;padding:2px 10px}
.pair{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:flex-start}.pair>.figures{flex:1 1 390px;max-width:430px;min-width:0}
.pair>.scroll{flex:1 1 550px;margin-top:0;min-width:0}.pair td,.pair th{padding:4px 6px}
mark{font-size:12.5px;background:var(--middle);color:inherit;border-radius:3px;padding:0 4px}
@media(max-width:620px){main{padding:20px 10px 48px}section{padding:16px 12px}
.asked{flex-direction:column;gap:12px}.asked .pictures{flex:none;max-width:100%}
#list article{padding:12px}.keys{display:none}th,td{padding:4px 8px}tr.part th{padding-left:14px}}
@media print{.tools,.chips,.pager,.keys{display:none}}
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {runs, samples} = data, SIZE = 10, HEAD = 700, TAIL = 500;
const $ = id => document.getElementById(id);
const make = (tag, attributes, ...children) => {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {}))
    if (value !== null && value !== false) found.setAttribute(name, value === true ? "" : value);
  found.append(...children.filter(child => child !== null && child !== ""));
  return found;
};
const number = n => n.toLocaleString("en");

// What is asked of the samples. right: more than half of a run's draws are.
const draws = (s, r) => s.answers[r] || [];
const verdict = (draw, rule) => draw[rule] || draw.official;
const right = (s, r, rule) => {
  const found = draws(s, r);
  return found.length ? 2 * found.reduce((n, d) => n + verdict(d, rule)[0], 0) > found.length : null;
};
const some = (s, test) => s.answers.some(found => (found || []).some(test));
const each = runs.map((_, r) => r);
const KINDS = [["all", "all", () => true]];
for (const a of each) for (const b of each) if (a !== b)
  KINDS.push([`${a}-${b}`, `${runs[a]} right, ${runs[b]} wrong`,
    (s, rule) => right(s, a, rule) === true && right(s, b, rule) === false]);
KINDS.push(
  ["right", runs.length > 1 ? "all right" : "right", (s, rule) => each.every(r => right(s, r, rule) !== false)],
  ["wrong", runs.length > 1 ? "all wrong" : "wrong", (s, rule) => each.every(r => right(s, r, rule) !== true)],
  ["abstained", "abstained", (s, rule) => some(s, d => verdict(d, rule)[1] === null)],
  ["differ", "official ≠ robust", s => some(s, d => d.robust && d.robust[0] !== d.official[0])],
  ["cut", "cut at the limit", s => some(s, d => d.cut)],
  ["judge", "decided by a judge", s => some(s, d => d.judge)]);
const rare = new Set(["cut", "judge"]);
const shownKinds = KINDS.filter(([key, , test]) => !rare.has(key) || samples.some(s => test(s, "official")));

// State, and the address that holds it.
const START = {show: "all", rule: "official", split: "", group: "", q: "", at: 0};
let state = {...START}, base = [], list = [];
const read = () => {
  const words = new URLSearchParams(location.hash.slice(1));
  state = {...START};
  for (const key of Object.keys(START)) if (words.has(key)) state[key] = words.get(key);
  state.at = Math.max(0, (parseInt(state.at, 10) || 1) - 1);
  if (!shownKinds.some(([key]) => key === state.show)) state.show = "all";
  if (state.rule !== "robust") state.rule = "official";
};
const write = () => {
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== START[key]) words.set(key, key === "at" ? value + 1 : value);
  const text = words.toString();
  if (text === location.hash.slice(1)) return;
  try { history.replaceState(null, "", "#" + text); } catch { /* Safari allows so many a second; the list does not need it */ }
};

const where = s => s.benchmark + " / " + s.split;
const found = (s, query) => [s.id, s.question || "", s.gold, ...s.choices].some(text => query.test(text))
  || some(s, d => query.test(d.response || "") || (d.official[1] !== null && query.test(d.official[1])));
const select = () => {
  const query = state.q && new RegExp(state.q.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu");
  const cut = state.group.indexOf("="), group = state.group.slice(0, cut), value = state.group.slice(cut + 1);
  base = samples.filter(s => (!state.split || where(s) === state.split)
    && (!state.group || (s.groups[group] || []).includes(value)) && (!query || found(s, query)));
};

// Pictures: a block of them is parsed when one of them is first shown.
const blocks = new Map();
const picture = k => {
  const name = Math.floor(k / data.block);
  if (!blocks.has(name)) blocks.set(name, JSON.parse($("pictures-" + name).textContent));
  return blocks.get(name)[k % data.block];
};

const pre = draw => {
  const text = draw.response, box = make("pre", {tabindex: 0, "aria-label": "response"}), parts = [box];
  if (text === null) box.textContent = "(the response was not given to the report)";
  else if (!text) box.textContent = "(empty)";
  else if (text.length <= 1.2 * (HEAD + TAIL)) box.textContent = text;
  else {
    const button = make("button", {class: "more", "aria-expanded": "false"});
    const set = open => {
      const between = `\n\n⋯ ${number(text.length - HEAD - TAIL)} characters ⋯\n\n`;  // answers stand at the end
      box.textContent = open ? text : text.slice(0, HEAD) + between + text.slice(-TAIL);
      box.classList.toggle("all", open);
      button.textContent = open ? "show less" : `show all ${number(text.length)} characters`;
      button.setAttribute("aria-expanded", open);
    };
    set(false);
    button.addEventListener("click", () => set(button.getAttribute("aria-expanded") !== "true"));
    parts.push(button);
  }
  if (draw.length) parts.push(make("small", {}, ` shortened from ${number(draw.length)} characters`));
  return parts;
};
const because = (score, gold) => score[1] === null ? (score[0] ? "no answer found; the rule chose one" : "no answer found")
  : `${score[0] ? "taken as equal to" : "not taken as equal to"} the gold answer ${gold === "" ? "(empty)" : gold}`;
const judged = draw => draw.judge ? ` · judged by ${draw.judge}` : "";
const verdicts = (draw, gold) => {
  const table = make("div", {class: "verdicts"});
  for (const rule of ["official", "robust"]) if (draw[rule]) {
    const [ok, extracted, name] = draw[rule];
    const said = make("span", {}, extracted === null ? "abstained" : make("b", {}, extracted === "" ? "(empty)" : extracted), " ",
      make("span", {class: "rule"}, `${because(draw[rule], gold)} · rule: ${name}${rule === "official" ? judged(draw) : ""}`));
    table.append(make("span", {class: "rule"}, rule), make("span", {class: ok ? "ok" : "no"}, ok ? "✓ right" : "✗ wrong"), said);
  }
  return table;
};
const colour = r => document.querySelector(`#colours i:nth-child(${r + 1})`).className;
const answer = (s, r) => {
  const found = draws(s, r), name = [make("i", {class: colour(r)}), make("b", {}, runs[r])];
  if (!found.length) return make("div", {class: "response none"}, make("div", {class: "who"}, ...name, "has no response to this sample"));
  const box = make("div", {});
  let k = 0;
  const show = () => {
    const draw = found[k], ok = verdict(draw, state.rule)[0], head = make("div", {class: "who"}, ...name);
    head.append(make("span", {class: "mark"}, ok ? "✓ right" : "✗ wrong"));
    if (draw.robust && draw.robust[0] !== draw.official[0]) head.append(make("mark", {}, "official ≠ robust"));
    if (draw.cut) head.append(make("mark", {}, "cut at the token limit"));
    if (typeof draw.tokens === "number") head.append(make("small", {}, `${number(draw.tokens)} tokens`));
    if (found.length > 1) {
      const won = found.reduce((n, d) => n + verdict(d, state.rule)[0], 0);
      const step = by => { k = (k + by + found.length) % found.length; show(); box.querySelector(by < 0 ? ".back" : ".on").focus(); };
      const back = make("button", {class: "back", "aria-label": "previous draw"}, "‹");
      const on = make("button", {class: "on", "aria-label": "next draw"}, "›");
      back.addEventListener("click", () => step(-1));
      on.addEventListener("click", () => step(1));
      head.append(make("span", {class: "draws"}, `${won} of ${found.length} draws right`, back, `${k + 1}`, on));
    }
    box.className = "response " + (ok ? "right" : "wrong");
    box.replaceChildren(head, verdicts(draw, s.gold), ...pre(draw));
  };
  show();
  return box;
};
const letter = k => String.fromCharCode(65 + k);
const isGold = (choice, k, gold) => [choice, letter(k), `(${letter(k)})`].includes(gold);
const named = (choice, k) => choice === letter(k) || /^\s*\(?[A-Z][.):]/.test(choice);
const choiceText = (choice, k) => named(choice, k) ? choice : `${letter(k)}. ${choice}`;
const card = (s, place) => {
  const tags = make("div", {class: "tags"}, make("span", {}, where(s)));
  for (const [name, values] of Object.entries(s.groups)) for (const value of values)
    tags.append(make("span", {title: name}, value.length < 4 ? `${name} ${value}` : value));
  tags.append(make("code", {}, s.id));
  const words = make("div", {class: "words"});
  words.append(make("p", {class: "question"}, s.question === null ? "(the question is not known here)" : s.question));
  if (s.choices.length) words.append(make("ul", {class: "choices", "aria-label": "choices"},
    ...s.choices.map((choice, k) => make("li", {class: isGold(choice, k, s.gold) && "gold"}, choiceText(choice, k)))));
  words.append(make("p", {class: "gold-answer"}, "gold answer ", make("b", {}, s.gold === "" ? "(empty)" : s.gold)));
  const pictures = s.pictures.map((p, k) => p < 0 ? make("div", {class: "gone"}, "picture left out or unreadable")
    : make("img", {alt: `picture ${k + 1} of ${s.id}`, src: picture(p)}));
  const asked = make("div", {class: "asked"}, pictures.length ? make("div", {class: "pictures"}, ...pictures) : null, words);
  const box = make("article", {tabindex: -1, "aria-label": `sample ${s.id}, ${number(place + 1)} of ${number(list.length)}`,
    "aria-current": String(place === state.at)}, tags, asked, make("div", {class: "answers"}, ...each.map(r => answer(s, r))));
  box.addEventListener("focusin", () => { if (state.at !== place) { state.at = place; mark(); write(); } });
  box.dataset.place = place;
  return box;
};
const mark = () => { for (const box of $("list").children) box.setAttribute("aria-current", +box.dataset.place === state.at); };

const draw = () => {
  const test = shownKinds.find(([key]) => key === state.show)[2];
  list = base.filter(s => test(s, state.rule));
  state.at = Math.min(state.at, Math.max(0, list.length - 1));
  const page = Math.floor(state.at / SIZE), pages = Math.max(1, Math.ceil(list.length / SIZE)), from = page * SIZE;
  for (const button of $("chips").children) {
    button.setAttribute("aria-pressed", button.dataset.key === state.show);
    const kind = shownKinds.find(([key]) => key === button.dataset.key);
    button.lastChild.textContent = number(base.reduce((n, s) => n + kind[2](s, state.rule), 0));
  }
  $("list").replaceChildren(...list.slice(from, from + SIZE).map((s, k) => card(s, from + k)));
  $("none").hidden = list.length > 0;
  const said = list.length ? `${number(from + 1)}–${number(Math.min(from + SIZE, list.length))} of ${number(list.length)} samples` : "0 samples";
  $("said").textContent = `${said}, page ${number(page + 1)} of ${number(pages)}`;
  for (const pager of document.querySelectorAll(".pager")) {
    pager.querySelector("span").textContent = said;
    pager.querySelector(".back").disabled = page === 0;
    pager.querySelector(".on").disabled = page >= pages - 1;
  }
  write();
};
const turn = by => {
  const page = Math.floor(state.at / SIZE) + by;
  if (page < 0 || page * SIZE >= list.length) return;
  state.at = page * SIZE;
  draw();
  $("samples").scrollIntoView({block: "start"});
};
const go = by => {
  const on = document.activeElement && document.activeElement.closest("article");
  const next = on ? state.at + by : state.at;
  if (next < 0 || next >= list.length) return;
  const same = Math.floor(next / SIZE) === Math.floor(state.at / SIZE);
  state.at = next;
  if (same) { mark(); write(); } else draw();
  const box = $("list").querySelector(`[data-place="${next}"]`);
  box.focus({preventScroll: true});
  box.scrollIntoView({block: "start"});
};

const tally = values => { const n = new Map(); for (const v of values) n.set(v, (n.get(v) || 0) + 1); return n; };
const splitOptions = () => {
  const splits = tally(samples.map(where));
  $("split").replaceChildren(make("option", {value: ""}, "all"),
    ...[...splits].map(([name, n]) => make("option", {value: name}, `${name} (${number(n)})`)));
};
const groupOptions = () => {
  const groups = new Map();
  for (const s of samples) if (!state.split || where(s) === state.split)
    for (const [name, values] of Object.entries(s.groups)) for (const value of values) {
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(value);
    }
  $("group").replaceChildren(make("option", {value: ""}, "all"), ...[...groups].map(([name, values]) => make("optgroup", {label: name},
    ...[...tally(values)].sort((a, b) => a[0].localeCompare(b[0], "en", {numeric: true}))
      .map(([value, n]) => make("option", {value: `${name}=${value}`}, `${value} (${number(n)})`)))));
};
let waiting = 0;
const show = () => {
  clearTimeout(waiting);
  groupOptions();
  for (const key of ["split", "group", "rule"]) {
    $(key).value = state[key];
    if ($(key).value !== state[key]) { state[key] = START[key]; $(key).value = START[key]; }
  }
  if ($("q").value !== state.q) $("q").value = state.q;
  select();
  draw();
};
const set = change => { Object.assign(state, {at: 0}, change); show(); };

splitOptions();
for (const [key, label] of shownKinds) {
  const button = make("button", {"data-key": key, "aria-pressed": "false"}, label, make("b", {}));
  button.addEventListener("click", () => set({show: key}));
  $("chips").append(button);
}
for (const key of ["split", "group", "rule"]) $(key).addEventListener("change", () => set({[key]: $(key).value}));
$("q").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => set({q: $("q").value}), 150); });
for (const button of document.querySelectorAll(".pager button"))
  button.addEventListener("click", () => turn(button.classList.contains("on") ? 1 : -1));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input,select,textarea")) return;
  const keys = {j: () => go(1), k: () => go(-1), ArrowRight: () => turn(1), ArrowLeft: () => turn(-1), "/": () => $("q").focus()};
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
addEventListener("hashchange", () => { read(); show(); });
read();
show();
performance.mark("drawn");
"""
