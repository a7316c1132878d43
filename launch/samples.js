// The sample viewer: a list that is drawn as far as it is looked at, and one sample or one group in full (samples_flow.js
// stands before this in the page's script). Text from a run only ever becomes a text node or an attribute's value.

const $ = (id) => document.getElementById(id);
const { names, rows } = JSON.parse($("data").textContent);
const CHUNK = 60;
const FILTERS = ["run", "domain", "env", "finish_reason"];
let shown = []; // numbers of the rows that pass the filters, in order
let drawn = 0; // of the list's entries
let entries = []; // of the list: arrays of row numbers, one row each or one group each

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

function number(value, digits = 3) {
  if (value == null) return "–";
  const shown = value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toFixed(digits));
  return shown.replace(/^-/, "−");
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const textOf = (row) => (row.per_token ? row.per_token.text : row.flow.map((part) => part.text ?? "")).join("");
const RESULTS = ["result", "read"];
const read = (row) => row.flow.filter((part) => RESULTS.includes(part.kind)).map((part) => part.text);
const place = (row) =>
  row.prompt_index == null ? null : `prompt ${row.prompt_index}, sample ${number(row.sample_index)}`;
const groupKey = (row, n) => (row.prompt_index == null ? `alone ${n}` : `${row.run} ${row.step} ${row.prompt_index}`);
const groups = new Map();
rows.forEach((row, n) => {
  const key = groupKey(row, n);
  if (!groups.has(key)) groups.set(key, []);
  groups.get(key).push(n);
});
const groupOf = (n) => groups.get(groupKey(rows[n], n));

// One sample in full, or its group side by side.

const fact = (name, value) => (value == null || value === "–" ? null : h("span", {}, name + " ", h("b", {}, value)));
const wrong = (name, count) => (count ? h("span", {}, name + " ", h("b", { class: "alarm" }, count)) : null);
const unjudged = (row) => (row.verdict_error ? h("p", { class: "alarm" }, `no verdict: ${row.verdict_error}`) : null);

function facts(row) {
  const masked = row.off_policy_masked ? h("span", {}, h("b", { class: "alarm" }, "masked, eq. 8")) : null;
  return h("p", { class: "facts" },
    fact("reward", number(row.reward)), fact("advantage", row.advantage == null ? null : signed(row.advantage)),
    fact("tokens", number(row.tokens)), fact("ended by", row.finish_reason),
    ...(row.env || row.num_calls ? [fact("turns", row.turns || null), fact("calls", number(row.num_calls))] : []),
    wrong("failed", row.errors), wrong("malformed", row.malformed),
    fact("weights of iteration", row.weight_versions.map((v) => number(v)).join(", ") || null),
    fact("largest |log ratio|", number(row.max_log_ratio)), fact("clipped", number(row.clip_frac)),
    fact("d", number(row.off_policy_kl)), masked);
}

function rewards(row) {
  const parts = [...new Set([...Object.keys(row.reward_terms), ...Object.keys(row.reward_parts)])];
  if (!parts.length) return null;
  const terms = Object.values(row.reward_terms);
  const sum = terms.reduce((a, b) => a + b, 0);
  const rest = row.reward == null || !terms.length || Math.abs(row.reward - sum) < 1e-6 ? null : row.reward - sum;
  const line = (name, part, term) =>
    h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, part), h("td", {}, term));
  const adds = (name) => (Object.hasOwn(row.reward_terms, name) ? signed(row.reward_terms[name]) : "");
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, ["reward", "part", "adds"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {},
      parts.map((name) => line(name, Object.hasOwn(row.reward_parts, name) ? number(row.reward_parts[name]) : "", adds(name))),
      rest == null ? null : line("other", "", signed(rest)),
      line("= reward", "", row.reward == null ? "not graded" : number(row.reward)))));
}

const block = (name, value) => (value ? [h("dt", {}, name), h("dd", {}, h("pre", {}, value))] : []);
const question = (row) =>
  h("dl", {}, block("prompt", row.prompt), block("reference", row.answer), block("rubric", row.rubric));

function heading(row) {
  const run = names.length > 1 ? names[row.run] : null;
  const domain = row.domain && row.env?.startsWith(row.domain + ":") ? null : row.domain; // NAME:LEVEL has it
  return [run, `step ${number(row.step)}`, domain, row.env].filter(Boolean).join(" · ");
}

function groupFacts(members) {
  const first = rows[members[0]];
  return `${members.length} of ${number(first.group_size)} shown, mean reward of all ${number(first.group_reward)}`;
}

function sampleView(n) {
  const row = rows[n];
  const at = shown.indexOf(n);
  const step = (by, name) =>
    at >= 0 && shown[at + by] != null ? h("a", { href: "#" + shown[at + by], rel: by > 0 ? "next" : "prev" }, name) : null;
  const members = groupOf(n);
  const group = members.length > 1 ? h("a", { href: "#group-" + n }, `group: ${groupFacts(members)}`) : null;
  return [
    h("nav", {}, h("a", { href: "#", class: "back" }, "all samples"), step(-1, "← previous"), step(1, "next →"), group),
    h("h2", {}, heading(row)), h("p", { class: "place" }, place(row)), facts(row), unjudged(row), question(row),
    palette([row]), flow(row), rewards(row)];
}

