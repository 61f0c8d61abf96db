// The open job: what it is doing, the result as it comes, before and after, what it shows, what it took, and what can be
// done with it.

import { Compare } from "./compare.js";
import { download, Preview, pictureOf } from "./pictures.js";
import { call } from "./calls.js";
import { advice, bytes, figures, finished, kept, megapixels, percent, seconds, size, status, step, times, verdict } from "./words.js";

const part = (id) => document.getElementById(id);

export class JobView {
  #job = null;
  #shown = "";
  #said = "";
  #preview = null;
  /** Other results of the same picture, by job id. */
  #siblings = new Map();

  constructor() {
    this.compare = new Compare(part("compare"));
    for (const side of ["left", "right"]) {
      part(`${side}-side`).addEventListener("change", () => this.#choose(side, part(`${side}-side`).value));
    }
    part("download-as").addEventListener("change", () => { part("download-told").hidden = true; });
    part("download").addEventListener("click", (event) => this.#download(event));
  }

  hide() {
    this.#shown = "";
    this.#job = null;
    part("job").hidden = true;
    part("empty").hidden = false;
  }

  /** Draws the job as it stands; called with every change, so nothing is redone that has not changed. */
  draw(job) {
    this.#job = job;
    part("empty").hidden = true;
    part("job").hidden = false;
    part("job-name").textContent = job.input.name ?? job.id;
    part("job-line").textContent = [job.model, `${job.scale} ×`, job.result?.format.toUpperCase(), job.id].filter(Boolean).join(" · ");
    const reason = job.routing?.reason ?? "";
    part("job-why").hidden = !reason.startsWith("auto");
    part("job-why").textContent = reason;
    part("job-status").dataset.status = job.status;
    part("job-status").textContent = status(job);
    this.#drawProgress(job);
    this.#drawError(job);
    this.#drawPictures(job);
    this.#drawFacts(job);
    const done = job.status === "succeeded";
    part("download").hidden = part("download-as-part").hidden = !done || !kept(job);
    if (done) part("download").href = job.result.url;
    part("again").hidden = !finished(job) || !kept(job);
    part("cancel").hidden = finished(job) || Boolean(job.cancel_requested_at);
    part("retry").hidden = !["failed", "canceled", "expired"].includes(job.status) || !kept(job);
    part("delete").hidden = !finished(job);
  }

  get job() {
    return this.#job;
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

  // --- pictures ---

  #drawPictures(job) {
    if (job.id !== this.#shown.split(" ")[0]) this.#begin(job);
    if (job.status === "running" && kept(job)) this.#preview?.refresh(job);
    const key = `${job.id} ${job.status === "succeeded" ? "done" : ""}${kept(job) ? "" : "swept"}`;
    if (key === this.#shown) return;
    this.#shown = key;
    if (!kept(job)) {
      this.compare.say("The pictures are not kept any more. Hand the picture in again to enlarge it anew.");
      part("tools").hidden = true;
    } else if (job.status === "succeeded") {
      this.#finish(job);
    }
  }

  #begin(job) {
    const { input } = job;
    this.#siblings = new Map();
    part("tools").hidden = true;
    part("beside").hidden = part("report").hidden = part("download-told").hidden = true;
    this.compare.tell("");
    this.#preview = new Preview(this.compare, job.id);
    this.opened = this.compare.open(input.width * job.scale, input.height * job.scale).then(async () => {
      if (!kept(job) || this.#job?.id !== job.id) return;
      const before = pictureOf(job, "before");
      const isShown = before !== null && await this.compare.show("left", before, { side: "left" });
      if (!isShown && this.#job?.id === job.id && !finished(this.#job)) {
        this.compare.tell(`Browsers cannot show ${input.format.toUpperCase()}; the result appears here as it is made.`);
      }
    });
  }

  async #finish(job) {
    const isStill = () => this.#job?.id === job.id;
    part("download-as").replaceChildren(...[...part("format").options].filter((option) => option.value !== "auto").map((option) => {
      const isMade = option.value === job.result.format;
      const choice = new Option(isMade ? `${option.textContent}, ${bytes(job.result.bytes)}` : option.textContent, option.value, isMade, isMade);
      choice.disabled = Math.max(job.result.width, job.result.height) > Number(option.dataset.largestSidePx);
      return choice;
    }));
    await this.opened;
    if (!isStill()) return;
    await this.#preview.refresh(job);
    if (!isStill()) return;
    this.#preview.place("right");
    if (this.#preview.isThere) this.#divide();
    const isShown = await this.#show("right", job);
    if (!isStill()) return;
    if (isShown) {
      this.#divide();
      this.compare.whenSeen("right", () => { if (isStill()) this.#preview.clear(); });
    }
    this.#drawReport(job);
    this.#findSiblings(job);
  }

  #divide(left = "Before", right = "After") {
    this.compare.divide(left, right);
    part("tools").hidden = false;
  }

  /** Shows a job's result, or what it was made from, on one side. Says whether it could be shown. */
  async #show(side, job, what = "result") {
    const open = this.#job.id;
    const isStill = () => this.#job?.id === open;
    try {
      let source = pictureOf(job, what);
      if (source === null && what === "result") {
        const why = `The result has ${megapixels(job.result.width, job.result.height)}: you look at it part by part, and the whole is never loaded.`;
        source = await pictureOf.tiles(job, (waits) => { if (isStill()) this.compare.tell(waits ? `${why} The parts are being prepared; this happens once.` : why); }, isStill);
      }
      if (source === null || !isStill()) return false;
      const isShown = await this.compare.show(side, source, { side });
      if (!isShown && isStill()) this.compare.tell("This picture could not be shown here. Download it instead.");
      return isShown;
    } catch (refused) {
      if (isStill()) this.compare.tell(`${refused.message} ${refused.advice ?? ""}`);
      return false;
    }
  }

  /** The other models beside it: results of the same picture that are there already. */
  async #findSiblings(job) {
    let page;
    try {
      page = await call("GET", `/v1/jobs?status=succeeded&limit=50&input_sha256=${job.input.sha256}`);
    } catch {
      return;
    }
    if (this.#job?.id !== job.id) return;
    const others = page.data.filter((other) => other.id !== job.id && kept(other));
    this.#siblings = new Map([job, ...others].map((other) => [other.id, other]));
    part("beside").hidden = others.length === 0;
    const options = () => [new Option("Before", "before"), ...[...this.#siblings.values()].map((other) => new Option(named(other), other.id))];
    for (const side of ["left", "right"]) part(`${side}-side`).replaceChildren(...options());
    part("left-side").value = "before";
    part("right-side").value = job.id;
  }

  async #choose(side, value) {
    this.compare.tell("");
    if (value === "before") await this.#show(side, this.#job, "before");
    else await this.#show(side, this.#siblings.get(value));
    const tags = ["left", "right"].map((each) => {
      const chosen = part(`${each}-side`).value;
      return chosen === "before" ? "Before" : this.#siblings.size > 1 ? named(this.#siblings.get(chosen)) : "After";
    });
    this.#divide(...tags);
  }

  async #download(event) {
    const format = part("download-as").value;
    const job = this.#job;
    if (format === job.result.format) return;
    event.preventDefault();
    const note = part("download-told");
    note.hidden = false;
    note.className = "note";
    note.textContent = `Making a ${format.toUpperCase()} of the result…`;
    try {
      const { url, bytes: count } = await download(job, format, () => this.#job?.id === job.id);
      note.textContent = `${format.toUpperCase()}, ${bytes(count)}. `;
      // Beside the download that begins, for browsers that block it.
      note.append(Object.assign(document.createElement("a"), { href: url, textContent: "Download it again" }));
      location.assign(url);
    } catch (refused) {
      note.className = "note bad";
      note.textContent = `${refused.message} ${refused.advice ?? ""}`;
    }
  }

  async #drawReport(job) {
    if (!job.report_url) return;
    let report;
    try {
      report = await call("GET", job.report_url);
    } catch {
      return;
    }
    if (this.#job?.id !== job.id) return;
    part("report-verdict").textContent = verdict(report);
    part("report-figures").replaceChildren(...figures(report).flatMap(([name, figure]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: figure }),
    ]));
    part("report").hidden = false;
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

function named(job) {
  return `${job.model}, ${job.scale} ×`;
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
