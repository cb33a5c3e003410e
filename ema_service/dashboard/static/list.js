// The list of runs: asks GET /v1/runs every two seconds, and shows the page of it that the reader wants.
//
// Data flow one way: what was asked for (the address's query) and what the service says become rows. Knows the list's
// columns and tools. Does not know what makes a run sick (health.js), or how the service is reached (frame.js).

import { Missing, get, pageOf, paths, serviceUrl } from "./api.js";
import { Spark } from "./charts.js";
import { byId, element, facts, name, say } from "./dom.js";
import { follow, server, serverNow } from "./frame.js";
import { LEVELS, findings, worst } from "./health.js";
import { Rate, applied } from "./rate.js";
import { NOTHING, ago, bytes, count, decay, integer, perSecond, plain } from "./words.js";

const PAGE = 20;
// The line of a run's distances, and how often a run that moved is asked for a newer one.
const SPARK_POINTS = 40;
const SPARK_MS = 30_000;

const STATUS = { ready: "ready", awaiting_weights: "awaiting weights", degraded: "degraded" };

const newest = (a, b) => b.run.created_at - a.run.created_at;
const by = (value) => (a, b) => value(b) - value(a) || newest(a, b);
const attention = (view) => LEVELS.length - (view.worst ? LEVELS.indexOf(view.worst.level) : LEVELS.length);

/** Columns by key: heading, class, and the order that a sort by the column gives. */
const COLUMNS = [
  ["name", "Run", "", (a, b) => (a.run.run < b.run.run ? -1 : 1)],
  ["step", "Step", "number", by((view) => view.run.step ?? -1)],
  ["updates", "Updates", "number", by((view) => applied(view.run.version)?.n ?? -1)],
  ["decay", "Decay", "number", by((view) => view.run.effective_decay ?? -1)],
  ["distance", "Distance", "number", by((view) => view.distance ?? -1)],
  ["rate", "Rate", "number", by((view) => view.rate.now ?? -1)],
  ["size", "Size", "number", by((view) => view.run.bytes)],
  ["latest", "Last update", "", by((view) => view.run.updated_at)],
];
const ORDERS = new Map([
  ["attention", ["attention, then newest", by(attention)]],
  ...COLUMNS.map(([key, heading, , order]) => [key, [heading.toLowerCase(), order]]),
]);

const views = new Map(); // name of a run -> RunView

// --- what the reader wants: kept in the address, so that a reload and a link show the same ---------------------------

const DEFAULTS = { query: "", filter: "all", sort: "attention", page: "1" };

function wanted() {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(Object.entries(DEFAULTS).map(([key, value]) => [key, query.get(key) ?? value]));
}

function want(change) {
  const next = { ...wanted(), page: "1", ...change };
  const query = new URLSearchParams(Object.entries(next).filter(([key, value]) => value !== DEFAULTS[key]));
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  show();
}

function chosen(all) {
  const { query, filter, sort } = wanted();
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (run) => [run.run, ...run.averages.map((average) => average.name)].join(" ").toLowerCase();
  const fits =
    {
      all: () => true,
      attention: (view) => view.worst !== null,
    }[filter] ?? ((view) => view.run.status === filter);
  const found = all.filter((view) => fits(view) && words.every((word) => text(view.run).includes(word)));
  return found.sort((ORDERS.get(sort) ?? ORDERS.get("attention"))[1]);
}

// --- one run ---------------------------------------------------------------------------------------------------------

class RunView {
  constructor(run) {
    this.created = run.created_at;
    this.rate = new Rate();
    this.history = null;
    this.asked = -SPARK_MS;
    this.seen = null; // the version that the history is of
  }

  see(run, facts, at) {
    this.run = run;
    this.rate.see(at, run.version);
    this.judge(facts);
  }

  judge(facts) {
    this.worst = worst(findings(this.run, this.history, facts, serverNow()));
  }

  get distance() {
    return this.history?.columns.distance.findLast((value) => value !== null) ?? null;
  }

  /** The row, made when it is first shown. */
  get row() {
    this.cells ??= this.build();
    return this.cells.row;
  }

