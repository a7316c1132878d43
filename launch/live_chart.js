// One chart of the live page: lines over steps, tokens or hours, drawn as SVG, read with the mouse or the arrow keys,
// zoomed by dragging. It keeps its nodes while its data change, so that focus, scroll and selection stay. Text from a
// run only ever becomes a text node or an attribute's value. Sizes and looks are those of report_charts.py.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [380, 218, 46, 10, 10, 36];
const [PLOT_W, PLOT_H] = [WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
const COLOURS = 8;

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child != null));
  return node;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make(SVG, tag, attributes, children);

// A number in few characters, about four digits of it, as report_names.number.
function number(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  const trim = (text) => text.replace(/\.?0+($|e)/, "$1");
  if (size < 1e-3 || size >= 1e12) return trim(value.toExponential(2)).replace("e+", "e");
  for (const [limit, per, suffix] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]]) {
    if (size >= limit) return trim((value / per).toPrecision(4) + "") + suffix;
  }
  if (Number.isInteger(value)) return String(value);
  return size < 1 ? value.toFixed(4) : value.toPrecision(4);
}
function quantity(value, unit) {
  if (value == null) return "–";
  if (unit !== "bytes") return number(value);
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(4, Math.max(0, Math.floor(Math.log(Math.max(1, value)) / Math.log(1024))));
  return `${+(value / 1024 ** power).toPrecision(4)} ${names[power]}`;
}

// 1, 2 or 5 times a power of ten apart; at least three where that can be.
function niceTicks(low, high, about) {
  const ticks = ticksOf(low, high, about);
  return ticks.length > 2 || about > 8 ? ticks : niceTicks(low, high, about + 1);
}
function ticksOf(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => raw <= m * 1.0001);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) ticks.push(i * step);
  return ticks;
}
// Labels with as many decimals as their distance needs, all alike.
function tickLabels(ticks, unit) {
  if (unit === "bytes") return ticks.map((tick) => quantity(tick, unit));
  const largest = Math.max(...ticks.map(Math.abs));
  if (ticks.length < 2) return ticks.map(number);
  if (largest >= 1e4 || largest < 2e-3) return ticks.map((tick) => number(+tick.toPrecision(6)));
  const decimals = Math.max(0, -Math.floor(Math.log10(ticks[1] - ticks[0]) + 1e-9));
  return ticks.map((tick) => tick.toFixed(decimals));
}

function xAxis(low, high) {
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const ticks = niceTicks(low, high, 5);
  return { low, high, ticks, labels: tickLabels(ticks), at: (x) => LEFT + ((x - low) / (high - low)) * PLOT_W };
}
function yAxis(values, panel) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const base = TOP + PLOT_H;
  if (panel.log && low > 0 && high / low > 12) {
    [low, high] = [Math.log10(low / 1.15), Math.log10(high * 1.15)];
    const skip = Math.max(1, Math.floor((high - low) / 5));
    const [ticks, minor] = [[], high - low < 2.5 ? [1, 2, 5] : [1]];
    for (let p = Math.floor(low); p <= high; p += skip) for (const m of minor) ticks.push(m * 10 ** p);
    const inside = ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
    const at = (y) => base - ((Math.log10(Math.max(y, 1e-300)) - low) / (high - low)) * PLOT_H;
    return { ticks: inside, labels: inside.map((t) => number(+t.toPrecision(3))), at, log: true };
  }
  if (panel.share && low < -0.25 && high > -0.25) low = -0.25;
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.5;
  let [floor, ceiling] = [low - pad, high + pad];
  if (low >= 0) floor = low > 0.25 * high ? Math.max(floor, 0) : 0;
  if (panel.share && high <= 1) ceiling = Math.min(ceiling, 1);
  if (!(ceiling > floor)) ceiling = floor + 1e-9 * Math.max(1, Math.abs(floor));
  const per = panel.unit === "bytes" ? 1024 ** Math.floor(Math.log(Math.max(1, high)) / Math.log(1024)) : 1;
  const ticks = niceTicks(floor / per, ceiling / per, 4).map((tick) => tick * per);
  const at = (y) => base - ((Math.min(Math.max(y, floor), ceiling) - floor) / (ceiling - floor)) * PLOT_H;
  return { ticks, labels: tickLabels(ticks, panel.unit), at, log: false };
}

