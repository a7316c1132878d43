"use strict";
// The sample viewer: a list that is drawn as far as it is looked at, and one sample or one group in full.
// Text from a run only ever becomes a text node or an attribute's value.

const $ = (id) => document.getElementById(id);
const { names, rows } = JSON.parse($("data").textContent);
const CHUNK = 60;
const FILTERS = ["run", "domain", "finish_reason"];
let shown = []; // numbers of the rows that pass the filters, in order
let drawn = 0; // of the list's entries
let entries = []; // of the list: arrays of row numbers, one row each or one group each
let colouring = "ratio";

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
const textOf = (row) => (row.per_token ? row.per_token.text.join("") : row.text ?? "");
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

// Colours of the tokens. Each way of colouring gives a token's class, and names its classes for the legend.

const LOG_STEPS = [0.01, 0.05, 0.2, 0.5];
const level = (value, steps) => steps.filter((step) => value >= step).length;
const WAYS = {
  ratio: {
    name: "ratio",
    legend: [["down4", "≤ 0.61"], ["down3", "0.82"], ["down2", "0.95"], ["down1", "0.99"], ["", "1"], ["up1", "1.01"],
             ["up2", "1.05"], ["up3", "1.22"], ["up4", "≥ 1.65"], ["clipped", "clipped"]],
    of(row, i) {
      const ratio = row.per_token.ratios?.[i];
      if (ratio == null) return "";
      const strength = level(Math.abs(Math.log(ratio)), LOG_STEPS);
      return strength ? (ratio > 1 ? "up" : "down") + strength : "";
    },
  },
  update: {
    name: "advantage, clip, mask",
    legend: [["up2", "A > 0: made likelier"], ["down2", "A < 0: made less likely"], ["clipped", "clipped: no gradient"],
             ["masked", "sequence masked (eq. 8)"], ["", "A = 0 or not trained on"]],
    of(row, i) {
      if (row.per_token.ratios == null || !row.advantage) return "";
      if (row.off_policy_masked) return "masked";
      return row.clips.has(i) ? "" : row.advantage > 0 ? "up2" : "down2";
    },
  },
  probability: {
    name: "probability",
    legend: [["", "sampled with p > 0.9"], ["deep1", "≤ 0.9"], ["deep2", "≤ 0.5"], ["deep3", "≤ 0.1"], ["deep4", "≤ 0.01"]],
    of(row, i) {
      const logprob = row.per_token.behaviour_logprobs?.[i];
      if (logprob == null) return "";
      const strength = level(-logprob, [0.9, 0.5, 0.1, 0.01].map((p) => -Math.log(p)));
      return strength ? "deep" + strength : "";
    },
  },
  kept: {
    name: "words kept",
    legend: [["", "1 word in the running"], ["deep1", "2, 3"], ["deep2", "4 to 10"], ["deep3", "11 to 100"],
             ["deep4", "more, or all"]],
    of(row, i) {
      const kept = row.per_token.kept;
      const strength = kept == null || kept[i] == null ? 4 : level(kept[i], [2, 4, 11, 101]);
      return strength ? "deep" + strength : "";
    },
  },
};

function told(row, i) {
  const t = row.per_token;
  const old = t.behaviour_logprobs?.[i];
  const lines = [`token ${i + 1}: ${JSON.stringify(t.text[i])}`];
  if (old != null) lines.push(`log p of the sampler ${number(old, 4)} (p ${number(Math.exp(old))})`);
  if (t.logprobs?.[i] != null) lines.push(`of the trainer ${number(t.logprobs[i], 4)}`);
  if (t.ratios?.[i] != null) lines.push(`ratio ${number(t.ratios[i], 4)}${row.clips.has(i) ? ", clipped" : ""}`);
  if (t.kept?.[i] != null) lines.push(`${t.kept[i]} words kept`);
  return lines.join("\n");
}

function tokens(row) {
  if (!row.per_token) return h("pre", {}, row.text ?? "");
  row.clips ??= new Set(row.per_token.clipped);
  const way = WAYS[colouring];
  const last = row.per_token.text.length - 1;
  const pre = h("pre", { class: "tokens" });
  row.per_token.text.forEach((piece, i) => {
    const kinds = [way.of(row, i), row.clips.has(i) ? "clipped" : ""];
    if (piece === "") kinds.push(i === last && row.finish_reason === "stop" ? "end" : "part");
    if (piece.trim() === "" && piece.includes("\n")) kinds.push("line");
    pre.append(h("span", { class: kinds.join(" ").trim() || null, title: told(row, i) }, piece));
  });
  pre.addEventListener("click", (event) => {
    if (event.target !== pre) pre.nextSibling.textContent = event.target.title.replaceAll("\n", " · ");
  });
  return [pre, h("p", { class: "told" }, "")];
}

function palette() {
  const select = h("select", { "aria-label": "colour the tokens by" });
  for (const [key, way] of Object.entries(WAYS)) select.append(new Option(way.name, key, false, key === colouring));
  select.addEventListener("change", () => {
    colouring = select.value;
    open();
  });
  const legend = WAYS[colouring].legend.map(([kind, name]) => h("li", {}, h("span", { class: "tokens" },
    h("span", { class: kind || "plain" }, "abc")), " " + name));
  return h("div", { class: "palette" }, h("label", {}, "tokens by", select), h("ul", { class: "legend" }, legend));
}

// One sample in full, or its group side by side.

const fact = (name, value) => (value == null || value === "–" ? null : h("span", {}, name + " ", h("b", {}, value)));

function facts(row) {
  const masked = row.off_policy_masked ? h("span", {}, h("b", { class: "alarm" }, "masked, eq. 8")) : null;
  return h("p", { class: "facts" },
    fact("reward", number(row.reward)), fact("advantage", row.advantage == null ? null : signed(row.advantage)),
    fact("tokens", number(row.tokens)), fact("ended by", row.finish_reason),
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
const asked = (row) =>
  h("dl", {}, block("prompt", row.prompt), block("reference", row.answer), block("rubric", row.rubric));

function heading(row) {
  const run = names.length > 1 ? names[row.run] : null;
  return [run, `step ${number(row.step)}`, row.domain].filter(Boolean).join(" · ");
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
    h("h2", {}, heading(row)), h("p", { class: "place" }, place(row)), facts(row), asked(row), palette(),
    h("div", { class: "answer" }, tokens(row)), rewards(row)];
}

function groupView(n) {
  const members = groupOf(n);
  const row = rows[n];
  return [
    h("nav", {}, h("a", { href: "#", class: "back" }, "all samples")),
    h("h2", {}, heading(row)), h("p", { class: "place" }, `prompt ${number(row.prompt_index)}: ${groupFacts(members)}`),
    asked(row), palette(),
    h("div", { class: "beside" }, members.map((m) => h("article", {},
      h("h3", {}, h("a", { href: "#" + m }, `sample ${number(rows[m].sample_index)}`)), facts(rows[m]), tokens(rows[m]))))];
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
  row.haystack ??= [row.prompt, row.answer, textOf(row)].join("\n").toLowerCase();
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
