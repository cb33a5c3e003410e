// How far back an average looks: which share of it the latest x updates have.
//
// Pure functions of an AverageInfo. Knows the schedules, as PROTOCOL.md has their formulas. Does not know the page.

const POINTS = 120;
// Terms that are added one by one between two points of the curve; of more, so many stand for the rest.
const TERMS = 64;

/**
 * {ago, shares, halves} of averages: the share of each that its latest `ago` updates have, and the smallest `ago` that
 * has a half. An average that does not count, or has no update, has null for both.
 */
export function looksBack(averages, useCounter) {
  const ago = grid(Math.max(1, ...averages.map((average) => average.num_updates)));
  const shares = averages.map((average) => (average.num_updates > 0 ? sharesOf(average, useCounter, ago) : null));
  const halves = shares.map((share) => (share === null ? null : ago[share.findIndex((each) => each >= 0.5)]));
  return { ago, shares, halves };
}

function sharesOf(average, useCounter, ago) {
  const updates = average.num_updates;
  let kept = 0; // logarithm of what the latest updates left of the average before them
  let high = updates;
  return ago.map((x) => {
    const low = Math.max(0, updates - x);
    if (low < high) kept += between(average, useCounter, low, high);
    high = low;
    return -Math.expm1(kept);
  });
}

/** Whole numbers from 1 to `updates`, spread evenly over their logarithms. */
function grid(updates) {
  const all = Array.from({ length: POINTS }, (_, i) => Math.round(updates ** (i / (POINTS - 1))));
  return [...new Set(all)];
}

/** The sum of log(decay) over the updates low + 1 .. high. */
function between(average, useCounter, low, high) {
  const terms = Math.min(TERMS, high - low);
  const width = (high - low) / terms;
  let sum = 0;
  for (let k = 0; k < terms; k += 1)
    sum += width * Math.log(decayAt(average, useCounter, low + (k + 0.5) * width + 0.5));
  return sum;
}

/** The decay of update n, which counts from 1. */
function decayAt(average, useCounter, n) {
  const since = average.start === null ? 0 : average.start + 1;
  if (average.start !== null && n <= since) return 0;
  return SCHEDULES[average.schedule]?.(average, n - since, useCounter) ?? average.effective_decay ?? 0;
}

const SCHEDULES = {
  litema: ({ decay }, n, useCounter) => (useCounter ? Math.min(decay, (1 + n) / (10 + n)) : decay),
  constant: ({ decay }) => decay,
  half_life: ({ half_life: life }) => 2 ** (-1 / life),
  power: ({ gamma }, n) => Math.max(0, 1 - 1 / n) ** (gamma + 1),
  inverse_gamma: (average, n) => {
    const found = 1 - (1 + (n - 1) / (average.inv_gamma ?? 1)) ** -(average.power ?? 2 / 3);
    return Math.min(average.decay, Math.max(average.min_decay ?? 0, found));
  },
};