// A centred moving average, or null where the line is short or smooth as it is (a schedule must not be blurred).
function smoothed(ys) {
  const values = ys.filter((y) => y != null);
  if (values.length < 30) return null;
  let [travelled, low, high] = [0, Infinity, -Infinity];
  values.forEach((v, i) => {
    if (i) travelled += Math.abs(v - values[i - 1]);
    [low, high] = [Math.min(low, v), Math.max(high, v)];
  });
  if (travelled < 5 * (high - low)) return null;
  const reach = Math.max(2, Math.floor(ys.length / 30));
  return ys.map((y, i) => {
    const near = Math.min(reach, i);
    const around = ys.slice(i - near, i + near + 1).filter((v) => v != null);
    return y == null ? null : around.reduce((a, b) => a + b, 0) / around.length;
  });
}
function path(xs, ys, x, y) {
  let [out, down] = ["", false];
  xs.forEach((px, i) => {
    if (ys[i] == null) return (down = false);
    out += `${down ? "L" : "M"}${x.at(px).toFixed(1)} ${y.at(ys[i]).toFixed(1)}`;
    down = true;
  });
  return out;
}
function band(line, x, y) {
  const kept = line.x.map((_, i) => i).filter((i) => line.low[i] != null && line.high[i] != null);
  const at = (ys) => (i) => `${x.at(line.x[i]).toFixed(1)} ${y.at(ys[i]).toFixed(1)}`;
  return kept.length < 2 ? "" : `M${[...kept.map(at(line.high)), ...kept.reverse().map(at(line.low))].join("L")}Z`;
}
// The place in `xs` (ascending) nearest to x.
function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

let ids = 0;

