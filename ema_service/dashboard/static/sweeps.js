// What sweeps over the averages of a run found: result over length, the best marked.
//
// Knows reports of sweeps, as PROTOCOL.md has them. Does not know who evaluated, or how a chart is drawn (charts.js).

import { command } from "./api.js";
import { Chart } from "./charts.js";
import { element, fill, line, table } from "./dom.js";
import { moment, plain } from "./words.js";

const NAMES = { sigma_rel: "σ_rel", decay: "decay", half_life: "half-life" };

export class Sweeps {
  constructor(parent) {
    this.chosen = null; // the time of the sweep that the reader chose; null: the newest
    this.chooser = element("select");
    this.chooser.addEventListener("change", () => {
      this.chosen = Number(this.chooser.value);
      this.showOne();
    });
    this.choice = element("label", "choose", "Sweep ", this.chooser);
    this.found = element("div", "sweep");
    this.chart = new Chart(this.found, {
      title: "What a sweep found",
      hint: "Result of the evaluation (upwards) by the average's length (to the right: longer)",
      value: (value) => plain(value, 5),
      axis: (value) => plain(value, 4),
      across: (length) => plain(this.kind === "decay" ? 1 - 1 / length : length, 7),
      time: false,
      logarithmicX: true,
      ticks: () => some(this.chart.data[0]),
      dots: [6, 13],
    });
    this.table = table("Results of the sweep", ["Length", ["Result", "number"], ["Note", "wide"]]);
    this.best = element("div", "sweep");
    this.found.append(this.table, this.best);
    this.none = element("div", "sweep");
    parent.append(this.choice, this.found, this.none);
    this.choice.hidden = this.found.hidden = this.none.hidden = true;
  }

  /** list: the answer of GET …/sweeps, null where there was none. */
  show(run, list) {
    const sweeps = [...(list?.sweeps ?? [])].reverse();
    const key = JSON.stringify(sweeps);
    if (key === this.key) return;
    this.key = key;
    this.run = run.run;
    this.sweeps = sweeps;
    this.choice.hidden = sweeps.length < 2;
    this.found.hidden = sweeps.length === 0;
    this.none.hidden = sweeps.length > 0;
    if (sweeps.length) this.showChoices();
    else this.showLine();
  }

  showChoices() {
    if (!this.sweeps.some(({ time }) => time === this.chosen)) this.chosen = null;
    this.chooser.replaceChildren(...this.sweeps.map((each) => new Option(described(each), String(each.time))));
    this.chooser.value = String(this.chosen ?? this.sweeps[0].time);
    this.showOne();
  }

  showLine() {
    const text = `ema sweep ${this.run} --sigma-rel 0.03:0.25:6 --exec './evaluate.sh {path}'`;
    this.none.replaceChildren(
      element("p", "muted", "Your evaluation at several lengths, with a table, a plot and the best:"),
      line(command(text)),
    );
  }

  showOne() {
    const sweep = this.sweeps.find(({ time }) => time === this.chosen) ?? this.sweeps[0];
    const best = bestOf(sweep);
    this.kind = sweep.kind;
    const drawn = sweep.points.filter(({ result }) => result !== null).sort((a, b) => a.value - b.value);
    this.chart.show(
      drawn.map(({ value }) => (sweep.kind === "decay" ? 1 / (1 - value) : value)),
      [
        [sweep.name ?? "result", drawn.map(({ result }) => result)],
        ["best", drawn.map((point) => (point === best ? point.result : null))],
      ],
    );
    fill(
      this.table,
      sweep.points.map((point) => row(sweep, point, best)),
    );
    this.best.replaceChildren(...(best ? linesFor(this.run, sweep, best) : []));
  }
}

/** At most six of the numbers, evenly, the first and the last among them. */
function some(numbers) {
  const most = Math.min(6, numbers.length);
  const at = (i) => Math.round((i * (numbers.length - 1)) / Math.max(1, most - 1));
  return Array.from({ length: most }, (_, i) => numbers[at(i)]);
}

function described(sweep) {
  return [moment(sweep.time), sweep.name, `${sweep.points.length} × ${NAMES[sweep.kind]}`].filter(Boolean).join(" · ");
}

/** The point with the best result, the first of several; undefined where there is none. */
function bestOf({ points, highest }) {
  const counted = points.filter(({ result }) => result !== null);
  return counted.sort((a, b) => (highest ? b.result - a.result : a.result - b.result))[0];
}

function row(sweep, point, best) {
  const note = point === best ? element("strong", "", `best, the ${sweep.highest ? "highest" : "lowest"}`) : "";
  return [
    `${NAMES[sweep.kind]}\u00a0${plain(point.value, 9)}`,
    plain(point.result, 6),
    note || element("span", "muted", point.refused ?? (point.result === null ? "no result" : "")),
  ];
}

function linesFor(run, sweep, best) {
  const of = sweep.at === null ? "" : ` --at ${sweep.at}`;
  const when = sweep.at === null ? "" : ` at ${sweep.at}`;
  return [
    element("p", "muted", `Of the averages${when}, reported ${moment(sweep.time)}. To keep the best as a snapshot:`),
    line(command(`ema snapshot ${run} best --${sweep.kind.replace("_", "-")} ${best.value}${of}`)),
  ];
}
