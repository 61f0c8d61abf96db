// The page `/`: choose pictures, hand them in, follow the open job. The address names the open job (`#job_...`), so a
// reload, a bookmark and the back button all lead to it.

import { Refused, call, idempotencyKey } from "./calls.js";
import { follow } from "./follow.js";
import { JobView } from "./job.js";
import { Mine } from "./mine.js";
import { Tray } from "./tray.js";
import { estimate, finished } from "./words.js";

const part = (id) => document.getElementById(id);
const limits = part("bench").dataset;
const form = part("order");

function wanted() {
  const format = part("format").selectedOptions[0];
  return {
    scale: Number(part("scale").value),
    formatName: format.textContent,
    largestSidePx: Number(format.dataset.largestSidePx ?? Infinity),
  };
}

// --- choosing ---

const tray = new Tray(
  part("tray"),
  part("tray-item"),
  { uploadBytes: Number(limits.maxUploadBytes), inputPx: Number(limits.maxInputPx), outputPx: Number(limits.maxOutputPx) },
  wanted,
  () => { drawButton(); estimateSoon(); },
);
let handingIn = false;

function drawButton() {
  const count = tray.ready.length;
  const button = part("submit");
  button.disabled = handingIn || count === 0;
  if (handingIn) button.textContent = "Handing in…";
  else if (count > 0) button.textContent = count === 1 ? "Enlarge" : `Enlarge ${count} pictures`;
  else button.textContent = tray.pictures.length > 0 ? "Nothing that can be enlarged" : "Choose a picture first";
}

part("choose").addEventListener("change", () => {
  tray.add(part("choose").files);
  // Emptied, so that the same file can be chosen again after it was removed.
  part("choose").value = "";
});
form.addEventListener("change", (event) => {
  if (event.target.matches("select")) tray.redescribe();
  else if (event.target.name === "model") estimateSoon();
});

// --- how long it will take ---

// So many pictures are asked about; more of them are taken to be like these.
const MOST_ASKED = 8;
let estimating = 0;

function estimateSoon() {
  clearTimeout(estimating);
  estimating = setTimeout(drawEstimate, 250);
}

async function drawEstimate() {
  const known = tray.ready.filter((picture) => picture.width > 0);
  const line = part("estimate");
  line.hidden = known.length === 0;
  if (known.length === 0) return;
  const mine = estimating;
  const settings = { model: form.elements.model.value, scale: Number(part("scale").value), format: part("format").value };
  try {
    const told = await Promise.all(known.slice(0, MOST_ASKED).map(({ width, height }) => call("POST", "/v1/estimates", {
      body: JSON.stringify({ width, height, ...settings }),
      headers: { "Content-Type": "application/json" },
    })));
    if (mine !== estimating) return;
    while (told.length < known.length) told.push(told[told.length % MOST_ASKED]);
    line.textContent = estimate(told);
  } catch {
    line.hidden = true;
  }
}

const drop = part("drop");
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
// Anywhere on the page: a picture dropped beside the frame must not replace the page.
window.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  drop.classList.add("over");
});
window.addEventListener("dragleave", (event) => { if (event.relatedTarget === null) drop.classList.remove("over"); });
window.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  drop.classList.remove("over");
  tray.add(event.dataTransfer.files);
});
window.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) tray.add(event.clipboardData.files); });

// --- handing in ---

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  handingIn = true;
  drawButton();
  let first = null;
  for (const picture of tray.ready) {
    try {
      const job = await handIn(picture);
      tray.remove(picture);
      mine.tell(job);
      if (first === null) {
        first = job;
        location.hash = job.id;
      }
    } catch (refused) {
      tray.refuse(picture, `${refused.message} ${refused.advice ?? ""}`);
    }
  }
  handingIn = false;
  drawButton();
  mine.refresh();
});

