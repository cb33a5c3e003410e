// The page of one run: asks for the run every two seconds, for the rest where the run moved, and hands each panel its
// part.
//
// Data flow one way: answers of the service -> panels. Knows which panels there are and what each is shown. Does not
// know how a panel shows anything (panels.js, curves.js, ring.js), or what makes a run sick (health.js).

import { Missing, get, paths, root } from "./api.js";
import { Curves } from "./curves.js";
import { byId, say } from "./dom.js";
import { follow, server, serverNow } from "./frame.js";
import { findings, worst } from "./health.js";
import { Averages, Facts, Figures, Health, Layout, Timeline, Weights } from "./panels.js";
import { Rate } from "./rate.js";
import { Ring } from "./ring.js";
import { ago, sentence } from "./words.js";

const NAME = decodeURIComponent(location.pathname.split("/").at(-1));
const STATUS = { ready: "ready", awaiting_weights: "awaiting weights", degraded: "degraded" };

/** How often each part is asked for anew while the run moves, in ms. */
const EVERY = { history: 5000, timeline: 5000, snapshots: 5000, sweeps: 5000, distances: 10_000 };
// Of a chart that is some hundred pixels wide.
const POINTS = 500;

const rate = new Rate();
const curves = new Curves(byId("curves"), byId("ranges"), stretched);
const panels = {
  health: new Health(byId("health")),
  figures: new Figures(byId("figures")),
  averages: new Averages(byId("averages")),
  timeline: new Timeline(byId("timeline")),
  ring: new Ring(byId("ring")),
  weights: new Weights(byId("weights")),
  layout: new Layout(byId("layout")),
  facts: new Facts(byId("facts")),
};

// --- parts that are asked for now and then ---------------------------------------------------------------------------

const parts = new Map(); // what is asked for -> {at, of, body, why}

/**
 * The answer at a path, asked for anew where the run moved (`of` differs) and enough time went by: {body, why}.
 *
 * body is null where there is none, and why says so. A failure is told as `why` alone: the look at the run itself, which
 * comes every two seconds, says what is wrong with the service.
 */
async function part(key, path, of, every) {
  const known = parts.get(key);
  const at = performance.now();
  if (known && (known.of === of || at - known.at < every)) return known;
  let found;
  try {
    found = { at, of, body: (await get(path)).body, why: null };
  } catch (fault) {
    found = { at, of, body: fault instanceof Missing ? null : (known?.body ?? null), why: fault.message };
  }
  parts.set(key, found);
  return found;
}

// --- the run ---------------------------------------------------------------------------------------------------------

let present = null;
let showing = false; // the rest of the page

async function look() {
  let facts;
  let answer;
  try {
    [facts, answer] = await Promise.all([server(), get(paths.run(NAME))]);
  } catch (fault) {
    if (!(fault instanceof Missing)) throw fault;
    missing(fault.message);
    return new Headers();
  }
  const run = answer.body;
  if (present && present.created_at !== run.created_at) parts.clear();
  present = run;
  rate.see(performance.now(), run.version);
  byId("missing").hidden = true;
  byId("run").hidden = false;
  showHead(run, facts);
  if (!showing) showRest(run, facts);
  return answer.headers;
}

function showHead(run, facts) {
  const history = parts.get("history")?.body ?? null;
  const found = findings(run, history, facts, serverNow());
  say(byId("status"), worst(found)?.title ?? STATUS[run.status] ?? run.status);
  byId("status").dataset.status = worst(found)?.level ?? run.status;
  byId("status").hidden = false;
  panels.health.show(run, found, serverNow());
  panels.figures.show(run, rate.now, history);
  panels.averages.show(run);
  panels.facts.show(run, facts);
  panels.ring.show(run);
  tick();
}

async function showRest(run, facts) {
  showing = true;
  const moved = `${run.version} ${run.status}`;
  // Snapshots, sweeps and decays change without a new version: their panels look again by the clock.
  const clock = Math.floor(performance.now() / EVERY.timeline);
  await Promise.all([
    part("history", paths.history(NAME, POINTS), moved, EVERY.history).then(() => {
      showHead(run, facts);
      return showCurves(moved);
    }),
    part("timeline", paths.timeline(NAME), clock, EVERY.timeline).then(({ body }) => panels.timeline.show(body)),
    snapshots(facts, clock).then(({ body, why }) => panels.weights.show(run, body, why, serverNow())),
    run.ring &&
      part("sweeps", paths.sweeps(NAME), clock, EVERY.sweeps).then(({ body }) => panels.ring.sweeps.show(run, body)),
    showTensors(moved),
  ]);
  showing = false;
}

/** Not asked for at a gateway, where each question would be an error in the browser's console. */
async function snapshots(facts, clock) {
  if (facts?.hosts) return { body: null, why: "a run on several hosts has no snapshots yet" };
  return part("snapshots", paths.snapshots(NAME), clock, EVERY.snapshots);
}

/** The findings are of the whole history; the reader may want a stretch of it. */
async function showCurves(moved) {
  const { seconds } = curves;
  const shown =
    seconds === null
      ? parts.get("history")
      : await part(
          "stretch",
          paths.history(NAME, POINTS, curves.since(serverNow())),
          `${moved} ${seconds}`,
          EVERY.history,
        );
  if (curves.seconds === seconds) curves.show(shown.body, shown.why);
}

async function showTensors(moved) {
  const layout = await part("layout", paths.layout(NAME), "fixed", Infinity);
  const distances = await part("distances", paths.distances(NAME), moved, EVERY.distances);
  panels.layout.show(layout.body, distances.body);
}

/** The reader wants another stretch of time. */
function stretched() {
  parts.delete("stretch");
  showCurves("asked");
}

function missing(why) {
  present = null;
  parts.clear();
  clear();
  say(
    byId("missing-why"),
    `${sentence(why)} It may have been deleted, or not be created yet; this page shows it as soon as it is there.`,
  );
  byId("missing").hidden = false;
}

function clear() {
  byId("run").hidden = true;
  byId("missing").hidden = true;
  byId("status").hidden = true;
  say(byId("age"), "");
}

function tick() {
  if (!present || byId("run").hidden) return;
  const waiting = present.version === null ? "created" : present.step === null ? "initial weights" : "updated";
  say(byId("age"), `${waiting} ${ago(serverNow() - present.updated_at)}`);
}

document.title = `${NAME} · EMA runs`;
byId("title").append(NAME);
byId("as-json").href = new URL(paths.run(NAME), root).href;
setInterval(tick, 1000);
follow(look, clear);
