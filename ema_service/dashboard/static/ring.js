// The ring of a run: what any average would be worked out of, and how exactly.
//
// Knows rings and the answers of GET …/profiles. Does not know how weights are found, or what sweeps are (sweeps.js).

import { Missing, command, get, paths } from "./api.js";
import { element, fill, line, say, table } from "./dom.js";
import { Sweeps } from "./sweeps.js";
import { bytes, integer, plain } from "./words.js";

/** Lengths that are asked for: relative standard deviations, from short to long. */
const LENGTHS = [0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25];
const EVERY_MS = 30_000;

export class Ring {
  constructor(section) {
    this.section = section;
    this.asked = -EVERY_MS;
    this.summary = element("p", "muted");
    this.strip = element("div", "strip");
    this.strip.setAttribute("role", "img");
    this.table = table("Lengths that can be had", [
      "σ_rel",
      ["Looks back", "number"],
      ["Profile error", "number"],
      ["Sources", "number"],
      ["To have it", "wide"],
    ]);
    section.append(this.summary, this.strip, this.table);
    this.sweeps = new Sweeps(section);
  }

  show(run) {
    this.section.hidden = !run.ring;
    if (!run.ring) return;
    this.showStrip(run);
    if (this.version === run.version || performance.now() - this.asked < EVERY_MS) return;
    this.asked = performance.now();
    this.version = run.version;
    this.showLengths(run.run);
  }

  /** One length after the other: each may take the server a second, and nobody waits for them. */
  async showLengths(run) {
    const rows = [];
    for (const length of LENGTHS) {
      const found = await profile(run, length);
      if (found === null) return; // the next look at the run says what is wrong
      rows.push(row(run, length, found));
    }
    fill(this.table, rows);
  }

  /** Where in the training the stored averages lie. */
  showStrip(run) {
    const { times, begin, snapshots, bytes: size, waiting } = run.ring;
    const now = Math.max(1, ...run.averages.map((average) => average.num_updates), ...times);
    const text =
      `${times.length} of ${snapshots} snapshots in the ring, ${bytes(size)}` +
      `${waiting ? `, ${waiting} being stored` : ""}; tracked lengths σ_rel ${run.ring.sigma_rel.join(", ")}.`;
    say(this.summary, text);
    this.strip.setAttribute(
      "aria-label",
      `Stored at updates ${times.map(integer).join(", ") || "none yet"}, of ${integer(now)}`,
    );
    const at = [...(begin === null ? [] : [begin]), ...times];
    if (this.strip.dataset.times === at.join() + now) return;
    this.strip.dataset.times = at.join() + now;
    this.strip.replaceChildren(
      ...at.map((time) => {
        const mark = element("i");
        mark.style.left = `${(100 * time) / now}%`;
        mark.title = `update ${integer(time)}`;
        return mark;
      }),
    );
  }
}

async function profile(run, length) {
  try {
    return (await get(paths.profiles(run, length))).body;
  } catch (fault) {
    return fault instanceof Missing ? { refused: fault.message } : null;
  }
}

function row(run, length, found) {
  const back = found.num_updates ? `${plain(length * found.num_updates)} updates` : "";
  if (found.refused) {
    return [
      String(length),
      back,
      element("span", "muted", "not near enough"),
      "",
      element("span", "muted", found.refused),
    ];
  }
  return [
    String(length),
    back,
    plain(found.error, 2),
    String(found.sources.length),
    line(command(`ema pull ${run} --sigma-rel ${length} -o ${run}-${length}.safetensors`)),
  ];
}