  build() {
    const row = element("tr");
    const heading = element("th", "name");
    heading.scope = "row";
    const link = element("a", "title", name(this.run.run));
    link.href = pageOf(this.run.run);
    const status = element("span", "badge");
    const trouble = element("span", "badge");
    const averages = element("span", "sub");
    heading.append(link, element("span", "marks", status, trouble, averages));
    row.append(heading);
    const cells = { row, status, trouble, averages };
    for (const [key, label, className] of COLUMNS.slice(1)) {
      const cell = element("td", `${className} ${key}`);
      cell.dataset.label = label;
      cells[key] = { main: element("span", "main"), sub: element("span", "sub") };
      cell.append(cells[key].main, cells[key].sub);
      row.append(cell);
    }
    return cells;
  }

  show() {
    const { run, cells } = this;
    say(cells.status, STATUS[run.status] ?? run.status);
    cells.status.dataset.status = run.status;
    // "degraded" is said once.
    cells.trouble.hidden = this.worst === null || run.status === "degraded";
    say(cells.trouble, this.worst?.title ?? "");
    cells.trouble.dataset.status = this.worst?.level ?? "";
    say(cells.averages, run.averages.map((average) => average.name).join(", "));
    const tell = (key, main, sub) => {
      say(cells[key].main, main);
      say(cells[key].sub, sub);
    };
    tell("step", integer(run.step), durable(run));
    tell(
      "updates",
      run.use_num_updates ? integer(run.num_updates) : "counter off",
      run.version ? `version ${run.version}` : "no version",
    );
    tell("decay", decay(run.effective_decay), `of ${decay(run.decay)}`);
    say(cells.distance.main, plain(this.distance));
    tell("rate", this.rate.now === null ? NOTHING : perSecond(this.rate.now), run.durability);
    tell("size", count(run.parameters), bytes(run.bytes));
    this.tick();
  }

  // Ages grow between two answers as well.
  tick() {
    const { run, cells } = this;
    say(cells.latest.main, ago(serverNow() - run.updated_at));
    say(cells.latest.sub, run.version === null ? "since creation" : run.step === null ? "initial weights" : run.device);
  }

  /** Ask for the run's distances, where the run moved since they were last asked for. */
  async look(facts) {
    if (this.seen === this.run.version || performance.now() - this.asked < SPARK_MS) return;
    this.asked = performance.now();
    try {
      this.history = (await get(paths.history(this.run.run, SPARK_POINTS))).body;
      this.seen = this.run.version;
    } catch (fault) {
      if (!(fault instanceof Missing)) return; // the next look at the runs says what is wrong
    }
    this.judge(facts);
    this.show();
    if (this.distance === null) return;
    this.spark ??= new Spark(this.cells.distance.sub, "Distance of average and parameters over time");
    this.spark.show(this.history.columns.time, this.history.columns.distance);
  }
}

function durable(run) {
  if (run.step === null) return "no update";
  return run.durable_step === null ? "none durable" : `durable ${integer(run.durable_step)}`;
}

// --- all runs --------------------------------------------------------------------------------------------------------

let latest = null;
let facing = null; // the server's own facts

async function look() {
  const [{ body, headers }, told] = await Promise.all([get(paths.runs), server()]);
  facing = told;
  take(body.runs);
  return headers;
}

function take(runs) {
  const named = new Map(runs.map((run) => [run.run, run]));
  for (const [key, view] of views) {
    // A run of the same name that was deleted and created anew is another run.
    if (named.get(key)?.created_at !== view.created) views.delete(key);
  }
  const at = performance.now();
  for (const run of runs) {
    if (!views.has(run.run)) views.set(run.run, new RunView(run));
    views.get(run.run).see(run, facing, at);
  }
  latest = runs;
  show();
}

function clear() {
  views.clear();
  latest = null;
  for (const id of ["totals", "tools", "board", "pages", "empty"]) byId(id).hidden = true;
  body().replaceChildren();
}

const body = () => byId("board").querySelector("tbody");

function show() {
  if (latest === null) return;
  const found = chosen([...views.values()]);
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const page = Math.min(pages, Math.max(1, Number(wanted().page) || 1));
  const shown = found.slice((page - 1) * PAGE, page * PAGE);
  showRows(shown);
  showTools(found.length, page, pages);
  showTotals();
  lookAt(shown);
}

