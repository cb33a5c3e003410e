// The panels of a run's page beside the curves and the ring: each shows a part of what the service says of the run.
//
// A panel is made once in its section, and changed in place by show(). Knows how the facts are laid out. Does not know
// how they are asked for.

import { command as withAddress, getBlob, paths, root, serviceUrl, token } from "./api.js";
import { Chart } from "./charts.js";
import { element, facts, fill, line, name, say, table } from "./dom.js";
import { wellness } from "./health.js";
import { looksBack } from "./profile.js";
import { NOTHING, ago, bytes, count, decay, integer, moment, perSecond, plain, sentence } from "./words.js";

// --- is it well? -----------------------------------------------------------------------------------------------------

export class Health {
  constructor(section) {
    this.section = section;
    this.shown = null;
  }

  show(run, found, now) {
    const all = found.length
      ? found
      : [{ level: "well", title: "Healthy", why: wellness(run, now), remedy: null, command: null }];
    // Ages in the texts change every second; the cards, with a line that is being copied, stay.
    const key = JSON.stringify(all.map(({ level, title, command }) => [level, title, command]));
    if (key !== this.shown) this.section.replaceChildren(...all.map(card));
    this.shown = key;
    all.forEach(({ why, remedy }, i) => {
      say(this.section.children[i].querySelector(".why"), why);
      say(this.section.children[i].querySelector(".remedy"), remedy ?? "");
    });
  }
}

function card({ level, title, command }) {
  const made = element(
    "article",
    `finding ${level}`,
    element("h2", "", title),
    element("p", "why"),
    element("p", "remedy"),
  );
  if (command !== null) made.append(line(withAddress(command)));
  return made;
}

// --- the figures at the top ------------------------------------------------------------------------------------------

export class Figures {
  constructor(list) {
    this.list = list;
  }

  show(run, rate, history) {
    const distance = history?.columns.distance.findLast((value) => value !== null);
    facts(this.list, [
      ["Step", integer(run.step)],
      ["Updates counted", run.use_num_updates ? integer(run.num_updates) : "counter off"],
      ["Effective decay", decay(run.effective_decay)],
      ["Distance", plain(distance)],
      ["Update rate", rate === null ? NOTHING : perSecond(rate)],
      ["Durable step", run.durable_step === null ? (run.step === null ? NOTHING : "none") : integer(run.durable_step)],
    ]);
  }
}

// --- averages --------------------------------------------------------------------------------------------------------

export class Averages {
  constructor(section) {
    this.table = table("Averages", [
      "Name",
      "Schedule",
      ["Decay", "number"],
      ["Effective", "number"],
      ["Half of it from the latest", "number"],
    ]);
    section.append(this.table);
    this.chart = new Chart(section, {
      title: "How far back they look",
      hint: "Share of the average (upwards) that its latest updates have (to the right, so many)",
      value: (share) => `${Math.round(100 * share)} %`,
      time: false,
      logarithmicX: true,
    });
  }

  show(run) {
    const { ago: back, shares, halves } = looksBack(run.averages, run.use_num_updates);
    fill(
      this.table,
      run.averages.map((average, i) => [
        name(average.name),
        schedule(average),
        decay(average.decay),
        decay(average.effective_decay),
        halves[i] ? updates(halves[i]) : NOTHING,
      ]),
    );
    const drawn = run.averages.map((average, i) => [average.name, shares[i]]).filter(([, share]) => share !== null);
    this.chart.show(back, drawn);
  }
}

const updates = (number) => `${count(number)} ${number === 1 ? "update" : "updates"}`;

function schedule(average) {
  const said = [
    ["half-life", average.half_life],
    ["σ_rel", average.sigma_rel],
    ["from", average.start],
  ];
  const given = said.filter(([, value]) => value !== null && value !== undefined);
  return [average.schedule, ...given.map(([word, value]) => `${word} ${plain(value, 4)}`)].join(", ");
}

// --- what happened ---------------------------------------------------------------------------------------------------

export class Timeline {
  constructor(section) {
    this.list = element("ol", "timeline");
    this.list.tabIndex = 0; // scrolls where it is long, for who has no pointer too
    this.none = element("p", "muted", "Nothing but updates so far.");
    section.append(this.none, this.list);
  }

  show(timeline) {
    const entries = [...(timeline?.entries ?? [])].reverse();
    this.none.hidden = entries.length > 0;
    const key = JSON.stringify(entries);
    if (key === this.key) return;
    this.key = key;
    this.list.replaceChildren(...entries.map(entry));
  }
}

function entry({ time, kind, step, text }) {
  const when = element("time", "muted", moment(time));
  const where = step === null ? "" : ` · step ${integer(step)}`;
  const made = element("li", "", element("p", "", sentence(text)), element("p", "muted", when, where));
  made.dataset.kind = kind;
  return made;
}

// --- weights to take away --------------------------------------------------------------------------------------------

// Larger ones than this are not fetched into the page, which has no other way to send the token: the lines do it.
const BLOB_BYTES = 512 * 2 ** 20;

