// The live page: asks its server every two seconds what runs there are and fetches those whose files have changed. Cards
// stay where they are and only what is in them is drawn anew. What is chosen stands in the address, so that a reload or
// a bookmark shows the same. live_chart.js stands before this in the page's script.

const $ = (id) => document.getElementById(id);
const PANELS = JSON.parse($("panels").textContent);
const TITLES = JSON.parse($("titles").textContent);
const EVERY_MS = 2000;
const NAMES = { step: "step", tokens: "tokens", hours: "hours" }; // of the axes
let runs = []; // as the server told them last
const chosen = new Map(); // name of a ticked run -> its colour
const held = new Map(); // name -> {asked: what for, series}
const charts = new Map(); // key of a card -> Chart
const view = { axis: "step", group: "stage", smooth: true, from: null, to: null };
let [laid, asked, busy, fresh] = ["", 0, false, true]; // which cards stand; the newest round; nothing was chosen yet

// The address.

function remember() {
  const words = new URLSearchParams();
  for (const name of chosen.keys()) words.append("run", name);
  for (const [name, value] of Object.entries(view)) if (value != null) words.set(name, value);
  history.replaceState(null, "", "#" + words);
}
function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of words.getAll("run")) choose(name);
  if (NAMES[words.get("axis")]) view.axis = words.get("axis");
  if (words.get("group") === "all") view.group = "all";
  view.smooth = words.get("smooth") !== "false";
  for (const end of ["from", "to"]) {
    const value = Number(words.get(end) ?? NaN);
    view[end] = words.get(end) && Number.isFinite(value) ? value : null;
  }
  fresh = !words.has("run");
}
function choose(name) {
  const taken = new Set(chosen.values());
  let colour = 0;
  while (taken.has(colour)) colour++;
  chosen.set(name, colour);
}

// The list of runs.

function drawRuns() {
  const box = $("runs");
  for (const run of runs) {
    let label = box.querySelector(`label[data-run="${CSS.escape(run.name)}"]`);
    if (!label) {
      const tick = h("input", { type: "checkbox" });
      tick.addEventListener("change", () => {
        tick.checked ? choose(run.name) : chosen.delete(run.name);
        [view.from, view.to, fresh] = [null, null, false];
        round();
      });
      label = h("label", { "data-run": run.name }, tick, h("span", { class: "mark" }), h("span", { class: "name" }), h("small", {}));
      const after = [...box.querySelectorAll("label")].find((other) => other.dataset.run > run.name);
      after ? after.before(label) : box.append(label);
    }
    label.firstChild.checked = chosen.has(run.name);
    const line = { colour: chosen.get(run.name), dashed: chosen.get(run.name) >= COLOURS };
    label.querySelector(".mark").replaceChildren(...(chosen.has(run.name) ? [swatch(line)] : []));
    label.querySelector(".name").textContent = run.shown;
    const of = run.stage === "evaluate" ? "" : run.steps ? `${run.step} of ${run.steps}` : `step ${run.step}`;
    label.querySelector("small").textContent = [TITLES[run.stage] ?? "unknown stage", of, run.state].filter(Boolean).join(" · ");
    label.classList.toggle("trouble", run.state === "failed" || run.alerts.length > 0);
  }
  for (const label of box.querySelectorAll("label")) {
    if (!runs.some((run) => run.name === label.dataset.run)) label.remove();
  }
}
function drawLinks() {
  const there = runs.filter((run) => chosen.has(run.name));
  const link = (page, of) => page + "?" + of.map((run) => `run=${encodeURIComponent(run.name)}`).join("&");
  const sampled = there.filter((run) => run.samples);
  const links = [there.length ? h("a", { href: link("report", there) }, "Report of these runs") : null,
    sampled.length ? h("a", { href: link("samples", sampled) }, "Samples, token by token") : null].filter(Boolean);
  const same = [...$("links").children].map((node) => node.getAttribute("href")).join() === links.map((node) => node.getAttribute("href")).join();
  if (!same) $("links").replaceChildren(...links);
}

// The charts.

function sections() {
  const there = runs.filter((run) => chosen.has(run.name));
  const stages = Object.keys(PANELS).filter((stage) => there.some((run) => run.stage === stage));
  if (view.group === "stage") {
    return stages.map((stage) => ({ id: stage, title: TITLES[stage], panels: PANELS[stage], runs: there.filter((run) => run.stage === stage) }));
  }
  const panels = new Map();
  for (const stage of stages) for (const panel of PANELS[stage]) panels.set(panel.keys.join(), panel);
  return stages.length ? [{ id: "all", title: "All stages", panels: [...panels.values()], runs: there }] : [];
}
const line = (run, name, colour, key, shade) =>
  ({ name, colour, dashed: colour >= COLOURS, shade, rows: held.get(run.name).rows, ...held.get(run.name).series[key] });

