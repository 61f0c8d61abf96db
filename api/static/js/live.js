// Keeps the parts of an operator's page fresh: one stream of server-sent events names the parts marked `data-live` that
// look different now. It is closed while the tab is hidden, and leaves alone what is being selected, typed or read.

const from = document.querySelector("[data-live-from]")?.dataset.liveFrom;
const pulse = document.getElementById("pulse");
const stale = document.getElementById("stale");
const AGAIN_MS = 3000;
let stream = null;
let timer = 0;

function open() {
  close();
  if (document.hidden) return;
  stream = new EventSource(from);
  stream.addEventListener("parts", (event) => {
    say("live", "live");
    stale.hidden = true;
    const parts = JSON.parse(event.data);
    for (const part of document.querySelectorAll("[data-live]")) replace(part, parts[part.dataset.live]);
  });
  stream.addEventListener("gone", () => {
    close();
    say("waiting", "deleted");
  });
  stream.addEventListener("error", failed);
}

// A stream that ends in order is opened again by the browser within seconds, one that was refused is not: after a while
// of silence the server is asked what is the matter.
function failed() {
  say("waiting", "connecting");
  // Not anew with each try of the browser: they come quicker than this.
  if (!timer) timer = setTimeout(ask, AGAIN_MS);
}

async function ask() {
  timer = 0;
  if (document.hidden || pulse.dataset.state === "live") return;
  try {
    const answer = await fetch(from, { method: "HEAD", redirect: "error" });
    if (answer.status === 401 || answer.status === 403) {
      location.reload();
      return;
    }
    stale.hidden = answer.ok;
  } catch {
    stale.hidden = false;
  }
  if (!document.hidden) timer = setTimeout(open, stale.hidden ? 0 : AGAIN_MS);
}

function close() {
  clearTimeout(timer);
  timer = 0;
  stream?.close();
  stream = null;
}

function say(state, text) {
  pulse.dataset.state = state;
  pulse.textContent = text;
}

function replace(part, html) {
  if (html === undefined || isInUse(part)) return;
  const focused = part.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const ticked = [...part.querySelectorAll("input:checked[data-key]")].map((box) => box.dataset.key);
  const unfolded = [...part.querySelectorAll("details[open][data-key]")].map((box) => box.dataset.key);
  const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  part.innerHTML = html;
  part.querySelectorAll(".scroll").forEach((box, index) => { box.scrollLeft = scrolled[index] ?? 0; });
  for (const key of ticked) keyed(part, key)?.setAttribute("checked", "");
  for (const key of unfolded) keyed(part, key)?.setAttribute("open", "");
  if (focused) keyed(part, focused)?.focus({ preventScroll: true });
}

function keyed(part, key) {
  return part.querySelector(`[data-key="${CSS.escape(key)}"]`);
}

function isInUse(part) {
  const selection = getSelection();
  if (selection && !selection.isCollapsed && part.contains(selection.anchorNode)) return true;
  return part.contains(document.activeElement) && document.activeElement.matches("input:not([type=checkbox]), select");
}

if (from) {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      close();
      say("waiting", "paused");
    } else {
      open();
    }
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  open();
}
