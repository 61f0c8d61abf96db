// Keeps the parts of an operator's page fresh: every part marked `data-live` is replaced by what the server renders.
// Sleeps while the tab is hidden, and leaves alone a part in which something is being selected or typed.

const EVERY_MS = 2000;
const { fragments } = document.querySelector("[data-fragments]").dataset;
const stale = document.getElementById("stale");
const shown = new Map();
let timer = 0;

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const response = await fetch(fragments, { headers: { Accept: "application/json" }, redirect: "error" });
    if (response.status === 401 || response.status === 403) {
      location.reload();
      return;
    }
    if (!response.ok) throw new Error(String(response.status));
    const parts = await response.json();
    for (const part of document.querySelectorAll("[data-live]")) replace(part, parts[part.dataset.live]);
    stale.hidden = true;
  } catch {
    stale.hidden = false;
  }
  timer = setTimeout(refresh, EVERY_MS);
}

function replace(part, html) {
  if (html === undefined || shown.get(part.dataset.live) === html || isInUse(part)) return;
  shown.set(part.dataset.live, html);
  const focused = part.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  part.innerHTML = html;
  part.querySelectorAll(".scroll").forEach((box, index) => { box.scrollLeft = scrolled[index] ?? 0; });
  if (focused) part.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function isInUse(part) {
  const selection = getSelection();
  if (selection && !selection.isCollapsed && part.contains(selection.anchorNode)) return true;
  return part.contains(document.activeElement) && document.activeElement.matches("input, select");
}

document.addEventListener("visibilitychange", refresh);
timer = setTimeout(refresh, EVERY_MS);
