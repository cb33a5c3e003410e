// The frame of each page: looks at the service every two seconds, says whether it answers, and asks for the token.
//
// Knows the link to the service and the sign-in form. Does not know what a page shows.

import { Missing, Refused, forgetToken, get, keepToken, paths, root, token } from "./api.js";
import { byId, say } from "./dom.js";
import { moment, sentence } from "./words.js";

const POLL_MS = 2000;
// The server's own facts move slowly.
const SERVER_MS = 15_000;

let lastAnswer = null; // when the service last answered, by this machine's clock
let skew = 0; // the server's clock minus this machine's, in ms
let wake = () => {};

/** Seconds since 1970 by the server's clock. */
export const serverNow = () => (Date.now() + skew) / 1000;

/**
 * Call `look` every two seconds while the page is seen; it asks the service, shows the answer, and returns the answer's
 * headers. `clear` empties the page when the service wants another token.
 */
export async function follow(look, clear) {
  byId("sign-in").addEventListener("submit", (event) => signIn(event));
  byId("sign-out").addEventListener("click", () => {
    forgetToken();
    signedOut("You signed out of this tab", clear);
  });
  document.addEventListener("visibilitychange", () => document.hidden || wake());
  for (;;) {
    if (!document.hidden && byId("sign-in").hidden) await once(look, clear);
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, POLL_MS);
    });
  }
}

async function once(look, clear) {
  try {
    connected(await look());
  } catch (fault) {
    if (fault instanceof Refused) signedOut(fault.message, clear);
    else lost(fault.message);
  }
}

// --- the server's own facts ------------------------------------------------------------------------------------------

let facts = null;
let asked = -SERVER_MS;

/** What the server says of itself, or null where it says nothing; asked anew now and then. */
export async function server() {
  if (performance.now() - asked < SERVER_MS) return facts;
  try {
    facts = (await get(paths.server)).body;
    asked = performance.now();
  } catch (fault) {
    if (!(fault instanceof Missing)) throw fault;
  }
  say(byId("server"), facts ? `${facts.name ?? "ema-service"} ${facts.version}` : "ema-service");
  if (facts?.hosts) atGateway();
  return facts;
}

// A gateway has no documentation of its own, and in its place a page of its hosts.
function atGateway() {
  const link = byId("more");
  if (!link) return;
  link.href = new URL("hosts", root);
  say(link, "Hosts and shards /hosts");
}

// --- the token -------------------------------------------------------------------------------------------------------

function signIn(event) {
  event.preventDefault();
  const given = byId("token").value.trim();
  byId("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(given)) {
    say(byId("refusal"), "A token is one word of plain characters.");
    return;
  }
  keepToken(given);
  asked = -SERVER_MS;
  byId("sign-in").hidden = true;
  wake();
}

function signedOut(why, clear) {
  facts = null;
  say(byId("refusal"), sentence(why));
  byId("sign-in").hidden = false;
  byId("sign-out").hidden = true;
  byId("lost").hidden = true;
  state("out", "signed out");
  clear();
}

// --- the link --------------------------------------------------------------------------------------------------------

function connected(headers) {
  const date = Date.parse(headers.get("Date") ?? "");
  // The header has whole seconds: a smaller difference than two is none.
  const found = Number.isNaN(date) ? 0 : date - Date.now();
  skew = Math.abs(found) < 2000 ? 0 : found;
  lastAnswer = Date.now();
  document.body.classList.remove("stale");
  byId("lost").hidden = true;
  byId("sign-out").hidden = !token();
  state("live", "live");
}

function lost(why) {
  document.body.classList.add("stale");
  state("lost", "no connection");
  const since = lastAnswer === null ? "" : ` The numbers are those of ${moment(lastAnswer / 1000)}.`;
  say(byId("lost"), `The server does not answer (${why}).${since} Trying again every two seconds.`);
  byId("lost").hidden = false;
}

function state(name, text) {
  byId("link").dataset.state = name;
  say(byId("link"), text);
}
