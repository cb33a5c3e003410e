// What the pages ask of the service, and the token that they ask with.
//
// Knows addresses, the token of this tab, and how a request may fail. Does not know what an answer means, or the page.

const TIMEOUT_MS = 10_000;
const TOKEN = "ema-token";

// The pages lie at ./ and ./runs/NAME, and a proxy may have put all of them below a prefix.
export const root = new URL("../", import.meta.url);

/** The service refuses the token, or wants one. */
export class Refused extends Error {}

/** There is nothing of the kind: no such run, no weights yet, nothing kept on disk. */
export class Missing extends Error {}

/** The service did not answer, or answered that it cannot at the moment. */
export class Unreachable extends Error {}

// In this tab only, and never in a URL: URLs end up in logs and histories.
export const token = () => sessionStorage.getItem(TOKEN);
export const keepToken = (given) => sessionStorage.setItem(TOKEN, given);
export const forgetToken = () => sessionStorage.removeItem(TOKEN);

// What fetch says of a refused connection ("Failed to fetch") is a TypeError in every browser, in words of its own.
const WHY = { TimeoutError: "it took more than ten seconds", TypeError: "no connection", SyntaxError: "no JSON came" };

/**
 * The JSON at a path below the root, with the answer's headers. Throws Refused, Missing or Unreachable.
 *
 * no-cache: the browser asks with the ETag of the answer it has; where nothing moved a 304 without a body comes.
 */
export async function get(path) {
  try {
    const answer = await request(path);
    const body = await answer.json();
    if (answer.ok) return { body, headers: answer.headers };
    throw fault(answer.status, body.detail ?? `status ${answer.status}`);
  } catch (failed) {
    if (failed instanceof Refused || failed instanceof Missing || failed instanceof Unreachable) throw failed;
    throw new Unreachable(WHY[failed.name] ?? failed.message);
  }
}

/** The weights at a path as a Blob, for a link that cannot carry the token. Throws as get() does. */
export async function getBlob(path) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  const answer = await fetch(new URL(path, root), { headers, cache: "no-store" });
  if (!answer.ok) throw fault(answer.status, `status ${answer.status}`);
  return answer.blob();
}

function request(path) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  return fetch(new URL(path, root), { headers, signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-cache" });
}

function fault(status, detail) {
  if (status === 401) forgetToken(); // 403: the token is good for other runs
  if (status === 401 || status === 403) return new Refused(detail);
  return status < 500 ? new Missing(detail) : new Unreachable(detail);
}

// --- addresses -------------------------------------------------------------------------------------------------------

const named = (run) => `v1/runs/${encodeURIComponent(run)}`;

export const paths = {
  server: "v1/server",
  hosts: "v1/hosts",
  runHosts: (run) => `${named(run)}/hosts`,
  runs: "v1/runs",
  run: named,
  layout: (run) => `${named(run)}/layout`,
  distances: (run) => `${named(run)}/distances`,
  timeline: (run) => `${named(run)}/timeline`,
  sweeps: (run) => `${named(run)}/sweeps`,
  snapshots: (run) => `${named(run)}/snapshots`,
  snapshotWeights: (run, name) => `${named(run)}/snapshots/${encodeURIComponent(name)}/weights`,
  profiles: (run, sigmaRel) => `${named(run)}/profiles?sigma_rel=${sigmaRel}`,
  history: (run, points, since = null) =>
    `${named(run)}/history?points=${points}${since === null ? "" : `&since=${since}`}`,
};

/** The address of a run's page. */
export const pageOf = (run) => new URL(`runs/${encodeURIComponent(run)}`, root).href;

/** The address that clients are given, without the slash at its end. */
export const serviceUrl = root.href.replace(/\/$/, "");

// Where the command looks by itself.
const DEFAULT_URL = "http://127.0.0.1:8470";

/** A line for the command `ema`, with the address of this service where the command would look elsewhere. */
export const command = (line) => (serviceUrl === DEFAULT_URL ? line : `${line} --url ${serviceUrl}`);
