// The list of one's own jobs, newest first. One request tells of all of them; only the open job has a stream.

import { call } from "./calls.js";
import { ago, finished, kept, size, status, step } from "./words.js";

/** Where in the queue, where that is known; else nothing. */
function place(job) {
  return job.status === "queued" && step(job).includes(": ") ? step(job).split(": ")[1] : "";
}

const PAGE = 24;
const BUSY_MS = 2000;
const IDLE_MS = 15000;
const THUMB_TRIES = 3;

export class Mine {
  #items = new Map();
  #jobs = new Map();
  #cursor = null;
  #older = [];
  #timer = 0;
  #open = "";

  constructor({ list, template, none, more, onAgain, onEnd }) {
    this.list = list;
    this.template = template;
    this.none = none;
    this.more = more;
    this.onAgain = onAgain;
    this.onEnd = onEnd;
    more.addEventListener("click", () => this.#showOlder());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.refresh(); });
  }

  /** Marks the job that is open beside the list. */
  set open(id) {
    this.#open = id;
    for (const [other, item] of this.#items) this.#mark(other, item);
  }

  /** Shows what became of a job without asking again. */
  tell(job) {
    const isNew = !this.#jobs.has(job.id);
    this.#jobs.set(job.id, job);
    if (isNew) this.#lay([job, ...[...this.#jobs.values()].filter((other) => other !== job)]);
    else this.#fill(job);
  }

  forget(id) {
    this.#jobs.delete(id);
    this.#items.get(id)?.remove();
    this.#items.delete(id);
    this.#older = this.#older.filter((job) => job.id !== id);
    this.none.hidden = this.#jobs.size > 0;
  }

  /** Asks for the newest jobs now, and again later: soon while some are under way, seldom otherwise. */
  async refresh() {
    clearTimeout(this.#timer);
    try {
      const page = await call("GET", `/v1/jobs?limit=${PAGE}`);
      if (this.#older.length === 0) this.#cursor = page.next_cursor;
      const newest = new Set(page.data.map((job) => job.id));
      this.#lay([...page.data, ...this.#older.filter((job) => !newest.has(job.id))]);
    } catch (refused) {
      // Signed out: asking on would only fill the log. Anything else passes.
      if (refused.status === 401) return;
    }
    if (document.hidden) return;
    const busy = [...this.#jobs.values()].some((job) => !finished(job));
    this.#timer = setTimeout(() => this.refresh(), busy ? BUSY_MS : IDLE_MS);
  }

  async #showOlder() {
    const page = await call("GET", `/v1/jobs?limit=${PAGE}&cursor=${encodeURIComponent(this.#cursor)}`);
    this.#cursor = page.next_cursor;
    this.#older.push(...page.data);
    this.#lay([...this.#jobs.values(), ...page.data]);
  }

  #lay(jobs) {
    this.#jobs = new Map(jobs.map((job) => [job.id, job]));
    for (const [id, item] of this.#items) {
      if (!this.#jobs.has(id)) { item.remove(); this.#items.delete(id); }
    }
    jobs.forEach((job, place) => {
      this.#fill(job);
      const item = this.#items.get(job.id);
      // Moved only where it must be: a card that stays put keeps the focus.
      if (this.list.children[place] !== item) this.list.insertBefore(item, this.list.children[place] ?? null);
    });
    this.none.hidden = jobs.length > 0;
    this.more.hidden = this.#cursor === null;
  }

  #fill(job) {
    let item = this.#items.get(job.id);
    if (item === undefined) {
      item = this.template.content.firstElementChild.cloneNode(true);
      this.#items.set(job.id, item);
      const id = job.id;
      item.querySelector("[data-part=again]").addEventListener("click", () => this.onAgain(this.#jobs.get(id)));
      item.querySelector("[data-part=end]").addEventListener("click", () => this.onEnd(this.#jobs.get(id)));
    }
    this.#fillThumb(item, job);
    const { width, height, name } = job.input;
    const [again, end] = item.querySelectorAll("button");
    again.hidden = !finished(job) || !kept(job);
    again.setAttribute("aria-label", `${name ?? job.id} again with other settings`);
    end.hidden = !finished(job) && Boolean(job.cancel_requested_at);
    end.textContent = finished(job) ? "Delete" : "Cancel";
    end.setAttribute("aria-label", `${end.textContent} ${name ?? job.id}`);
    const link = item.querySelector("a");
    link.href = `#${job.id}`;
    link.textContent = link.title = name ?? job.id;
    item.querySelector("[data-part=sizes]").textContent = `${size(width, height).replace(" px", "")} → ${size(width * job.scale, height * job.scale)}`;
    const badge = item.querySelector(".badge");
    badge.dataset.status = job.status;
    badge.textContent = status(job);
    const bar = item.querySelector("progress");
    bar.hidden = job.status !== "running";
    bar.value = job.progress.fraction;
    const when = item.querySelector("[data-part=when]");
    when.textContent = finished(job) ? ago(job.finished_at) : place(job);
    this.#mark(job.id, item);
  }

  #fillThumb(item, job) {
    const image = item.querySelector("img");
    const kind = item.querySelector(".thumb span");
    // A worker makes it when it has read the picture.
    const source = kept(job) && job.progress.bands_total > 0 && (finished(job) || job.progress.bands_done > 0) ? `/v1/jobs/${job.id}/thumbnail?of=input` : "";
    if (image.dataset.source === source) return;
    image.dataset.source = source;
    const show = (isShown) => { image.hidden = !isShown; kind.hidden = isShown; };
    kind.textContent = job.input.format;
    show(false);
    image.onload = () => show(true);
    image.onerror = () => {
      show(false);
      // Forgotten, so that the list asks again when it is next laid: a connection that was lost comes back.
      image.dataset.tries = Number(image.dataset.tries ?? 0) + 1;
      if (image.dataset.tries < THUMB_TRIES) delete image.dataset.source;
    };
    if (source) image.src = source;
  }

  #mark(id, item) {
    item.classList.toggle("open", id === this.#open);
    item.querySelector("a").toggleAttribute("aria-current", id === this.#open);
  }
}
