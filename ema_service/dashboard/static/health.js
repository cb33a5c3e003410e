// What is wrong with a run, why, and what to do: the one place where that is worked out.
//
// Pure functions of a run (RunInfo), its history, the server's facts and the time. Knows what a healthy EMA looks like.
// Does not know the page, or how any of these came here.

import { applied } from "./rate.js";
import { ago, bytes, decay, duration, integer, plain, sentence } from "./words.js";

/** Worst first: "bad" loses weights or averages nothing, "warn" will or may, "note" is only to be known. */
export const LEVELS = ["bad", "warn", "note"];

// A run that had no update for this many of its usual intervals, and no less than so many seconds, stands still.
const LATE_INTERVALS = 20;
const LATE_SECONDS = 60;
// After a day a run without updates is more likely done than in trouble.
const DONE_SECONDS = 86_400;
const WEIGHTS_SECONDS = 600;
// Of a float32 weight w an update smaller than 6e-8 w is lost to rounding: a shadow whose norm moved by no more than
// this, while its distance from the parameters grew by a tenth, takes nothing in.
const STILL = 2e-7;
const GROWN = 1.1;
const FEWEST_POINTS = 8;
// A shadow as far from the parameters as these are from zero has lost them.
const LOST = 0.5;
const BLOWN_UP = 10;
// New runs and snapshots are refused below this share of the disk, at most so many bytes.
const DISK_SHARE = 0.05;
const DISK_BYTES = 5 * 2 ** 30;
const MEMORY_SHARE = 0.95;

/**
 * All findings of a run, worst first: {level, title, why, remedy, command}.
 *
 * history, server: null where not known; what they would show is then left out. command: a line to copy, or null.
 */
export function findings(run, history, server, now) {
  const all = RULES.map((rule) => rule(run, history, server, now)).filter((found) => found !== null);
  return all.sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level));
}

/** One finding in a word or two, for a list; null where there is none beyond notes. */
export function worst(found) {
  return found.find((each) => each.level !== "note") ?? null;
}

const finding = (level, title, why, remedy, command = null) => ({ level, title, why, remedy, command });

const RULES = [
  degraded,
  refused,
  withoutWeights,
  frozen,
  still,
  runaway,
  exploded,
  hardlyAverage,
  ended,
  stalled,
  undurable,
  ring,
  disk,
  memory,
];

// --- the run's own state ---------------------------------------------------------------------------------------------

function degraded(run) {
  if (run.status !== "degraded") return null;
  const remedy =
    run.remedy ?? "Go back to a snapshot (ema rewind); without a name of one the version that is there is accepted.";
  const command = remedy.includes("ema rewind") ? `ema rewind ${run.run} SNAPSHOT` : null; // a full disk needs room instead
  return finding("bad", "Degraded", sentence(run.reason ?? "the server says no more"), sentence(remedy), command);
}

function refused(run) {
  if (!run.refused) return null;
  return finding(
    "bad",
    "Updates are refused",
    sentence(run.refused),
    "The average is as it was before. Look at the trainer: its loss and gradients where numbers are not finite, its " +
      "model where tensors do not fit.",
    `ema show ${run.run}`,
  );
}

function withoutWeights(run, history, server, now) {
  const waited = now - run.created_at;
  if (run.status !== "awaiting_weights" || waited < WEIGHTS_SECONDS) return null;
  return finding(
    "warn",
    "No weights yet",
    `The run was created ${ago(waited)}, and no trainer has sent its initial weights.`,
    "See whether the trainer still runs, and what its log says. A run that nobody needs can be deleted.",
    `ema delete ${run.run}`,
  );
}

function ring(run) {
  if (!run.ring?.trouble) return null;
  return finding(
    "warn",
    "The ring takes no snapshots",
    sentence(run.ring.trouble),
    "Until that is mended, averages of other lengths get less exact with every update.",
  );
}

// --- does the average average? ---------------------------------------------------------------------------------------

function frozen(run) {
  const stuck = run.averages.find((each) => each.effective_decay === 1);
  if (!stuck || !(run.step > 0)) return null;
  return finding(
    "bad",
    "Frozen",
    `The decay of average ${stuck.name} is 1: every update leaves the average as it was, however long the training goes on.`,
    "Set a decay below 1; updates from then on count, those before are not made up for.",
    `ema set-decay ${run.run} 0.9999`,
  );
}

function still(run, history) {
  const seen = points(history, ["distance", "shadow_norm", "parameter_norm"]);
  if (seen === null || run.effective_decay === 1) return null;
  const [first, last] = ends(seen);
  const moved = Math.abs(last.shadow_norm / first.shadow_norm - 1);
  if (moved > STILL || last.distance < first.distance * GROWN) return null;
  return finding(
    "bad",
    "Frozen",
    `Parameters move away (distance ${plain(first.distance)}, now ${plain(last.distance)}) and the average stands still: ` +
      `with decay ${decay(run.effective_decay)} an update is smaller than the rounding of ${run.shadow_dtype}.`,
    "Set a smaller decay.",
    `ema set-decay ${run.run} 0.9999`,
  );
}

function runaway(run, history) {
  const seen = points(history, ["distance"]);
  if (seen === null) return null;
  const [first, last] = ends(seen);
  if (last.distance < LOST || last.distance < 2 * first.distance) return null;
  return finding(
    "warn",
    "Running away",
    `The average is ${plain(last.distance)} of the parameters' own size away from them, and was ${plain(first.distance)} ` +
      `${duration(last.time - first.time)} before: it is too long for this training, or the parameters leap.`,
    "Look at the norms and at the training's loss. Where the training is well, set a smaller decay.",
    `ema set-decay ${run.run} 0.999`,
  );
}

