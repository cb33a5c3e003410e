// Charts over time, drawn by uPlot.
//
// Knows how a curve looks: colours, axes, the time that is under the pointer. Does not know what a curve is of.

import { element, say } from "./dom.js";
import { NOTHING, moment } from "./words.js";
import uPlot from "./vendor/uPlot.js";

const HEIGHT = 150;
const FONT = "12px system-ui, sans-serif";

/** Colours of the page as it looks now, light or dark: a canvas knows no style sheet. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(name).trim();
  return {
    ink: named("--muted"),
    grid: named("--line"),
    curves: [1, 2, 3, 4, 5, 6].map((i) => named(`--curve-${i}`)),
  };
}

const dark = matchMedia("(prefers-color-scheme: dark)");

/**
 * A chart with a heading, the latest values beside it, and one curve or more.
 *
 * parent: where the chart goes. sync: charts with the same word show the same moment under the pointer. axis: how a
 * value is written beside the axis; value: how it is written in the heading. time: the horizontal axis has moments, else
 * numbers, which may be spread by their logarithms. ticks: gives the numbers that are written below that axis, by
 * `across`, which then ends beside the outermost points; null: the chart finds some. binary: the vertical axis is divided
 * by powers of two, as bytes are. dots: by curve, how large its points are; null: points are not drawn.
 */
export class Chart {
  constructor(parent, { title, hint, value, axis = value, ...more }) {
    const { sync = null, time = true, logarithmicX = false, binary = false } = more;
    const { ticks = null, across = compact, dots = null } = more;
    Object.assign(this, { value, axis, sync, time, logarithmicX, binary, ticks, across, dots });
    this.legend = element("p", "legend");
    this.holder = element("div", "plot");
    this.holder.setAttribute("role", "img");
    this.figure = element(
      "figure",
      "card chart",
      element("h3", "", title),
      this.legend,
      this.holder,
      element("figcaption", "muted", hint),
    );
    parent.append(this.figure);
    this.title = title;
    this.names = [];
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.holder);
    dark.addEventListener("change", () => this.names.length && this.draw());
  }

  /** Show curves. xs: Unix seconds, or numbers where `time` is off. curves: [name, values], null where missing. */
  show(xs, curves) {
    const known = curves.filter(([, values]) => values.some((each) => each !== null));
    const names = known.map(([name]) => name);
    const same = this.plot && names.join("\u0000") === this.names.join("\u0000");
    this.names = names;
    this.data = [xs, ...known.map(([, values]) => values)];
    this.figure.hidden = known.length === 0;
    if (this.figure.hidden) return;
    if (same) this.plot.setData(this.data);
    else this.draw();
    this.tell(null);
  }

  draw() {
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), this.data, this.holder);
    this.tell(null);
  }

  size() {
    return { width: Math.max(100, this.holder.clientWidth), height: HEIGHT };
  }

  options() {
    const palette = colours();
    return {
      ...this.size(),
      padding: [8, 30, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 6 },
        ...(this.sync ? { sync: { key: this.sync } } : {}),
      },
      scales: {
        x: { time: this.time, distr: this.logarithmicX ? 3 : 1, ...(this.ticks ? { range: beside } : {}) },
        y: { range: span },
      },
      axes: [this.horizontal(palette), this.vertical(palette)],
      series: [{}, ...this.names.map((name, i) => this.curve(name, i, palette))],
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx ?? null)] },
    };
  }

  horizontal(palette) {
    const values = this.time ? CLOCK : (_, ticks) => ticks.map((each) => (each === null ? "" : this.across(each)));
    // By itself a logarithmic axis writes powers of ten alone.
    const at = this.ticks ? { splits: () => this.ticks(), filter: (_, splits) => splits } : {};
    return { ...axis(palette), size: this.time ? 40 : 28, space: 70, values, ...at };
  }

  vertical(palette) {
    const values = (_, ticks) => ticks.map((each) => (each === null ? "" : this.axis(each)));
    return { ...axis(palette), size: 62, space: 34, values, ...(this.binary ? { incrs: POWERS_OF_TWO } : {}) };
  }

  curve(label, i, { curves }) {
    // A single point makes no line.
    const stroke = curves[i % curves.length];
    const points = { show: this.dots !== null || this.data[0].length < 2, size: this.dots?.[i] ?? 5, fill: stroke };
    return { label, stroke, width: i === 0 ? 1.75 : 1.25, spanGaps: true, points };
  }

  /** Write the values at an index beside the heading; of null the latest. */
  tell(index) {
    const [xs, ...columns] = this.data;
    const latest = (values) => values.findLast((each) => each !== null) ?? null;
    const parts = this.names.map((name, i) => [name, index === null ? latest(columns[i]) : columns[i][index]]);
    while (this.legend.children.length > parts.length) this.legend.lastChild.remove();
    parts.forEach(([name, value], i) => {
      const mark =
        this.legend.children[i] ?? this.legend.appendChild(element("span", "mark", element("b"), element("span")));
      mark.dataset.curve = String((i % 6) + 1);
      // The end of a curve over time is the present; of another it says nothing.
      if (index === null && !this.time) say(mark.firstChild, "");
      else say(mark.firstChild, value === null || value === undefined ? NOTHING : this.value(value));
      say(mark.lastChild, parts.length > 1 ? name : index !== null && this.time ? moment(xs[index]) : "");
    });
    if (index === null)
      this.holder.setAttribute("aria-label", `${this.title}: ${this.legend.textContent || "nothing yet"}`);
  }
}

const COMPACT = new Intl.NumberFormat("en", { notation: "compact" });
const compact = (value) => COMPACT.format(value);
const POWERS_OF_TWO = Array.from({ length: 60 }, (_, i) => 2 ** (i - 10));

function axis({ ink, grid }) {
  return { stroke: ink, font: FONT, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 } };
}

// Clock times within a day, with the day where it changes.
const CLOCK = [
  [86_400 * 28, "{MMM} {YYYY}", null, null, null, null, null, null, 1],
  [86_400, "{D} {MMM}", null, null, null, null, null, null, 1],
  [60, "{HH}:{mm}", "\n{D} {MMM}", null, "\n{D} {MMM}", null, null, null, 1],
  [1, "{HH}:{mm}:{ss}", null, null, "\n{D} {MMM}", null, null, null, 1],
  [0.001, ":{ss}.{fff}", "\n{HH}:{mm}:{ss}", null, null, null, null, null, 1],
];

// The range of an axis of logarithms.
const beside = (_, low, high) => [low / 1.1, high * 1.1];

// A curve that does not move is drawn in the middle, not along an edge.
function span(plot, low, high) {
  if (low === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const room = (high - low) * 0.08;
  return [low >= 0 && low < high * 0.5 ? 0 : low - room, high + room];
}

/** A small curve without axes, for a cell of a table. */
export class Spark {
  constructor(parent, label) {
    this.holder = element("span", "spark");
    this.holder.setAttribute("role", "img");
    this.holder.setAttribute("aria-label", label);
    parent.append(this.holder);
    this.plot = null;
  }

  show(xs, values) {
    if (this.plot) return this.plot.setData([xs, values]);
    this.plot = new uPlot(
      {
        width: 96,
        height: 22,
        padding: [2, 2, 2, 2],
        legend: { show: false },
        cursor: { show: false },
        scales: { x: { time: false }, y: { range: span } },
        axes: [{ show: false }, { show: false }],
        series: [{}, { stroke: colours().curves[0], width: 1.25, spanGaps: true, points: { show: false } }],
      },
      [xs, values],
      this.holder,
    );
  }
}