export class Weights {
  constructor(section) {
    this.of = null; // the snapshot that the lines are for; null: the current weights
    this.table = table("Snapshots", ["Name", ["Step", "number"], "Version", ["Size", "number"], "Kept", "Taken", "Weights"]);
    this.note = element("p", "muted");
    this.chooser = element("select");
    this.chooser.addEventListener("change", () => {
      this.of = this.chooser.value || null;
      this.showLines();
    });
    this.lines = element("div", "lines");
    section.append(this.table, this.note, element("label", "choose", "Lines for ", this.chooser), this.lines);
    this.table.hidden = true;
    this.choices([]);
  }

  show(run, answer, why, now) {
    this.run = run;
    const found = [...(answer?.snapshots ?? [])].reverse();
    this.table.hidden = found.length === 0;
    say(this.note, found.length ? "" : why ? sentence(why) : "No snapshots yet.");
    fill(
      this.table,
      found.map((each) => [
        name(each.name),
        integer(each.step),
        each.version,
        bytes(each.bytes),
        each.stored === "store" ? "object store" : "server",
        ago(now - each.created_at),
        download(each),
      ]),
      (row) =>
        row
          .slice(0, 6)
          .map((each) => each.textContent ?? each)
          .join("\u0000") + (token() ? "t" : ""),
    );
    this.choices(found.map((each) => each.name));
    this.showLines();
  }

  choices(names) {
    if (!names.includes(this.of)) this.of = null;
    const key = names.join();
    if (this.chooser.dataset.key === key && this.chooser.options.length) return;
    this.chooser.dataset.key = key;
    this.chooser.replaceChildren(
      new Option("the current EMA", ""),
      ...names.map((each) => new Option(`snapshot ${each}`, each)),
    );
    this.chooser.value = this.of ?? "";
  }

  showLines() {
    const wanted = linesFor(this.run.run, this.of);
    const key = JSON.stringify(wanted);
    if (this.lines.dataset.key === key) return;
    this.lines.dataset.key = key;
    this.lines.replaceChildren(...wanted.flatMap(([title, text]) => [element("h3", "", title), line(text)]));
  }
}

/** Titles and lines that fetch weights: with a placeholder for the token, where the service wants one. */
function linesFor(run, snapshot) {
  const path = snapshot === null ? `${paths.run(run)}/weights` : paths.snapshotWeights(run, snapshot);
  const file = snapshot === null ? `${run}.safetensors` : `${run}-${snapshot}.safetensors`;
  const given = token() ? ` -H "Authorization: Bearer $EMA_SERVICE_TOKEN"` : "";
  const of = snapshot === null ? "" : ` --snapshot ${snapshot}`;
  const also = snapshot === null ? "" : `, snapshot="${snapshot}"`;
  const lines = [
    ["ema", withAddress(`ema pull ${run}${of} -o ${file}`)],
    ["curl", `curl -fo ${file}${given} ${new URL(path, root).href}`],
    ["Python", `from ema_client import EmaClient\n\nweights = EmaClient("${serviceUrl}").pull("${run}"${also})`],
  ];
  return token() ? [["Token", "export EMA_SERVICE_TOKEN=YOUR-TOKEN  # for all of these"], ...lines] : lines;
}

function download(snapshot) {
  const path = paths.snapshotWeights(snapshot.run, snapshot.name);
  const file = `${snapshot.run}-${snapshot.name}.safetensors`;
  if (!token()) return link(new URL(path, root).href, file);
  if (snapshot.bytes > BLOB_BYTES) return "by a line below";
  const button = element("button", "plain", "download");
  button.type = "button";
  button.setAttribute("aria-label", `download ${file}`);
  button.addEventListener("click", () => fetchAndSave(button, path, file));
  return button;
}

// A link cannot carry the token: the page fetches the weights with it, and saves them.
async function fetchAndSave(button, path, file) {
  button.disabled = true;
  try {
    const found = URL.createObjectURL(await getBlob(path));
    link(found, file).click();
    setTimeout(() => URL.revokeObjectURL(found), 60_000);
    say(button, "download");
  } catch (fault) {
    say(button, `failed: ${fault.message}`);
  }
  button.disabled = false;
}

function link(href, file) {
  const made = element("a", "", "download");
  made.href = href;
  made.download = file;
  made.setAttribute("aria-label", `download ${file}`);
  return made;
}

// --- tensors ---------------------------------------------------------------------------------------------------------

const ROWS = 20;

export class Layout {
  constructor(section) {
    this.query = element("input");
    Object.assign(this.query, {
      type: "search",
      placeholder: "Part of a name",
      spellcheck: false,
      autocomplete: "off",
    });
    this.order = element(
      "select",
      "",
      new Option("in the run's order", "order"),
      new Option("farthest first", "distance"),
      new Option("largest first", "size"),
    );
    this.summary = element("p", "muted");
    this.summary.setAttribute("aria-live", "polite");
    this.table = table("Tensors", ["Name", "Shape", "Dtype", ["Elements", "number"], ["Distance", "number"]]);
    this.more = element("button", "", "Show more");
    this.more.type = "button";
    this.table.hidden = this.more.hidden = true;
    this.rows = ROWS;
    const tools = element(
      "div",
      "tools",
      element("label", "grow", element("span", "", "Search"), this.query),
      element("label", "", element("span", "", "Sort by"), this.order),
    );
    section.append(tools, this.table, this.summary, this.more);
    this.query.addEventListener("input", () => this.again());
    this.order.addEventListener("change", () => this.again());
    this.more.addEventListener("click", () => {
      this.rows += 4 * ROWS;
      this.showRows();
    });
  }

