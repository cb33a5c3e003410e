// Words for numbers: sizes, counts, times.
//
// Knows how a number is written for people. Does not know what the number is of.

const whole = new Intl.NumberFormat("en");

function scaled(value, units, base) {
  let unit = 0;
  while (Math.abs(value) >= base && unit < units.length - 1) {
    value /= base;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0;
  return `${value.toFixed(digits)} ${units[unit]}`.trim();
}

const known = (value) => value !== null && value !== undefined;

export const NOTHING = "–";
export const count = (value) => (known(value) ? scaled(value, ["", "K", "M", "B", "T"], 1000) : NOTHING);
export const bytes = (value) => (known(value) ? scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024) : NOTHING);
export const integer = (value) => (known(value) ? whole.format(value) : NOTHING);

/** A number of any size to some significant digits, without an exponent where it can be read without one. */
export function plain(value, digits = 3) {
  if (!known(value)) return NOTHING;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

// Decays are float32 on the server: seven digits say all there is.
export const decay = (value) => (known(value) ? String(Number(value.toPrecision(7))) : NOTHING);

export function perSecond(rate) {
  if (!known(rate)) return NOTHING;
  if (rate === 0) return "0 /s";
  return rate < 0.1 ? `${plain(rate * 60)} /min` : `${rate < 10 ? rate.toFixed(2) : rate.toFixed(1)} /s`;
}

/** A text of the service, which writes no capital and no full stop, as a sentence. */
export function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

/** How long something took or takes, with one unit. */
export function duration(seconds) {
  if (!known(seconds)) return NOTHING;
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${plain(seconds * 1e6)} µs`;
  if (seconds < 1) return `${plain(seconds * 1e3)} ms`;
  if (seconds < 60) return `${plain(seconds, 2)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

export function ago(seconds) {
  if (seconds < 1.5) return "just now";
  return seconds < 60 ? `${Math.floor(seconds)} s ago` : `${duration(seconds)} ago`;
}

/** Day and time of a moment, in seconds since 1970 or in ISO 8601. */
export function moment(given) {
  const at = new Date(typeof given === "number" ? given * 1000 : given);
  return at.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
}