function exploded(run, history) {
  const seen = points(history, ["parameter_norm"]);
  if (seen === null) return null;
  const [first, last] = ends(seen);
  if (last.parameter_norm < BLOWN_UP * first.parameter_norm || first.parameter_norm === 0) return null;
  return finding(
    "bad",
    "The training blows up",
    `The norm of the parameters went from ${plain(first.parameter_norm)} to ${plain(last.parameter_norm)} in ` +
      `${duration(last.time - first.time)}.`,
    "Stop the trainer; resume from a checkpoint before that, and rewind the run to a snapshot of the same step.",
    `ema rewind ${run.run} SNAPSHOT`,
  );
}

function hardlyAverage(run) {
  const counter = applied(run.version)?.n ?? 0;
  if (counter < 100 || run.effective_decay === null || run.effective_decay > 0.5) return null;
  return finding(
    "warn",
    "Hardly an average",
    `With decay ${decay(run.effective_decay)} the average is little more than the latest parameters.`,
    "Set a decay nearer to 1: 0.999 looks back a thousand updates.",
    `ema set-decay ${run.run} 0.999`,
  );
}

// --- does the trainer push? ------------------------------------------------------------------------------------------

function ended(run, history, server, now) {
  if (!run.ended_at) return null;
  const at = run.step === null ? "without an update" : `at step ${integer(run.step)}`;
  return finding(
    "note",
    "Ended",
    `The trainer said ${ago(now - run.ended_at)} that its training is over, ${at}.`,
    "A snapshot keeps the result, whatever comes after.",
    snapshot(run),
  );
}

function stalled(run, history, server, now) {
  const usual = interval(run, history);
  const quiet = now - run.updated_at;
  if (run.ended_at || usual === null || quiet < Math.max(LATE_SECONDS, LATE_INTERVALS * usual)) return null;
  const why = `The latest update came ${ago(quiet)}; before, there was one every ${duration(usual)}.`;
  if (quiet > DONE_SECONDS) return finding("note", "Quiet", why, "Done? A snapshot keeps the result.", snapshot(run));
  return finding(
    "warn",
    "Stalled",
    why,
    "See whether the trainer still runs; its log says why a push failed. Where the training is done, keep the result.",
    snapshot(run),
  );
}

const snapshot = (run) => `ema snapshot ${run.run} final`;

/** The usual time between two updates, in seconds; null before there were some. */
function interval(run, history) {
  if (run.step === null) return null;
  const rates = (history?.columns.rate ?? []).filter((rate) => rate > 0).sort((a, b) => a - b);
  if (rates.length >= FEWEST_POINTS) return 1 / rates[rates.length >> 1];
  const updates = applied(run.version)?.n ?? 0;
  return updates < 3 ? null : (run.updated_at - run.created_at) / updates;
}

// --- would it survive? -----------------------------------------------------------------------------------------------

function undurable(run) {
  if (run.step === null || run.durable_step !== null) return null;
  const memory = run.durability === "memory";
  return finding(
    memory ? "note" : "warn",
    "Not durable",
    memory
      ? "The run's durability is memory: it is gone with a sudden end of the server."
      : `No version would survive a sudden end of the server, though the run's durability is ${run.durability}.`,
    memory
      ? "A snapshot keeps the weights, where the server has a disk."
      : "Read the server's log; meanwhile, keep a copy.",
    memory ? snapshot(run) : `ema pull ${run.run} -o ${run.run}.safetensors`,
  );
}

function disk(run, history, server) {
  const { disk_free_bytes: free, disk_total_bytes: total } = server ?? {};
  if (!total || free > Math.min(DISK_BYTES, DISK_SHARE * total)) return null;
  return finding(
    "bad",
    "The disk is full",
    `${bytes(free)} of the server's ${bytes(total)} are left: it refuses new runs and snapshots.`,
    "Delete snapshots that nobody needs, or give the data dir a larger disk.",
    `ema snapshots ${run.run}`,
  );
}

function memory(run, history, server) {
  const { memory_bytes: used, memory_limit_bytes: limit } = server ?? {};
  if (!limit || used < MEMORY_SHARE * limit) return null;
  return finding(
    "warn",
    "Memory is short",
    `${bytes(used)} of ${bytes(limit)} are in use: pushes may have to wait, new runs are refused.`,
    "Delete runs or averages that nobody needs, or start the server with a larger --memory-limit.",
  );
}

// --- the measurements ------------------------------------------------------------------------------------------------

/**
 * The measurements of which all columns are known, in the later half of those seen; null where these are too few. While a
 * decay was 1 nothing could move: what was measured then tells nothing of the decay now.
 */
function points(history, columns) {
  if (!history) return null;
  const { time, effective_decay: decays } = history.columns;
  const known = [...time.keys()].filter((i) => decays[i] !== 1 && columns.every((c) => history.columns[c][i] !== null));
  const later = known.slice(known.length >> 1);
  if (later.length < FEWEST_POINTS) return null;
  return later.map((i) => ({ time: time[i], ...Object.fromEntries(columns.map((c) => [c, history.columns[c][i]])) }));
}

const ends = (seen) => [seen[0], seen[seen.length - 1]];

/** The run's state in figures, for a line that says that all is well. */
export function wellness(run, now) {
  if (run.status === "awaiting_weights") return "Waiting for the trainer's initial weights.";
  if (run.step === null) return "Has its initial weights, and waits for the first update.";
  return `Step ${integer(run.step)} came ${ago(now - run.updated_at)}, and the average follows.`;
}