function handIn(picture) {
  const settings = {
    model: form.elements.model.value,
    scale: Number(part("scale").value),
    format: part("format").value,
    classify: part("classify").checked,
  };
  // Kept with the picture: pressing the button again after a lost answer does not make a second job. Other settings
  // are another request, and get another key.
  const asked = JSON.stringify(settings);
  if (picture.asked !== asked) Object.assign(picture, { asked, key: idempotencyKey() });
  const headers = { "Idempotency-Key": picture.key };
  if (picture.job) {
    const body = JSON.stringify({ ...settings, input_of: picture.job.id });
    return call("POST", "/v1/jobs", { body, headers: { ...headers, "Content-Type": "application/json" } });
  }
  const body = new FormData();
  body.append("image", picture.file, picture.file.name || "pasted.png");
  for (const [name, value] of Object.entries(settings)) body.append(name, String(value));
  return call("POST", "/v1/jobs", { body, headers });
}

/** Brings a picture of before back to the form, with the settings it had, to change what is to be other. */
function again(job) {
  tray.addAgain(job);
  for (const choice of form.elements.model) choice.checked = choice.value === job.model;
  part("scale").value = job.scale;
  part("classify").checked = job.classify;
  tray.redescribe();
  part("order-title").scrollIntoView({ block: "start" });
  [...form.elements.model].find((choice) => choice.checked)?.focus({ preventScroll: true });
}

// --- the open job ---

const view = new JobView();
const mine = new Mine({
  list: part("mine"),
  template: part("mine-item"),
  none: part("none"),
  more: part("more"),
  onAgain: again,
  onEnd: end,
});
let openId = "";
let stopFollowing = () => {};

function openFromAddress() {
  const id = location.hash.slice(1);
  if (!id.startsWith("job_")) {
    close();
    return;
  }
  if (id !== openId) open(id);
}

function open(id) {
  stopFollowing();
  part("problem").hidden = true;
  openId = mine.open = id;
  let first = true;
  stopFollowing = follow(id, {
    onJob(job) {
      view.draw(job);
      mine.tell(job);
      if (first) bringIntoView();
      first = false;
    },
    onConnection(alive) { view.connected = alive; },
    onError(refused) {
      close();
      report(refused);
    },
  });
}

function close() {
  stopFollowing();
  openId = mine.open = "";
  view.hide();
  if (location.hash) history.replaceState(null, "", location.pathname);
}

function bringIntoView() {
  const top = part("job").getBoundingClientRect().top;
  if (top < 0 || top > window.innerHeight * 0.5) part("job").scrollIntoView({ behavior: "smooth", block: "start" });
}

function report(refused) {
  if (!(refused instanceof Refused)) throw refused;
  const note = part("problem");
  note.querySelector("strong").textContent = refused.message;
  note.querySelector("span").textContent = refused.advice;
  note.hidden = false;
  note.scrollIntoView({ block: "nearest" });
}

async function act(method, path, id = openId) {
  part("problem").hidden = true;
  try {
    return await call(method, `/v1/jobs/${id}${path}`);
  } catch (refused) {
    report(refused);
    return undefined;
  } finally {
    mine.refresh();
  }
}

part("cancel").addEventListener("click", async () => {
  const job = await act("POST", "/cancel");
  if (job) view.draw(job);
  // The button is gone with the press; the focus must not be.
  part("job-name").focus();
});
part("retry").addEventListener("click", async () => {
  const job = await act("POST", "/retry");
  if (job) open(job.id);
  part("job-name").focus();
});
part("delete").addEventListener("click", async () => {
  if (await remove(openId)) part("mine-title").scrollIntoView({ block: "nearest" });
});
part("again").addEventListener("click", () => again(view.job));

/** From the list: cancels what is under way, deletes what has ended. */
async function end(job) {
  if (finished(job)) {
    await remove(job.id);
    return;
  }
  const told = await act("POST", "/cancel", job.id);
  if (told) mine.tell(told);
}

async function remove(id) {
  if (!confirm("Delete this job and its pictures? This cannot be undone.")) return false;
  if (await act("DELETE", "", id) === undefined) return false;
  mine.forget(id);
  if (id === openId) close();
  return true;
}

window.addEventListener("hashchange", openFromAddress);
openFromAddress();
mine.refresh();
drawButton();
