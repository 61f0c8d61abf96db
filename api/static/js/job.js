// The open job: what it is doing, then before and after, what it shows, what it took, and what can be done with it.

import { Compare } from "./compare.js";
import { advice, bytes, finished, kept, megapixels, percent, seconds, size, status, step, times } from "./words.js";

// Browsers decode a picture whole: beyond this it is shown only when asked for.
const LARGEST_SHOWN_PX = 50_000_000;

const part = (id) => document.getElementById(id);

export class JobView {
  #shown = "";
  #said = "";

  constructor() {
    this.compare = new Compare(part("compare"), part("split"));
    for (const id of ["fit", "real"]) {
      part(id).addEventListener("click", () => {
        this.compare.real = id === "real";
        part("fit").setAttribute("aria-pressed", String(id === "fit"));
        part("real").setAttribute("aria-pressed", String(id === "real"));
      });
    }
  }

  hide() {
    this.#shown = "";
    part("job").hidden = true;
    part("empty").hidden = false;
  }

  /** Draws the job as it stands; called with every change, so nothing is redone that has not changed. */
  draw(job) {
    part("empty").hidden = true;
    part("job").hidden = false;
    part("job-name").textContent = job.input.name ?? job.id;
    part("job-line").textContent = [job.model, `${job.scale} ×`, job.result?.format.toUpperCase(), job.id].filter(Boolean).join(" · ");
    part("job-status").dataset.status = job.status;
    part("job-status").textContent = status(job);
    this.#drawProgress(job);
    this.#drawError(job);
    this.#drawPictures(job);
    this.#drawFacts(job);
    const done = job.status === "succeeded";
    part("download").hidden = !done || !kept(job);
    if (done) part("download").href = job.result.url;
    part("cancel").hidden = finished(job) || Boolean(job.cancel_requested_at);
    part("retry").hidden = !["failed", "canceled", "expired"].includes(job.status) || !kept(job);
    part("delete").hidden = !finished(job);
  }

  set connected(alive) {
    part("job-connection").textContent = alive ? "" : "Connection lost; trying again";
  }

  #drawProgress(job) {
    const under_way = !finished(job);
    part("job-progress").hidden = !under_way;
    const bar = part("job-bar");
    if (job.status === "running") bar.value = job.progress.fraction;
    else bar.removeAttribute("value");
    part("job-step").textContent = step(job);
    // Said aloud at each step and each quarter, not at each strip.
    const quarter = Math.floor(job.progress.fraction * 4) * 25;
    const spoken = under_way ? `${step(job).replace(/ ?[,·:].*$/, "")}${job.status === "running" && quarter ? `, ${quarter} %` : ""}` : status(job);
    if (spoken !== this.#said) part("job-live").textContent = this.#said = spoken;
  }

  #drawError(job) {
    const note = part("job-error");
    const error = job.status === "failed" || job.status === "expired" ? job.error : null;
    note.hidden = error === null;
    if (error) {
      note.querySelector("strong").textContent = error.detail;
      note.querySelector("span").textContent = advice(error.code);
    }
    const warnings = part("job-warnings");
    warnings.hidden = !job.warnings?.length;
    warnings.textContent = job.warnings?.join(" ") ?? "";
  }

  #drawPictures(job) {
    const key = `${job.id} ${job.status === "succeeded" ? job.result.sha256 : ""}`;
    if (key === this.#shown) return;
    this.#shown = key;
    const before = `/v1/jobs/${job.id}/input`;
    const { input, result } = job;
    part("tools").hidden = true;
    if (!kept(job)) {
      this.compare.wait(null, input.width * job.scale, input.height * job.scale);
      this.compare.say("The pictures are not kept any more. Hand the picture in again to enlarge it anew.");
      return;
    }
    if (result === null) {
      this.compare.wait(before, input.width * job.scale, input.height * job.scale);
      return;
    }
    const show = () => {
      this.compare.show(before, result.url, result.width, result.height);
      this.compare.before.alt = `Before: ${input.name ?? "the picture"}, plainly enlarged by the browser`;
      this.compare.after.alt = `After: enlarged by ${job.model}`;
      part("tools").hidden = false;
    };
    if (result.width * result.height > LARGEST_SHOWN_PX) {
      this.compare.wait(null, result.width, result.height);
      this.compare.say(`The result has ${megapixels(result.width, result.height)}: much for a browser. Download it, or`, show);
    } else {
      show();
    }
  }

  #drawFacts(job) {
    const { input, result } = job;
    const after = result ?? { width: input.width * job.scale, height: input.height * job.scale };
    const rows = [
      ["Pixels", size(input.width, input.height).replace(" px", ""), size(after.width, after.height).replace(" px", "")],
      ["Area", megapixels(input.width, input.height), megapixels(after.width, after.height)],
      ["File", bytes(input.bytes), result ? bytes(result.bytes) : "–"],
      ["Format", input.format.toUpperCase(), result ? result.format.toUpperCase() : "–"],
    ];
    part("sizes").replaceChildren(...rows.map(([name, ...cells]) => {
      const row = document.createElement("tr");
      const head = Object.assign(document.createElement("th"), { scope: "row", textContent: name });
      row.append(head, ...cells.map((cell) => Object.assign(document.createElement("td"), { textContent: cell })));
      return row;
    }));
    const labels = job.labels ?? [];
    part("labels-part").hidden = labels.length === 0;
    part("labels").replaceChildren(...labels.map(({ label, probability }) => bar(label, percent(probability), probability)));
    const took = times(job.timings ?? {});
    part("times-part").hidden = took.length === 0;
    const longest = Math.max(...took.map(([, count]) => count));
    part("times").replaceChildren(...took.map(([name, count]) => bar(name, seconds(count), count / longest)));
  }
}

function bar(name, figure, share) {
  const item = document.createElement("li");
  const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, value: share });
  meter.setAttribute("aria-hidden", "true");
  item.append(
    Object.assign(document.createElement("span"), { textContent: name }),
    Object.assign(document.createElement("span"), { textContent: figure, className: "number" }),
    meter,
  );
  return item;
}
