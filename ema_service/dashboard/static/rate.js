// How fast a run is updated, from one look at the service to the next.
//
// Knows versions and times. Does not know the page.

// The rate is a mean over this many looks; a single pair jumps about.
const LOOKS = 5;

/**
 * The counter of applied updates in a version "epoch.n". num_updates would not do: it is -1 for a run without the
 * counter, and it can be reset.
 */
export function applied(version) {
  if (version === null) return null;
  const [epoch, n] = version.split(".");
  return { epoch, n: Number(n) };
}

export class Rate {
  constructor() {
    this.points = []; // {at, n}
  }

  /** Note a version, seen at a time in ms. */
  see(at, version) {
    const now = applied(version);
    const last = this.points.at(-1);
    if (now === null || (last && (last.epoch !== now.epoch || now.n < last.n))) this.points = [];
    if (now !== null) this.points.push({ at, ...now });
    this.points = this.points.slice(-LOOKS - 1);
  }

  /** Updates per second, null before two looks. */
  get now() {
    if (this.points.length < 2) return null;
    const [first, last] = [this.points[0], this.points.at(-1)];
    return (1000 * (last.n - first.n)) / Math.max(1, last.at - first.at);
  }
}
