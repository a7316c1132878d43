"use strict";
// One sample from its first token to its last: thoughts, calls, what the tools gave back, the answer. This file and
// samples.js are one script. Text from a run only ever becomes a text node or an attribute's value.

const HEAD_LINES = 12; // of a result; the rest is folded
const CODE_LINES = 30; // of an argument
const LINE = 90; // characters that a line holds, about
let colouring = "ratio";
let asWritten = false; // the tokens of calls are unfolded

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

function palette(shown) {
  const select = h("select", { "aria-label": "colour the tokens by" });
  for (const [key, way] of Object.entries(WAYS)) select.append(new Option(way.name, key, false, key === colouring));
  select.addEventListener("change", () => {
    colouring = select.value;
    open();
  });
  const legend = WAYS[colouring].legend.map(([kind, name]) => h("li", {}, h("span", { class: "tokens" },
    h("span", { class: kind || "plain" }, "abc")), " " + name));
  const calls = shown.some((row) => row.flow.some((part) => part.kind === "call" && part.first != null));
  return h("div", { class: "palette" }, h("label", {}, "tokens by", select), calls ? unfold() : null,
    h("ul", { class: "legend" }, legend));
}

function unfold() {
  const box = h("input", { type: "checkbox" });
  box.checked = asWritten;
  box.addEventListener("change", () => {
    asWritten = box.checked;
    for (const node of $("detail").querySelectorAll("details.written")) node.open = asWritten;
  });
  return h("label", { class: "tick" }, box, "calls as written");
}

// The parts of a sample.

function tokens(row, part) {
  if (part.first == null) return h("pre", { class: "tokens" }, part.text);
  const way = WAYS[colouring];
  const pre = h("pre", { class: "tokens" });
  for (let i = part.first; i < part.stop; i++) {
    const piece = row.per_token.text[i];
    const kinds = [way.of(row, i), row.clips.has(i) ? "clipped" : ""];
    if (piece === "") kinds.push(row.ends.has(i) ? "end" : "part");
    if (piece.trim() === "" && piece.includes("\n")) kinds.push("line");
    pre.append(h("span", { class: kinds.join(" ").trim() || null, title: told(row, i) }, piece));
  }
  return pre;
}

// Where the head of a text ends that is about `lines` long on the screen; its length where little would be left.
function headOf(text, lines) {
  let [at, left] = [0, lines];
  while (at < text.length && left > 0) {
    const end = text.indexOf("\n", at);
    const stop = Math.min(end < 0 ? text.length : end + 1, at + left * LINE);
    left -= Math.ceil((stop - at) / LINE);
    at = stop;
  }
  if (/[\udc00-\udfff]/.test(text[at] ?? "")) at -= 1; // not inside a pair of surrogates
  const rest = text.slice(at);
  return rest.length < 3 * LINE && rest.split("\n").length <= 3 ? text.length : at;
}

function folded(text, lines) {
  const at = headOf(text, lines);
  if (at === text.length) return h("pre", {}, text);
  const [head, rest] = [text.slice(0, at).replace(/\n$/, ""), text.slice(at)];
  const left = rest.trimEnd().split("\n").length;
  const more = left > 3 && text[at - 1] === "\n" ? `${left} more lines` : `${rest.length} more characters`;
  return [h("pre", { class: "head" }, head), h("details", { class: "rest" }, h("summary", {}, more), h("pre", {}, rest))];
}

const label = (...words) => h("p", { class: "label" }, ...words);

function asked(call, alone) {
  const values = call.arguments.map(([name, value]) => [h("dt", {}, name), h("dd", {}, folded(value, CODE_LINES))]);
  return [alone ? null : label(h("b", {}, call.name)),
    values.length ? h("dl", {}, ...values) : h("p", { class: "nothing" }, "no arguments")];
}

function written(row, part) {
  if (part.first == null) return null;
  const clips = [...row.clips].filter((i) => i >= part.first && i < part.stop).length;
  const size = `as written: ${part.stop - part.first} tokens${clips ? `, ${clips} clipped` : ""}`;
  const shown = asWritten || part.reason != null ? "" : null; // what nobody could read is shown as it is
  return h("details", { class: "written", open: shown }, h("summary", {}, size), tokens(row, part));
}

function seconds(value) {
  if (value == null) return null;
  return value < 0.01 ? "under 0.01 s" : number(value, value < 10 ? 2 : 0) + " s";
}

const DRAWN = {
  thought: (row, part) => [label("thought"), tokens(row, part)],
  aside: (row, part) => [label("said beside the call"), tokens(row, part)],
  answer: (row, part) => [label("answer"), tokens(row, part)],
  call: (row, part) => [
    part.reason == null ? label("calls ", h("b", {}, part.calls.map((call) => call.name).join(", ")))
      : label(h("b", {}, "malformed call"), h("span", {}, part.reason)),
    part.calls.map((call) => asked(call, part.calls.length === 1)), written(row, part)],
  result: (row, part) => [
    label(h("b", {}, part.name), part.error ? " failed" : " returned",
      [seconds(part.seconds), part.ended ? "ends the sample" : null, part.unread ? "not read" : null]
        .filter(Boolean).map((word) => h("span", {}, word))),
    part.text ? folded(part.text, HEAD_LINES) : h("p", { class: "nothing" }, "nothing")],
  read: (row, part) => [label("the model read"), folded(part.text, HEAD_LINES)],
  anew: (row, part) => h("details", {}, h("summary", {}, `context begins anew (${part.size.toLocaleString("en")} characters)`),
    h("pre", {}, part.text)),
};

function flow(row) {
  row.clips ??= new Set(row.per_token?.clipped);
  row.ends ??= new Set(row.per_token?.ends);
  const line = h("p", { class: "told" });
  const parts = row.flow.map((part) => h("section", { class: part.kind + (part.error || part.reason ? " failed" : "") },
    ...[DRAWN[part.kind](row, part)].flat(2).filter((node) => node != null)));
  const all = h("div", { class: "flow" }, parts, line);
  all.addEventListener("click", (event) => {
    if (event.target.matches(".tokens span")) line.textContent = event.target.title.replaceAll("\n", " · ");
  });
  return all;
}
