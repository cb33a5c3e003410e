// The curves of a run over time.
//
// Knows what each column of a history means, and which of them belong in one picture. Does not know how curves are drawn
// (charts.js), or where a history comes from.

import { Chart } from "./charts.js";
import { byId, element, say } from "./dom.js";
import { bytes, decay, duration, integer, perSecond, plain, sentence } from "./words.js";

/** Time shown: label, and seconds back from now; null: all. */
const RANGES = [
  ["10 min", 600],
  ["1 h", 3600],
  ["1 day", 86_400],
  ["1 week", 604_800],
  ["all", null],
];
const MOST_GROUPS = 5;

const column =
  (name, label = name) =>
  (history) => [[label, history.columns[name]]];

/** Title, what the curve says, its curves, and how values are written. */
const CHARTS = [
  {
    title: "Distance",
    hint: "|average − parameters| / |parameters|, of all tensors and of the groups that are farthest away",
    value: plain,
    curves: (history) => [["all", history.columns.distance], ...farthest(history.groups)],
  },
  {
    title: "Effective decay",
    hint: "The share of the average that the latest update left as it was",
    value: decay,
    curves: column("effective_decay"),
  },
  {
    title: "Norms",
    hint: "Lengths of average and parameters: where they part, the average lags; where they leap, the training does",
    value: plain,
    curves: (history) => [
      ["average", history.columns.shadow_norm],
      ["parameters", history.columns.parameter_norm],
    ],
  },
  {
    title: "Step and counter",
    hint: "The trainer's step, and the updates that the average counts",
    value: integer,
    axis: (value) => new Intl.NumberFormat("en", { notation: "compact" }).format(value),
    curves: (history) => [
      ["step", history.columns.step],
      ["num_updates", counted(history.columns.num_updates)],
    ],
  },
  { title: "Update rate", hint: "Updates per second", value: perSecond, axis: plain, curves: column("rate") },
  {
    title: "Received",
    hint: "Bytes of pushes per second",
    value: (value) => `${bytes(value)}/s`,
    axis: bytes,
    binary: true,
    curves: column("bytes_per_second"),
  },
  {
    title: "A push, by phase",
    hint: "Seconds that the server takes to receive, average and commit one update",
    value: duration,
    curves: (history) => ["receive", "average", "commit"].map((phase) => [phase, history.columns[`seconds_${phase}`]]),
  },
  {
    title: "Durable lag",
    hint: "Updates that a sudden end would take back",
    value: integer,
    curves: column("durable_lag"),
  },
];

/** The groups of tensors that are farthest from the parameters now. */
function farthest(groups) {
  const latest = (values) => values.findLast((value) => value !== null) ?? -1;
  const named = Object.entries(groups);
  if (named.length < 2) return [];
  return named.sort(([, a], [, b]) => latest(b) - latest(a)).slice(0, MOST_GROUPS);
}

// -1 says that the counter is off.
const counted = (values) => values.map((value) => (value === -1 ? null : value));

export class Curves {
  /** changed: called when the reader asks for another stretch of time. */
  constructor(parent, ranges, changed) {
    this.charts = CHARTS.map((each) => [each, new Chart(parent, { ...each, sync: "run" })]);
    this.seconds = null;
    this.latest = null;
    this.buttons = RANGES.map(([label, seconds]) => {
      const button = element("button", "", label);
      button.type = "button";
      button.addEventListener("click", () => {
        this.seconds = seconds;
        this.press();
        changed();
      });
      ranges.append(button);
      return button;
    });
    this.press();
  }

  press() {
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(RANGES[i][1] === this.seconds)));
  }

  /** Unix seconds from which on the reader wants to see; null: all. */
  since(now) {
    return this.seconds === null ? null : Math.floor(now - this.seconds);
  }

  /** why: of a history that is null, why. */
  show(history, why) {
    if (history === this.latest && history !== null) return;
    this.latest = history;
    const none = !history || history.columns.time.length === 0;
    byId("no-curves").hidden = !none;
    const quiet = history && this.seconds !== null ? "No update in that time." : "Curves begin with the first updates.";
    say(byId("no-curves"), why ? sentence(why) : quiet);
    byId("curves").hidden = none;
    if (none) return;
    for (const [{ curves }, chart] of this.charts) chart.show(history.columns.time, curves(history));
    performance.mark("curves drawn");
  }
}
