// The dashboard: asks GET /v1/runs every two seconds and shows the answer.
//
// Rows are kept and changed in place, so that focus, selection and open details survive. Everything that came from the
// server enters the page as text (textContent), never as markup: the names of runs and tensors are a stranger's words.

const POLL_MS = 2000;
const TIMEOUT_MS = 5000;
// 60 points of two seconds: the sparkline shows the last two minutes.
const HISTORY = 60;
// The rate is a mean over this many polls; one poll alone jumps about.
const RATE_POLLS = 5;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const views = new Map(); // run name -> RunView
let lastAnswer = null; // when the server last answered, by this machine's clock
let clockSkew = 0; // the server's clock minus ours, in ms

// --- the token, where the server asks for one ------------------------------------------------------------------------

// In this tab only, and never in a URL: those end up in logs and histories.
const TOKEN = "ema-token";
const token = () => sessionStorage.getItem(TOKEN);

function ask(path) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  return fetch(path, { headers, signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
}

function signIn(why) {
  sessionStorage.removeItem(TOKEN);
  if (!byId("sign-in").hidden) return; // the reader may be typing
  say(byId("refusal"), `${why[0].toUpperCase()}${why.slice(1)}.`);
  byId("sign-in").hidden = false;
  byId("link").dataset.state = "lost";
  say(byId("link"), "token wanted");
  showRuns([], performance.now());
  byId("empty").hidden = true;
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("token").value.trim();
  byId("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(given)) {
    say(byId("refusal"), "A token is one word of plain characters.");
    return;
  }
  sessionStorage.setItem(TOKEN, given);
  byId("sign-in").hidden = true;
  poll();
});

// --- words for numbers ---------------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en");

