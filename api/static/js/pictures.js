// Where a job's pictures come from: whole, as tiles, as strips of a preview, or in another format.

import { Refused, call } from "./calls.js";
import { kept } from "./words.js";

// Browsers decode a picture whole: beyond this a result is looked at tile by tile.
const LARGEST_WHOLE_PX = 50_000_000;
const SHOWN_BY_BROWSERS = ["png", "jpeg", "webp", "avif", "gif", "bmp"];
const POLL_MS = 700;

/** What OpenSeadragon is to load for a job's `result` or `before`; null where that takes `pictureOf.tiles` first. */
export function pictureOf(job, what) {
  const { format, width, height } = what === "before" ? job.input : job.result;
  if (SHOWN_BY_BROWSERS.includes(format) && width * height <= LARGEST_WHOLE_PX) {
    return { type: "image", url: what === "before" ? `/v1/jobs/${job.id}/input` : job.result.url, buildPyramid: false };
  }
  // Small, but something: it is there once a worker has read the picture.
  if (what === "before" && job.progress.bands_total > 0) return { type: "image", url: `/v1/jobs/${job.id}/thumbnail?of=input`, buildPyramid: false };
  return null;
}

/** The result's pyramid, which is made at the first look; `onWait(waits)` is told whether it is being made. */
pictureOf.tiles = async (job, onWait, isStill) => {
  const { zoom } = await rendition(job, "zoom", onWait, isStill);
  const { width, height, tile_size: tileSize, levels, tiles } = zoom;
  return {
    width, height, tileSize, tileOverlap: 0, minLevel: 8 < levels ? 8 : 0, maxLevel: levels - 1,
    getTileUrl: (level, column, row) => tiles.replace("{level}", level).replace("{column}", column).replace("{row}", row),
  };
};

/** The result in another format, made from what is stored: `{url, bytes}`. */
export function download(job, format, isStill) {
  return rendition(job, format, () => {}, isStill);
}

async function rendition(job, kind, onWait, isStill) {
  const path = `/v1/jobs/${job.id}/renditions`;
  const headers = { "Content-Type": "application/json" };
  let told = await call("POST", path, { body: JSON.stringify({ kind }), headers });
  while (told.status === "pending" && isStill()) {
    onWait(true);
    await new Promise((wake) => { setTimeout(wake, POLL_MS); });
    told = await call("GET", `${path}/${kind}`);
  }
  onWait(false);
  if (told.status === "failed") throw new Refused(told.error.code, told.error.detail, 0);
  return told;
}

/** The result as far as it has come: its strips, laid over the picture handed in. */
export class Preview {
  #strips = new Set();
  #attempt = 0;
  #seen = "";
  #side = "all";
  #asking = false;

  constructor(compare, id) {
    this.compare = compare;
    this.id = id;
  }

  get isThere() {
    return this.#strips.size > 0;
  }

  /** Fetches the strips that have been stored since. */
  async refresh(job) {
    const seen = `${job.attempt} ${job.progress.bands_done} ${job.status}`;
    if (seen === this.#seen || this.#asking || job.progress.bands_total < 2 || !kept(job)) return;
    this.#seen = seen;
    this.#asking = true;
    try {
      const { attempt, strips } = await call("GET", `/v1/jobs/${this.id}/preview`);
      // Another attempt begins at the top.
      if (attempt !== this.#attempt) this.clear();
      this.#attempt = attempt;
      const width = job.input.width * job.scale;
      await Promise.all(strips.filter(({ url }) => !this.#strips.has(url)).map((strip) => {
        this.#strips.add(strip.url);
        const place = { side: this.#side, y: strip.y / width, width: strip.width / width };
        return this.compare.show(strip.url, { type: "image", url: strip.url, buildPyramid: false }, place);
      }));
    } catch {
      // Nothing depends on a preview; the next change asks again.
    } finally {
      this.#asking = false;
    }
  }

  /** Which side of the cut it is on, once there is one. */
  place(side) {
    this.#side = side;
    for (const key of this.#strips) this.compare.place(key, side);
  }

  clear() {
    for (const key of this.#strips) this.compare.remove(key);
    this.#strips.clear();
  }
}