class Chart {
  // panel: {title, unit, log, share}, key: what stands small under the title; on: {zoom(from, to), whole(), say(text)}
  constructor(panel, key, on) {
    Object.assign(this, { panel, on, lines: [], cursor: null, id: `clip${ids++}` });
    this.now = h("span", { class: "now" });
    this.legend = h("ul", { class: "legend" });
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
    this.tip = h("div", { class: "tip", hidden: "" });
    const said = `${panel.title}${panel.unit ? ", " + panel.unit : ""}`;
    this.plot = h("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": said }, this.svg, this.tip);
    this.note = h("p", { class: "notes", hidden: "" });
    const under = panel.unit && panel.unit !== "bytes" ? `${key} · ${panel.unit}` : key;
    const caption = h("figcaption", {}, h("b", {}, panel.title), this.now, h("span", { class: "key" }, under));
    this.element = h("figure", {}, caption, this.legend, this.plot, this.note);
    this.plot.addEventListener("keydown", (event) => this.press(event));
    this.plot.addEventListener("blur", () => this.point(null));
    this.plot.addEventListener("pointermove", (event) => this.move(event));
    this.plot.addEventListener("pointerleave", () => this.from == null && this.point(null));
    this.plot.addEventListener("pointerdown", (event) => this.begin(event));
    this.plot.addEventListener("pointerup", (event) => this.end(event));
    this.plot.addEventListener("dblclick", () => on.whole());
  }

  // lines: [{name, colour, dashed, shade, rows of the run, x, y, low?, high?}]; view: {axis: name on the x axis, from,
  // to, smooth}. Of a line beside the zoomed range nothing is shown: the one point that came of it is no last value.
  draw(lines, view) {
    const [from, to] = [view.from ?? -Infinity, view.to ?? Infinity];
    const inRange = (line) => line.rows === 1 || (line.x.at(-1) >= from && line.x[0] <= to);
    Object.assign(this, { lines: lines.filter((line) => line.y.some((y) => y != null) && inRange(line)), view });
    this.once = this.lines.length > 0 && this.lines.every((line) => line.x.length === 1);
    const many = lines.length > 1;
    const last = (line) => quantity(line.y.findLast((y) => y != null), this.panel.unit);
    this.now.textContent = !many && this.lines.length ? last(this.lines[0]) : "";
    const told = this.lines.length > 10 ? [this.lines[0], this.lines.at(-1)] : this.lines;
    const items = told.map((line) => h("li", {}, swatch(line), line.name, " ", h("b", {}, last(line))));
    this.legend.replaceChildren(...(many && !this.once ? items : []));
    const lost = lines.reduce((sum, line) => sum + line.y.filter((y) => y == null).length, 0);
    this.note.hidden = !lost;
    this.note.textContent = `${lost} point${lost > 1 ? "s" : ""} without a finite value, marked red`;
    if (!this.lines.length) this.svg.replaceChildren(s("text", { x: LEFT, y: TOP + PLOT_H / 2 }, lines.every(inRange) ? "nothing logged yet" : "nothing in this range"));
    else if (this.once) this.drawBars();
    else this.drawLines(lines);
    this.point(this.cursor);
  }

  drawLines(lines) {
    const { view, panel } = this;
    let [low, high] = [Infinity, -Infinity];
    for (const line of lines) for (const x of line.x) [low, high] = [Math.min(low, x), Math.max(high, x)];
    this.x = xAxis(Math.max(low, view.from ?? low), Math.min(high, view.to ?? high));
    const inside = (x) => x >= this.x.low && x <= this.x.high;
    const values = [];
    for (const line of this.lines) {
      line.x.forEach((x, i) => inside(x) && line.y[i] != null && values.push(line.y[i]));
    }
    this.y = yAxis(values.length ? values : this.lines.flatMap((line) => line.y.filter((y) => y != null)), panel);
    const base = TOP + PLOT_H;
    const clip = s("clipPath", { id: this.id }, s("rect", { x: LEFT, y: TOP - 2, width: PLOT_W, height: PLOT_H + 4 }));
    const frame = [];
    this.y.ticks.forEach((tick, i) => {
      const y = this.y.at(tick).toFixed(1);
      frame.push(s("path", { class: "grid", d: `M${LEFT} ${y}H${WIDTH - RIGHT}` }));
      frame.push(s("text", { x: LEFT - 7, y: +y + 3.8, "text-anchor": "end" }, this.y.labels[i]));
    });
    frame.push(s("path", { class: "axis", d: `M${LEFT} ${base}H${WIDTH - RIGHT}` }));
    this.x.ticks.forEach((tick, i) => {
      const x = this.x.at(tick).toFixed(1);
      frame.push(s("path", { class: "axis", d: `M${x} ${base}v4` }));
      frame.push(s("text", { x, y: base + 17, "text-anchor": "middle" }, this.x.labels[i]));
    });
    frame.push(s("text", { class: "name", x: WIDTH - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, view.axis));
    const drawn = this.lines.map((line) => this.drawLine(line));
    const lost = lines.flatMap((line) => line.x.filter((x, i) => line.y[i] == null && inside(x)));
    const marks = lost.slice(0, 400).map((x) => s("path", { class: "lost", d: `M${this.x.at(x).toFixed(1)} ${base}v-6` }));
    this.mark = s("g", {});
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.replaceChildren(clip, ...frame, s("g", { "clip-path": `url(#${this.id})` }, ...drawn), ...marks, this.mark);
  }

  drawLine(line) {
    const smooth = this.view.smooth ? smoothed(line.y) : null;
    const at = (ys) => path(line.x, ys, this.x, this.y);
    return s("g", { class: `s${line.colour % COLOURS}`, "stroke-opacity": line.shade },
      line.low ? s("path", { class: "band", d: band(line, this.x, this.y) }) : null,
      smooth ? s("path", { class: "raw", d: at(line.y) }) : null,
      s("path", { class: "line", d: at(smooth ?? line.y), "stroke-dasharray": line.dashed ? "6 4" : null }));
  }

  // A run of one row, an evaluation: a bar a line.
  drawBars() {
    const values = this.lines.map((line) => line.y[0]);
    const most = this.panel.share ? 1 : Math.max(...values.map(Math.abs)) || 1;
    const shown = this.lines.slice(0, 6);
    const rows = shown.map((line, i) => {
      const [y, width] = [TOP + 6 + i * 31, (Math.max(0, values[i]) / most) * (WIDTH - 70)];
      const name = line.name.length > 44 ? "…" + line.name.slice(-43) : line.name;
      const bar = { class: "bar", x: 2, y: y + 12, width, height: 10, rx: 2, "fill-opacity": line.shade };
      return s("g", { class: `s${line.colour % COLOURS}` }, s("text", { x: 2, y: y + 7 }, name), s("rect", bar),
        s("text", { class: "value", x: width + 8, y: y + 21 }, quantity(values[i], this.panel.unit)));
    });
    const more = this.lines.length - shown.length;
    const left = more > 0 ? s("text", { x: 2, y: HEIGHT - 4 }, `and ${more} more`) : null;
    const height = more > 0 ? HEIGHT : 16 + 31 * rows.length;
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
    this.svg.replaceChildren(...rows, ...(left ? [left] : []));
    this.mark = null;
  }

  // Values under the cursor: `x` on the axis, or null for none.
  point(x) {
    this.cursor = x;
    if (this.mark) this.mark.replaceChildren();
    this.tip.hidden = x == null || this.once || !this.lines.length;
    if (this.tip.hidden) {
      const told = this.lines.map((line) => `${line.name} ${quantity(line.y.findLast((y) => y != null), this.panel.unit)}`);
      return this.tell(this.once ? 0 : this.x?.high ?? 0, told.length ? `last values: ${told.join(", ")}` : "nothing logged yet");
    }
    const rows = this.lines.map((line) => ({ line, i: nearest(line.x, x) }));
    const best = rows.reduce((a, b) => (Math.abs(b.line.x[b.i] - x) < Math.abs(a.line.x[a.i] - x) ? b : a));
    const at = best.line.x[best.i];
    const reach = (line) => (line.x.at(-1) - line.x[0]) / Math.max(1, line.x.length - 1); // no line is read past its ends
    const covers = (line) => at >= line.x[0] - reach(line) && at <= line.x.at(-1) + reach(line);
    const read = rows.filter(({ line }) => covers(line)).slice(0, 10);
    const place = this.x.at(at);
    this.mark.append(s("path", { class: "cursor", d: `M${place.toFixed(1)} ${TOP}V${TOP + PLOT_H}` }));
    for (const { line, i } of read) {
      if (line.y[i] == null) continue;
      const dot = { class: `dot s${line.colour % COLOURS}`, r: 3, cx: this.x.at(line.x[i]), cy: this.y.at(line.y[i]) };
      this.mark.append(s("circle", dot));
    }
    const value = (row) => quantity(row.line.y[row.i], this.panel.unit);
    const items = read.map((row) => h("li", {}, swatch(row.line), row.line.name, " ", h("b", {}, value(row))));
    this.tip.replaceChildren(h("p", {}, `${this.view.axis} ${number(at)}`), h("ul", {}, ...items));
    this.tip.style.left = `${(place / WIDTH) * 100}%`;
    this.tip.classList.toggle("left", place > WIDTH / 2);
    this.tell(at, `${this.view.axis} ${number(at)}: ${read.map((row) => `${row.line.name} ${value(row)}`).join(", ")}`);
  }

  // What a screen reader reads, and where on the axis that is.
  tell(at, said) {
    const ends = this.once || !this.x ? [0, 0] : [this.x.low, this.x.high];
    for (const [name, value] of [["valuemin", ends[0]], ["valuemax", ends[1]], ["valuenow", at], ["valuetext", said]]) {
      this.plot.setAttribute(`aria-${name}`, value);
    }
  }

  press(event) {
    if (event.key === "Escape") return this.cursor == null ? this.on.whole() : (this.point(null), this.on.whole());
    if (!this.lines.length || this.once || event.ctrlKey || event.metaKey || event.altKey) return;
    const xs = [...new Set(this.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const inside = xs.filter((x) => x >= this.x.low && x <= this.x.high);
    const here = this.cursor == null ? inside.length - 1 : nearest(inside, this.cursor);
    const step = event.shiftKey ? 10 : 1;
    const span = this.x.high - this.x.low;
    const middle = this.cursor ?? (this.x.low + this.x.high) / 2;
    const go = { ArrowRight: here + step, ArrowUp: here + step, ArrowLeft: here - step, ArrowDown: here - step,
      Home: 0, End: inside.length - 1 }[event.key];
    if (go !== undefined && this.cursor == null) this.point(inside.at(-1));
    else if (go !== undefined) this.point(inside[Math.min(inside.length - 1, Math.max(0, go))]);
    else if (event.key === "+" || event.key === "=") this.on.zoom(middle - span / 4, middle + span / 4);
    else if (event.key === "-") this.on.zoom(middle - span, middle + span);
    else return;
    event.preventDefault();
  }

  place(event) {
    const box = this.svg.getBoundingClientRect();
    const x = this.x.low + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / PLOT_W * (this.x.high - this.x.low);
    return Math.min(this.x.high, Math.max(this.x.low, x));
  }
  move(event) {
    if (!this.lines.length || this.once) return;
    const x = this.place(event);
    this.point(x);
    if (this.from == null) return;
    const [a, b] = [this.x.at(Math.min(x, this.from)), this.x.at(Math.max(x, this.from))];
    this.mark.append(s("rect", { class: "chosen", x: a, y: TOP, width: b - a, height: PLOT_H }));
  }
  begin(event) {
    if (!this.lines.length || this.once || event.button) return;
    this.from = this.place(event);
    this.plot.setPointerCapture(event.pointerId);
  }
  end(event) {
    if (this.from == null) return;
    const [a, b] = [this.from, this.place(event)].sort((p, q) => p - q);
    this.from = null;
    if (this.x.at(b) - this.x.at(a) > 6) this.on.zoom(a, b);
  }
}

const swatch = (line) => {
  const node = h("i", { class: `swatch s${line.colour % COLOURS}${line.dashed ? " dashed" : ""}` });
  if (line.shade != null) node.style.opacity = line.shade;
  return node;
};