function scaled(value, units, base = 1000) {
  let unit = 0;
  while (value >= base && unit < units.length - 1) {
    value /= base;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0;
  return `${value.toFixed(digits)} ${units[unit]}`.trim();
}

const count = (value) => scaled(value, ["", "K", "M", "B", "T"]);
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"]);
const integer = (value) => (value === null ? "–" : whole.format(value));
// Decays are float32 on the server: seven digits say all there is.
const decay = (value) => (value === null ? "–" : String(Number(value.toPrecision(7))));

function perSecond(rate) {
  if (rate === null) return "–";
  return rate === 0 ? "0" : rate < 10 ? rate.toFixed(2) : rate.toFixed(1);
}

function ago(seconds) {
  if (seconds < 1.5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

const serverNow = () => (Date.now() + clockSkew) / 1000;
const clock = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB");

// --- building blocks -----------------------------------------------------------------------------------------------

function element(tag, className = "", text = null) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}

// Writing the same text again would throw away the reader's selection.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function cell(row, className = "", tag = "td") {
  const made = element(tag, className);
  const main = element("span", "main");
  const sub = element("span", "sub");
  made.append(main, sub);
  row.append(made);
  return { node: made, main, sub };
}

function sparkline(parent, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const line = document.createElementNS(SVG, "polyline");
  svg.append(line);
  parent.append(svg);
  return line;
}

function drawSparkline(line, values) {
  const top = Math.max(...values, 1e-9);
  const left = 100 - (100 * (values.length - 1)) / (HISTORY - 1);
  const points = values.map((value, i) => {
    const x = left + (100 * i) / (HISTORY - 1);
    return `${x.toFixed(1)},${(22 - (20 * value) / top).toFixed(1)}`;
  });
  line.setAttribute("points", points.join(" "));
}

function table(name, headings) {
  const made = element("table", "inner");
  made.setAttribute("aria-label", name);
  const head = made.createTHead().insertRow();
  for (const [text, className] of headings) {
    const th = element("th", className ?? "", text);
    th.scope = "col";
    head.append(th);
  }
  made.append(element("tbody"));
  return made;
}

function fill(made, rows) {
  const body = made.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((texts, i) => {
    const row = body.rows[i] ?? body.insertRow();
    texts.forEach((text, j) => {
      const td = row.cells[j] ?? row.insertCell();
      td.className = made.tHead.rows[0].cells[j].className;
      if (text instanceof Node) {
        if (td.firstChild?.href !== text.href) td.replaceChildren(text);
      } else say(td, text);
    });
  });
}

// --- how fast a run is updated -------------------------------------------------------------------------------------

// Counts applied updates: "epoch.n". num_updates would not do: it is -1 for a run without the counter, and it can be reset.
function applied(version) {
  if (version === null) return null;
  const [epoch, n] = version.split(".");
  return { epoch, n: Number(n) };
}

class Rate {
  constructor() {
    this.points = []; // {at, n}
    this.history = []; // updates per second between two polls
  }

  see(at, version) {
    const now = applied(version);
    const last = this.points.at(-1);
    if (now === null || (last && (last.epoch !== now.epoch || now.n < last.n))) this.points = [];
    else if (last) this.history.push((1000 * (now.n - last.n)) / Math.max(1, at - last.at));
    if (now !== null) this.points.push({ at, ...now });
    this.points = this.points.slice(-RATE_POLLS - 1);
    this.history = this.history.slice(-HISTORY);
  }

  get now() {
    if (this.points.length < 2) return null;
    const [first, last] = [this.points[0], this.points.at(-1)];
    return (1000 * (last.n - first.n)) / Math.max(1, last.at - first.at);
  }
}

// --- one run -------------------------------------------------------------------------------------------------------

const STATUS = { ready: "ready", awaiting_weights: "awaiting weights", degraded: "degraded" };
const FACTS = [
  ["Durability", (run) => run.durability],
  ["Versions are kept in", (run) => run.versions_in ?? "nothing that outlives the server"],
  ["Checkpoint on disk", (run) => (run.checkpoint_step === null ? "none" : `step ${integer(run.checkpoint_step)}`)],
  ["Counter", (run) => (run.use_num_updates ? "on" : "off")],
  ["Decay per", (run) => run.decay_per],
  ["NaN or Inf", (run) => (run.non_finite === "refuse" ? "refused" : "allowed")],
  ["Tensors", (run) => integer(run.tensors)],
  ["Parameters", (run) => integer(run.parameters)],
  ["Bytes of shadows", (run) => integer(run.bytes)],
  ["Created", (run) => clock(run.created_at)],
  ["Changed", (run) => clock(run.updated_at)],
];

class RunView {
  constructor(run) {
    this.created = run.created_at;
    this.rate = new Rate();
    this.body = element("tbody", "run");
    this.row = this.body.insertRow();
    this.buildRow(run.run);
    this.details = null;
  }

  buildRow(name) {
    const heading = element("th", "name");
    heading.scope = "row";
    this.button = element("button", "toggle");
    this.button.type = "button";
    this.button.setAttribute("aria-expanded", "false");
    const title = element("bdi", "title", name);
    title.title = name;
    this.button.append(element("span", "arrow"), title);
    this.button.addEventListener("click", () => this.toggle());
    this.badge = element("span", "badge");
    this.averages = element("span", "sub averages");
    heading.append(this.button, this.badge, this.averages);
    this.row.append(heading);
    this.step = cell(this.row, "number");
    this.updates = cell(this.row, "number");
    this.decay = cell(this.row, "number");
    this.speed = cell(this.row, "number rate");
    this.line = sparkline(this.speed.sub, "Updates per second over the last two minutes");
    this.size = cell(this.row, "number");
    this.device = cell(this.row);
    this.age = cell(this.row);
  }

  show(run, at) {
    this.run = run;
    this.rate.see(at, run.version);
    say(this.badge, STATUS[run.status] ?? run.status);
    this.badge.dataset.status = run.status;
    say(this.averages, run.averages.map((average) => average.name).join(", "));
    say(this.step.main, integer(run.step));
    say(this.step.sub, run.durable_step === null ? "none durable" : `durable ${integer(run.durable_step)}`);
    say(this.updates.main, run.use_num_updates ? integer(run.num_updates) : "counter off");
    say(this.updates.sub, run.version === null ? "no version" : `version ${run.version}`);
    say(this.decay.main, decay(run.effective_decay));
    say(this.decay.sub, `of ${decay(run.decay)}`);
    say(this.size.main, count(run.parameters));
    say(this.size.sub, bytes(run.bytes));
    say(this.device.main, run.device);
    say(this.device.sub, run.shadow_dtype);
    say(this.speed.main, this.rate.now === null ? "–" : `${perSecond(this.rate.now)} /s`);
    drawSparkline(this.line, this.rate.history);
    this.tick();
    if (this.details) this.showDetails();
  }

  // Ages grow between two answers as well.
  tick() {
    const waiting = this.run.status === "awaiting_weights";
    say(this.age.main, ago(serverNow() - this.run.updated_at));
    say(this.age.sub, waiting ? "since creation" : this.run.step === null ? "initial weights" : "");
  }

  toggle() {
    const open = this.details === null;
    this.button.setAttribute("aria-expanded", String(open));
    this.body.classList.toggle("open", open);
    if (open) this.openDetails();
    else {
      this.details.row.remove();
      this.details = null;
    }
  }

  openDetails() {
    const row = this.body.insertRow();
    row.className = "details";
    const holder = element("td");
    holder.colSpan = this.row.cells.length;
    const facts = element("dl", "facts");
    for (const [name] of FACTS) {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd"));
      facts.append(pair);
    }
    const averages = table("Averages", [["Name"], ["Schedule"], ["Decay", "number"], ["Effective", "number"]]);
    const snapshots = table("Snapshots", [
      ["Name"], ["Step", "number"], ["Version"], ["Size", "number"], ["Taken"], ["Weights"],
    ]);
    const note = element("p", "muted note");
    const left = element("section");
    left.append(element("h2", "", "Averages"), averages);
    const right = element("section");
    right.append(element("h2", "", "Snapshots"), snapshots, note);
    const columns = element("div", "columns");
    columns.append(left, right);
    holder.append(facts, columns);
    row.append(holder);
    this.details = { row, facts, averages, snapshots, note };
    this.showDetails();
  }

  showDetails() {
    const { facts, averages } = this.details;
    FACTS.forEach(([, value], i) => say(facts.children[i].lastChild, value(this.run)));
    fill(averages, this.run.averages.map((a) => [a.name, a.schedule, decay(a.decay), decay(a.effective_decay)]));
    this.showSnapshots();
  }

  async showSnapshots() {
    const details = this.details;
    const path = `v1/runs/${encodeURIComponent(this.run.run)}/snapshots`;
    let found = [];
    let note = "";
    try {
      const answer = await ask(path);
      const body = await answer.json();
      if (answer.ok) found = body.snapshots;
      else note = body.detail;
    } catch {
      return; // the poll of the runs says that the server is gone
    }
    details.snapshots.hidden = found.length === 0;
    say(details.note, note || (found.length ? "" : "No snapshots yet."));
    fill(details.snapshots, found.map((snapshot) => [
      snapshot.name,
      integer(snapshot.step),
      snapshot.version,
      bytes(snapshot.bytes),
      ago(serverNow() - snapshot.created_at),
      download(`${path}/${encodeURIComponent(snapshot.name)}/weights`, `${snapshot.run}-${snapshot.name}.safetensors`),
    ]));
  }
}

function download(href, name) {
  // A link cannot carry the token, and fetching gigabytes into the page to save them would not do.
  if (token()) return "by ema pull";
  const link = element("a", "", "download");
  link.href = href;
  link.download = name;
  link.setAttribute("aria-label", `download ${name}`);
  return link;
}

// --- all runs ------------------------------------------------------------------------------------------------------

function showRuns(runs, at) {
  const ordered = [...runs].sort((a, b) => b.created_at - a.created_at || (a.run < b.run ? -1 : 1));
  const named = new Map(ordered.map((run) => [run.run, run]));
  for (const [name, view] of views) {
    // A run of the same name that was deleted and created anew is another run.
    if (named.get(name)?.created_at !== view.created) {
      view.body.remove();
      views.delete(name);
    }
  }
  const board = byId("board").querySelector("table");
  ordered.forEach((run, i) => {
    const view = views.get(run.run) ?? new RunView(run);
    views.set(run.run, view);
    if (board.tBodies[i] !== view.body) board.insertBefore(view.body, board.tBodies[i] ?? null);
    view.show(run, at);
  });
  byId("board").hidden = runs.length === 0;
  byId("empty").hidden = runs.length > 0;
  showTotals(runs);
}

function showTotals(runs) {
  const sum = (of) => runs.reduce((total, run) => total + of(run), 0);
  byId("totals").hidden = runs.length === 0;
  say(byId("total-runs"), integer(runs.length));
  say(byId("total-parameters"), count(sum((run) => run.parameters)));
  say(byId("total-bytes"), bytes(sum((run) => run.bytes)));
  const known = runs.some((run) => views.get(run.run).rate.now !== null);
  say(byId("total-rate"), known ? perSecond(sum((run) => views.get(run.run).rate.now ?? 0)) : "–");
}

function connected(answer) {
  const date = Date.parse(answer.headers.get("Date") ?? "");
  // The header has whole seconds: a smaller difference than two is none.
  const skew = Number.isNaN(date) ? 0 : date - Date.now();
  clockSkew = Math.abs(skew) < 2000 ? 0 : skew;
  lastAnswer = Date.now();
  document.body.classList.remove("stale");
  byId("lost").hidden = true;
  byId("link").dataset.state = "live";
  say(byId("link"), "live");
}

function lost(why) {
  document.body.classList.add("stale");
  byId("link").dataset.state = "lost";
  say(byId("link"), "no connection");
  const since = lastAnswer === null ? "" : ` The numbers are those of ${new Date(lastAnswer).toLocaleTimeString("en-GB")}.`;
  say(byId("lost"), `The server does not answer (${why}).${since} Trying again every two seconds.`);
  byId("lost").hidden = false;
}

async function askForRuns() {
  const answer = await ask("v1/runs");
  const body = await answer.json();
  const refused = answer.status === 401 || answer.status === 403;
  if (!answer.ok && !refused) throw new Error(body.detail ?? `status ${answer.status}`);
  return { answer, body, refused };
}

async function poll() {
  let got;
  try {
    got = await askForRuns();
  } catch (fault) {
    // What fetch says of a refused connection ("Failed to fetch") is a TypeError in every browser, in words of its own.
    const why = { TimeoutError: "it took more than five seconds", TypeError: "no connection" };
    lost(why[fault.name] ?? fault.message);
    return;
  }
  connected(got.answer);
  if (got.refused) {
    signIn(got.body.detail);
    return;
  }
  showRuns(got.body.runs, performance.now());
}

async function watch() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

byId("example").textContent = [
  "from ema_client import RemoteEma",
  "",
  `ema = RemoteEma(model, decay=0.9999, run="my-run", url="${new URL(".", location.href).href.replace(/\/$/, "")}")`,
  "for batch in batches:",
  "    train_step(model, batch)",
  "    ema(model)",
].join("\n");
document.addEventListener("visibilitychange", () => document.hidden || poll());
setInterval(() => views.forEach((view) => view.tick()), 1000);
watch();