function groupView(n) {
  const members = groupOf(n);
  const row = rows[n];
  return [
    h("nav", {}, h("a", { href: "#", class: "back" }, "all samples")),
    h("h2", {}, heading(row)), h("p", { class: "place" }, `prompt ${number(row.prompt_index)}: ${groupFacts(members)}`),
    question(row), palette(members.map((m) => rows[m])),
    h("div", { class: "beside" }, members.map((m) => h("article", {},
      h("h3", {}, h("a", { href: "#" + m }, `sample ${number(rows[m].sample_index)}`)), facts(rows[m]), unjudged(rows[m]), flow(rows[m]))))];
}

function open() {
  const match = /^#(group-)?(\d+)$/.exec(location.hash);
  const n = match && rows[+match[2]] ? +match[2] : null;
  document.body.classList.toggle("reading", n != null);
  const chosen = n ?? shown[0];
  const view = chosen == null ? [] : match?.[1] || (n == null && $("grouped").checked) ? groupView(chosen) : sampleView(chosen);
  $("detail").replaceChildren(...view.filter((node) => node != null));
  for (const link of $("list").querySelectorAll("a")) mark(link, chosen);
}

// The list.

function mark(link, n) {
  const members = link.dataset.members.split(" ");
  if (members.includes(String(n))) link.setAttribute("aria-current", "true");
  else link.removeAttribute("aria-current");
}

function entry(members) {
  const row = rows[members[0]];
  const grouped = $("grouped").checked;
  const lines = grouped
    ? [h("p", {}, h("b", {}, heading(row)), h("b", { class: "value" }, number(row.group_reward))),
       h("p", {}, h("span", {}, `prompt ${number(row.prompt_index)}`), h("span", {}, groupFacts(members))),
       h("p", { class: "start" }, (row.prompt ?? "").slice(0, 160))]
    : [h("p", {}, h("b", {}, heading(row)), h("b", { class: "value" }, number(row.reward))),
       h("p", {}, row.advantage == null ? null : h("span", {}, "A " + signed(row.advantage)),
         h("span", {}, number(row.tokens) + " tokens"), h("span", {}, row.finish_reason ?? ""),
         row.num_calls ? h("span", {}, row.num_calls === 1 ? "1 call" : `${row.num_calls} calls`) : null,
         row.errors ? h("span", { class: "alarm" }, `${row.errors} failed`) : null,
         row.max_log_ratio == null ? null : h("span", {}, "|log r| " + number(row.max_log_ratio)),
         row.off_policy_kl == null ? null : h("span", {}, "d " + number(row.off_policy_kl)),
         row.off_policy_masked ? h("span", { class: "alarm" }, "masked") : null),
       h("p", { class: "start" }, textOf(row).slice(0, 160))];
  return h("li", {}, h("a", { href: (grouped ? "#group-" : "#") + members[0], "data-members": members.join(" ") }, lines));
}

const more = h("li", { class: "more" });
new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && extend(), { rootMargin: "600px" }).observe(more);

function extend() {
  more.before(...entries.slice(drawn, drawn + CHUNK).map(entry));
  drawn = Math.min(drawn + CHUNK, entries.length);
  if (drawn === entries.length) more.remove();
}

function passes(row, wanted, words) {
  for (const name of FILTERS) if (wanted[name] && String(row[name]) !== wanted[name]) return false;
  for (const name of ["step", "reward"]) {
    const [low, high] = [wanted[name + "_min"], wanted[name + "_max"]];
    if (low !== "" && !(row[name] >= +low && row[name] != null)) return false;
    if (high !== "" && !(row[name] <= +high && row[name] != null)) return false;
  }
  if (!words) return true;
  row.haystack ??= [row.prompt, row.answer, textOf(row), ...read(row)].join("\n").toLowerCase();
  return row.haystack.includes(words);
}

function list() {
  const ids = [...FILTERS, "step_min", "step_max", "reward_min", "reward_max"];
  const wanted = Object.fromEntries(ids.map((id) => [id, $(id)?.value ?? ""]));
  const words = $("search").value.toLowerCase();
  const key = $("sort").value;
  const up = $("order").value === "up" ? 1 : -1;
  shown = [...rows.keys()].filter((n) => passes(rows[n], wanted, words));
  shown.sort((a, b) => {
    const [x, y] = [rows[a][key], rows[b][key]];
    if (x == null || y == null) return (x == null) - (y == null) || a - b; // what has no value comes last
    return (x - y) * up || a - b;
  });
  entries = shown.map((n) => [n]);
  if ($("grouped").checked) {
    const found = new Map();
    for (const n of shown) found.set(groupKey(rows[n], n), groupOf(n));
    entries = [...found.values()];
  }
  const what = $("grouped").checked ? `${entries.length} prompts, ` : "";
  $("count").textContent = `${what}${shown.length} of ${rows.length} samples`;
  drawn = 0;
  $("list").replaceChildren(more);
  extend();
  open();
}

let pause = 0;
document.querySelector(".controls").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(list, 120);
});
window.addEventListener("hashchange", () => {
  open();
  if (matchMedia("(max-width: 900px)").matches) window.scrollTo(0, 0);
  else $("detail").scrollTop = 0;
});
list();
