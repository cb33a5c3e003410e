// The page of a cluster's hosts: asks GET /v1/hosts every two seconds, and of one run which part of it each host has.
//
// Data flow one way: answers of the gateway -> tables. Knows the tables' columns. Does not know how the gateway finds
// out what it says, or what a run's numbers mean (run.js).

import { Missing, get, pageOf, paths } from "./api.js";
import { byId, element, facts, fill, name, say, table } from "./dom.js";
import { follow, server, serverNow } from "./frame.js";
import { NOTHING, bytes, duration, integer, sentence } from "./words.js";

const hosts = table("Hosts", [
  ["Place", "number"],
  "Address",
  "State",
  "Coordinator",
  ["Memory", "number"],
  ["Disk free", "number"],
  "Device",
  "Version",
]);
const shards = table("Shards", [
  ["Place", "number"],
  "From",
  "To",
  ["Bytes of a shadow", "number"],
  ["Shadows", "number"],
  "State",
  "Version",
  ["Revision", "number"],
  ["Step", "number"],
  ["Durable", "number"],
]);
const chooser = element("select");
const note = element("p", "muted");

/** Which run the reader wants to see: kept in the address, so that a reload and a link show the same. */
const wanted = () => new URLSearchParams(location.search).get("run");

async function look() {
  const [answer, runs, told] = await Promise.all([get(paths.hosts), get(paths.runs).catch(none), server().catch(none)]);
  byId("cluster").hidden = false;
  showFigures(answer.body, told);
  showHosts(answer.body.hosts);
  showRuns(runs?.body.runs.map((run) => run.run) ?? null);
  await showShards();
  return answer.headers;
}

// While a host is away the gateway has neither a list of runs nor facts of the whole; the hosts are shown all the same.
function none() {
  return null;
}

function showFigures({ term, hosts: found }, told) {
  const away = found.filter((each) => each.server === null).length;
  facts(byId("figures"), [
    ["Hosts", integer(found.length)],
    ["Away", integer(away)],
    ["Coordinator's number", term === null ? "none answers" : integer(term)],
    told?.memory_limit_bytes
      ? [`Memory, of ${bytes(told.memory_limit_bytes)}`, bytes(told.memory_bytes)]
      : ["Memory", NOTHING],
  ]);
}

function showHosts(found) {
  fill(
    hosts,
    found.flatMap((each) => [host(each), ...each.replicas.map((replica) => host(replica, each.place))]),
  );
}

/** A row. of: of a replica, the place of its host. */
function host(each, of = null) {
  return [
    of === null ? String(each.place) : `replica of ${of}`,
    each.address === null ? NOTHING : name(each.address),
    each.fault === null ? "ready" : sentence(each.fault),
    of === null ? listening(each) : behind(each),
    each.server?.memory_limit_bytes
      ? `${bytes(each.server.memory_bytes)} of ${bytes(each.server.memory_limit_bytes)}`
      : NOTHING,
    bytes(each.server?.disk_free_bytes),
    each.server?.device ?? NOTHING,
    each.server?.version ?? NOTHING,
  ];
}

/** How far a replica is behind its host. */
function behind({ server: told }) {
  const seconds = told?.replica?.behind_seconds;
  if (seconds === undefined) return "not known";
  return seconds === 0 ? "has the newest" : `behind for ${duration(Math.floor(seconds))}`;
}

function listening({ listens, since }) {
  if (listens === null) return "not known";
  const when = since === null ? "" : ` for ${duration(Math.max(0, Math.floor(serverNow() - since)))}`;
  return `${listens ? "heard" : "away"}${when}`;
}

function showRuns(names) {
  if (names === null) return;
  const key = names.join();
  if (chooser.dataset.key !== key || !chooser.options.length) {
    chooser.dataset.key = key;
    chooser.replaceChildren(...names.map((each) => new Option(each, each)));
  }
  if (names.includes(wanted())) chooser.value = wanted();
}

async function showShards() {
  const run = chooser.value || wanted();
  shards.hidden = !run;
  if (!run) return say(note, "No runs yet.");
  try {
    const { body } = await get(paths.runHosts(run));
    say(note, body.fault ? sentence(body.fault) : `Every write is made on all ${body.shards.length} hosts or on none.`);
    byId("of").href = pageOf(run);
    say(byId("of"), run);
    fill(shards, body.shards.map(shard));
  } catch (fault) {
    if (!(fault instanceof Missing)) throw fault;
    shards.hidden = true;
    say(note, sentence(fault.message));
  }
}

function shard(each) {
  return [
    String(each.place),
    place(each.first),
    place(each.last),
    each.start === null ? NOTHING : bytes(each.stop - each.start),
    bytes(each.info?.bytes),
    each.fault === null ? each.info.status.replace("_", " ") : sentence(each.fault),
    each.info?.version ?? NOTHING,
    integer(each.revision),
    integer(each.info?.step),
    integer(each.info?.durable_step),
  ];
}

const place = (found) => (found === null ? NOTHING : name(`${found[0]}, row ${integer(found[1])}`));

function clear() {
  byId("cluster").hidden = true;
  for (const each of [hosts, shards]) each.tBodies[0].replaceChildren();
}

const link = element("a");
link.id = "of";
byId("hosts").append(hosts);
byId("shards").append(element("label", "choose", "Run ", chooser), element("p", "", link), shards, note);
chooser.addEventListener("change", () => {
  history.replaceState(null, "", `?${new URLSearchParams({ run: chooser.value })}`);
  showShards();
});
follow(look, clear);