  again() {
    this.rows = ROWS;
    this.showRows();
  }

  show(layout, distances) {
    if (!layout || (layout === this.layout && distances === this.distances)) return;
    this.layout = layout;
    this.distances = distances;
    const copied = new Set(layout.copied);
    this.tensors = layout.layout.map((each) => ({
      ...each,
      size: each.shape.reduce((product, length) => product * length, 1),
      distance: distances?.tensors[each.name] ?? null,
      copied: copied.has(each.name),
    }));
    this.showRows();
  }

  showRows() {
    if (!this.tensors) return;
    const words = this.query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.tensors.filter((each) => words.every((word) => each.name.toLowerCase().includes(word)));
    const key = this.order.value;
    if (key !== "order") found.sort((a, b) => (b[key] ?? -1) - (a[key] ?? -1));
    const shown = found.slice(0, this.rows);
    fill(
      this.table,
      shown.map((each) => [
        name(each.name),
        each.shape.length ? each.shape.join(" × ") : "scalar",
        each.dtype,
        integer(each.size),
        each.copied ? "copied" : plain(each.distance),
      ]),
    );
    this.table.hidden = shown.length === 0;
    this.more.hidden = shown.length === found.length;
    say(
      this.summary,
      found.length
        ? `${integer(shown.length)} of ${integer(this.tensors.length)} tensors`
        : "No tensor has such a name.",
    );
  }
}

// --- the run and the server ------------------------------------------------------------------------------------------

export class Facts {
  constructor(section) {
    this.meters = element("div", "meters");
    this.list = element("dl", "facts");
    section.append(this.meters, this.list);
    this.memory = new Meter(this.meters, "Memory of the server");
    this.disk = new Meter(this.meters, "Disk of its data");
  }

  show(run, server) {
    this.memory.show(server?.memory_bytes, server?.memory_limit_bytes);
    this.disk.show(
      server?.disk_total_bytes ? server.disk_total_bytes - server.disk_free_bytes : null,
      server?.disk_total_bytes,
    );
    facts(this.list, [
      ["Shadows of this run", bytes(run.bytes)],
      ["Parameters", integer(run.parameters)],
      ["Tensors", run.copied ? `${integer(run.tensors)}, ${integer(run.copied)} of them copied` : integer(run.tensors)],
      ["Shadow", `${run.shadow_dtype} on ${run.device}`],
      ["Durability", run.durability],
      ["Versions are kept in", run.versions_in ?? "nothing that outlives the server"],
      ["Checkpoint on disk", run.checkpoint_step === null ? "none" : `step ${integer(run.checkpoint_step)}`],
      ["Version", run.version ?? "none"],
      ["Decay per", run.decay_per],
      ["NaN or Inf", run.non_finite === "refuse" ? "refused" : "allowed"],
      ["Trainer", run.writer ? `writer ${integer(run.writer)}` : "none attached"],
      ["Pushes arrive by", run.link ?? "none since the server's start"],
      ["Created", moment(run.created_at)],
      ["Changed", moment(run.updated_at)],
      ["Hosts", server?.hosts ? integer(server.hosts) : null],
      ["Server", server ? `${server.name ?? "ema-service"} ${server.version}` : null],
      ["Python, torch", server?.torch ? `${server.python}, ${server.torch}` : null],
      ["Data dir", server?.data_dir_bytes ? `${bytes(server.data_dir_bytes)} of all runs` : null],
    ]);
  }
}

/** How much of a limit is used. */
class Meter {
  constructor(parent, title) {
    this.text = element("span");
    this.bar = element("span", "bar", element("span"));
    this.bar.setAttribute("role", "meter");
    this.bar.setAttribute("aria-label", title);
    this.bar.setAttribute("aria-valuemin", "0");
    this.bar.setAttribute("aria-valuemax", "100");
    this.node = element("div", "meter", element("p", "", element("b", "", title), " ", this.text), this.bar);
    parent.append(this.node);
  }

  show(used, limit) {
    this.node.hidden = !limit || used === null || used === undefined;
    if (this.node.hidden) return;
    const share = Math.min(100, Math.round((100 * used) / limit));
    say(this.text, `${bytes(used)} of ${bytes(limit)}`);
    this.bar.setAttribute("aria-valuenow", String(share));
    this.bar.setAttribute("aria-valuetext", this.text.textContent);
    this.bar.firstChild.style.width = `${share}%`;
    this.bar.dataset.level = share >= 95 ? "bad" : share >= 85 ? "warn" : "well";
  }
}