function showRows(shown) {
  const rows = shown.map((view) => view.row);
  const present = [...body().rows];
  // Moving a row that stands where it belongs would take the focus from its link.
  if (rows.length !== present.length || rows.some((row, i) => row !== present[i])) body().replaceChildren(...rows);
  shown.forEach((view) => view.show());
}

function showTools(found, page, pages) {
  const none = latest.length === 0;
  byId("empty").hidden = !none;
  byId("board").hidden = byId("tools").hidden = none;
  byId("none").hidden = found > 0;
  byId("pages").hidden = none || pages === 1;
  byId("before").disabled = page === 1;
  byId("after").disabled = page === pages;
  say(byId("where"), `Page ${page} of ${pages}, ${integer(found)} ${found === 1 ? "run" : "runs"}`);
  const { query, filter, sort } = wanted();
  // The reader may be typing.
  if (document.activeElement !== byId("query")) byId("query").value = query;
  byId("filter").value = filter;
  byId("sort").value = sort;
  for (const th of byId("headings").cells) {
    if (th.dataset.key === sort) th.setAttribute("aria-sort", sort === "name" ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  }
}

function showTotals() {
  const all = [...views.values()];
  const sum = (of) => all.reduce((total, view) => total + of(view), 0);
  const sick = all.filter((view) => view.worst !== null).length;
  const rates = all.filter((view) => view.rate.now !== null);
  byId("totals").hidden = all.length === 0;
  facts(byId("totals"), [
    ["Runs", integer(all.length)],
    ["In need of attention", integer(sick)],
    ["Parameters", count(sum((view) => view.run.parameters))],
    facing?.memory_limit_bytes
      ? [`Memory, of ${bytes(facing.memory_limit_bytes)}`, bytes(facing.memory_bytes)]
      : ["Shadow memory", bytes(sum((view) => view.run.bytes))],
    [
      `Disk free, of ${bytes(facing?.disk_total_bytes)}`,
      facing?.disk_total_bytes ? bytes(facing.disk_free_bytes) : null,
    ],
    ["Update rate", rates.length ? perSecond(rates.reduce((total, view) => total + view.rate.now, 0)) : NOTHING],
  ]);
}

let looking = false;

// One after the other: the lines of a page of runs are not urgent, and the service has trainers to serve.
async function lookAt(shown) {
  if (looking) return;
  looking = true;
  for (const view of shown) await view.look(facing);
  looking = false;
}

// --- the tools -------------------------------------------------------------------------------------------------------

for (const [key, [label]] of ORDERS) byId("sort").append(new Option(label, key));
for (const [key, label, className] of COLUMNS) {
  const button = element("button", "heading", label);
  button.type = "button";
  button.addEventListener("click", () => want({ sort: wanted().sort === key ? "attention" : key }));
  const th = element("th", className, button);
  th.scope = "col";
  th.dataset.key = key;
  byId("headings").append(th);
}
byId("tools").addEventListener("submit", (event) => event.preventDefault());
byId("query").addEventListener("input", (event) => want({ query: event.target.value.trim() }));
byId("filter").addEventListener("change", (event) => want({ filter: event.target.value }));
byId("sort").addEventListener("change", (event) => want({ sort: event.target.value }));
byId("all").addEventListener("click", () => {
  byId("query").value = "";
  want({ query: "", filter: "all" });
});
byId("before").addEventListener("click", () => turn(-1));
byId("after").addEventListener("click", () => turn(1));

function turn(by) {
  want({ page: String((Number(wanted().page) || 1) + by) });
  byId("tools").scrollIntoView({ block: "nearest" });
}

byId("example").textContent = [
  "from ema_client import RemoteEma",
  "",
  `ema = RemoteEma(model, decay=0.9999, run="my-run", url="${serviceUrl}")`,
  "for batch in batches:",
  "    train_step(model, batch)",
  "    ema(model)",
].join("\n");

setInterval(() => [...body().rows].length && views.forEach((view) => view.cells && view.tick()), 1000);
follow(look, clear);