// A panel of these runs -> [{key of the card, title, lines}]: one card of all runs, or, of patterns, one a run.
function cards(section, panel) {
  const having = section.runs.filter((run) => held.has(run.name));
  if (panel.pattern) {
    const pattern = new RegExp(panel.pattern);
    return having.flatMap((run) => {
      const keys = Object.keys(held.get(run.name).series).filter((key) => pattern.test(key)).sort();
      const layers = keys.some((key) => key.includes("/layer_"));
      const part = (key) => key.match(/\/layer_(\d+)\//)?.[1].replace(/^/, "layer ") ?? key.split("/").slice(1, -1).join("/");
      const shade = (i) => (0.3 + (0.7 * (i + 1)) / keys.length).toFixed(2);
      const lines = keys.map((key, i) => layers ? line(run, part(key), chosen.get(run.name), key, shade(i)) : line(run, part(key), i, key));
      const title = section.runs.length > 1 ? `${panel.title}, ${run.shown}` : panel.title;
      return keys.length ? [{ key: `${section.id} ${panel.keys} ${run.name}`, title, lines }] : [];
    });
  }
  const lines = having.flatMap((run) => panel.keys.filter((key) => held.get(run.name).series[key]).map((key, i) => {
    const colour = chosen.get(run.name);
    const several = panel.keys.length > 1 ? key.split("/").at(-1) : "";
    const name = [section.runs.length > 1 || !several ? run.shown : "", several].filter(Boolean).join(" ");
    return { ...line(run, name, colour, key, i ? "0.5" : null) };
  }));
  return lines.length ? [{ key: `${section.id} ${panel.keys}`, title: panel.title, lines }] : [];
}
const on = { zoom: (from, to) => zoom(from, to), whole: () => zoom(null, null) };

function drawCharts() {
  const wanted = sections().map((section) => ({
    ...section,
    cards: section.panels.flatMap((panel) => cards(section, panel).map((card) => ({ ...card, panel }))),
  }));
  const layout = JSON.stringify(wanted.map((section) => [section.id, section.cards.map((card) => [card.key, card.title])]));
  if (layout !== laid) {
    laid = layout;
    const keys = new Set(wanted.flatMap((section) => section.cards.map((card) => card.key)));
    for (const key of [...charts.keys()]) if (!keys.has(key)) charts.delete(key);
    const focused = document.activeElement;
    const parts = wanted.map((section) => {
      const figures = section.cards.map((card) => {
        const known = charts.get(card.key);
        if (known?.panel.title === card.title) return known.element;
        const chart = new Chart({ ...card.panel, title: card.title }, card.panel.keys.join(", "), on);
        charts.set(card.key, chart);
        return chart.element;
      });
      return h("section", {}, h("h2", { id: section.id }, section.title), alarms(section), h("div", { class: "grid-of" }, ...figures));
    });
    const none = h("p", { class: "notes" }, runs.length ? "Tick a run to see it." : "No run has logged a step yet.");
    $("charts").replaceChildren(...(parts.length ? parts : [none]));
    if (focused?.isConnected && focused !== document.body) focused.focus({ preventScroll: true });
  } else {
    for (const section of wanted) $(section.id).nextElementSibling.replaceWith(alarms(section));
  }
  const drawn = { ...view, axis: NAMES[view.axis] };
  for (const section of wanted) for (const card of section.cards) charts.get(card.key).draw(card.lines, drawn);
}
function alarms(section) {
  const said = section.runs.flatMap((run) => [run.error, ...run.alerts.slice(-5)].filter(Boolean).map((text) => `${run.shown}: ${text}`));
  return h("div", { role: said.length ? "alert" : null }, ...said.map((text) => h("p", { class: "alarm" }, text)));
}
function zoom(from, to) {
  [view.from, view.to] = [from, to];
  round();
}

// The rounds of asking.

async function get(address) {
  const answer = await fetch(address, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}
// One round; a newer one, begun because something else was chosen, ends it.
async function round() {
  const mine = ++asked;
  busy = true;
  remember();
  try {
    const told = (await get("api/runs")).runs;
    if (mine !== asked) return;
    runs = told;
    if (fresh && runs.length) {
      const given = runs.filter((run) => run.given);
      const going = runs.filter((run) => run.state === "running");
      const newest = [...runs].sort((a, b) => a.age - b.age).slice(0, 1);
      for (const run of given.length ? given : going.length ? going : newest) choose(run.name);
      fresh = false;
      remember();
    }
    for (const run of runs.filter((run) => chosen.has(run.name))) {
      const wanted = new URLSearchParams({ run: run.name, x: view.axis });
      if (view.from != null) wanted.set("from", view.from);
      if (view.to != null) wanted.set("to", view.to);
      const what = `${run.version} ${wanted}`;
      if (held.get(run.name)?.asked === what) continue;
      const { series, rows, more } = await get("api/series?" + wanted);
      if (mine !== asked) return;
      held.set(run.name, { asked: more ? null : what, series, rows });
    }
    for (const name of [...held.keys()]) if (!chosen.has(name) || !runs.some((run) => run.name === name)) held.delete(name);
    const rows = [...held.values()].reduce((sum, one) => sum + one.rows, 0);
    const going = runs.filter((run) => run.state === "running").length;
    say(`${runs.length} run${runs.length === 1 ? "" : "s"}, ${going} running · ${rows} rows shown`);
    $("whole").disabled = view.from == null && view.to == null;
    drawRuns();
    drawLinks();
    drawCharts();
    busy = false;
    if ([...held.values()].some((one) => one.asked == null)) setTimeout(tick, 50); // a long run, still being read
  } catch (error) {
    if (mine !== asked) return;
    busy = false;
    say(error instanceof TypeError ? "The server does not answer: this is what it said last." : `The server says ${error.message}.`);
  }
}
const tick = () => busy || document.hidden || round();
function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

recall();
$("axis").value = view.axis;
$("group").value = view.group;
$("smooth").checked = view.smooth;
$("axis").addEventListener("change", () => {
  Object.assign(view, { axis: $("axis").value, from: null, to: null });
  round();
});
$("group").addEventListener("change", () => ((view.group = $("group").value), round()));
$("smooth").addEventListener("change", () => ((view.smooth = $("smooth").checked), round()));
$("whole").addEventListener("click", on.whole);
round();
setInterval(tick, EVERY_MS);
document.addEventListener("visibilitychange", tick);
