// Before and after under one cut that pointer and keyboard move; both are zoomed and moved together. A lens shows the two
// of what is under the pointer side by side, larger.
//
// The slider (a range input, so arrows, Home and End work) holds the cut as a share of what is visible; the pointer moves
// the same slider.

import { Stage } from "./stage.js";

const LENS_TIMES = 3;
const FULL = document.documentElement.requestFullscreen !== undefined;

export class Compare {
  #width = 0;
  #height = 0;
  #isOpen = false;
  #both = false;
  #fitting = 0;
  #lens = null;
  #pointer = null;
  /** Seen whole until a person zooms: also when the frame changes its size. */
  #keepsFit = true;
  /** key -> place: what the lens is to show too. */
  #layers = new Map();

  constructor(root) {
    this.root = root;
    for (const part of root.querySelectorAll("[data-part]")) {
      this[part.dataset.part.replace(/-(\w)/g, (_, letter) => letter.toUpperCase())] = part;
    }
    this.stage = new Stage(this.viewport, {
      label: "The picture. Arrow keys move it, plus and minus zoom, 0 shows all of it.",
      onMove: () => this.#moved(),
      onTouch: () => { this.#keepsFit = false; },
      onWhole: () => this.fit.click(),
    });
    this.slider.addEventListener("input", () => this.#place());
    this.cut.addEventListener("pointerdown", (event) => this.#grab(event));
    // On their way down: OpenSeadragon lets none of them come up again.
    this.frame.addEventListener("pointermove", (event) => this.#point(event), { capture: true });
    this.frame.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.#point(null); });
    this.fit.addEventListener("click", () => { this.#keepsFit = true; this.stage.fit(); });
    this.real.addEventListener("click", () => this.#zoomTo(this.#width / devicePixelRatio));
    this.closer.addEventListener("click", () => this.#zoomTo(Math.min(this.stage.width * 1.5, this.#width * 16)));
    this.farther.addEventListener("click", () => this.#zoomTo(this.stage.width / 1.5));
    this.lensButton.addEventListener("click", () => this.#toggleLens());
    this.full.hidden = !FULL;
    this.full.addEventListener("click", () => { if (document.fullscreenElement) document.exitFullscreen(); else root.requestFullscreen(); });
    document.addEventListener("fullscreenchange", () => {
      this.full.setAttribute("aria-pressed", String(document.fullscreenElement === root));
      this.#layOut();
    });
    root.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
      const button = { l: this.lensButton, 1: this.real }[event.key.toLowerCase()];
      if (button) { event.preventDefault(); button.click(); }
    });
    new ResizeObserver(() => this.#layOut()).observe(root);
  }

  /** Another picture, whose result has (or will have) this size. */
  async open(width, height) {
    [this.#width, this.#height, this.#isOpen] = [width, height, false];
    this.said.hidden = true;
    this.#keepsFit = true;
    this.slider.value = 50;
    this.#layers.clear();
    this.#setBoth(false);
    this.#layOut();
    await Promise.all([this.stage.begin(height / width), this.#lens?.begin(height / width)]);
    this.#isOpen = true;
    this.stage.fit(true);
    this.#place();
  }

  /** Shows a picture under a name, on the `left` or `right` of the cut, or on `all` of it. Says whether it could be. */
  async show(key, source, place) {
    this.#layers.set(key, place);
    const isShown = await this.stage.show(key, source, place);
    if (this.#keepsFit) this.stage.fit(true);
    if (isShown) this.#showInLens(key);
    return isShown;
  }

  remove(key) {
    this.#layers.delete(key);
    this.stage.remove(key);
    this.#lens?.remove(key);
  }

  place(key, side) {
    const layer = this.#layers.get(key);
    if (layer) this.#layers.set(key, { ...layer, side });
    this.stage.place(key, side);
    this.#lens?.place(key, side);
  }

  whenSeen(key, callback) {
    this.stage.whenSeen(key, callback);
  }

  /** There is something on both sides: the cut is drawn, and what it divides is named. */
  divide(left, right) {
    this.tagBefore.textContent = left;
    this.tagAfter.textContent = right;
    this.#setBoth(true);
  }

  /** A sentence under the picture; empty: none. */
  tell(sentence) {
    this.told.textContent = sentence;
    this.told.hidden = sentence === "";
  }

  /** A sentence in place of a picture. */
  say(sentence) {
    this.said.hidden = false;
    this.said.textContent = sentence;
  }

  #setBoth(both) {
    this.#both = both;
    for (const part of [this.cut, this.tagBefore, this.tagAfter, this.slide]) part.hidden = !both;
    this.#place();
  }

  #layOut() {
    if (this.#width === 0) return;
    const full = document.fullscreenElement === this.root;
    // As tall as the picture, as long as that leaves room for what stands around it.
    const tallest = full ? Infinity : Math.max(240, window.innerHeight * 0.66);
    const height = full ? null : Math.min(tallest, this.frame.clientWidth * this.#height / this.#width);
    this.frame.style.height = full ? "" : `${Math.max(height, 192)}px`;
    this.#place();
  }

  #zoomTo(width) {
    this.#keepsFit = false;
    this.stage.width = width;
  }

  #place() {
    const share = this.slider.value / 100;
    this.frame.style.setProperty("--split", `${share * 100}%`);
    this.stage.cut = this.#both ? share : null;
  }

  #moved() {
    if (!this.#isOpen) return;
    const width = this.stage.width;
    const scale = width / this.#width * devicePixelRatio;
    const fitting = Math.min(this.frame.clientWidth, this.frame.clientHeight * this.#width / this.#height);
    const fits = Math.abs(width - fitting) < 2;
    if (!fits && this.#keepsFit) {
      // The frame has changed its size. Not now: OpenSeadragon is still adjusting itself to that.
      clearTimeout(this.#fitting);
      this.#fitting = setTimeout(() => { if (this.#isOpen && this.#keepsFit) this.stage.fit(true); });
    }
    this.fit.setAttribute("aria-pressed", String(fits));
    this.real.setAttribute("aria-pressed", String(Math.abs(scale - 1) < 0.005));
    this.zoom.textContent = `${scale < 0.1 ? (scale * 100).toFixed(1) : Math.round(scale * 100)} %`;
    // A finger scrolls the page over a picture that is seen whole, and moves one that is not.
    this.viewport.classList.toggle("whole", fits);
    this.#drawLens();
  }

  #grab(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.slider.focus({ preventScroll: true });
    this.cut.setPointerCapture(event.pointerId);
    const move = (moved) => {
      const frame = this.frame.getBoundingClientRect();
      this.slider.value = (moved.clientX - frame.left) / frame.width * 100;
      this.#place();
    };
    const drop = () => {
      for (const [name, heard] of [["pointermove", move], ["pointerup", drop], ["pointercancel", drop]]) this.cut.removeEventListener(name, heard);
    };
    this.cut.addEventListener("pointermove", move);
    this.cut.addEventListener("pointerup", drop);
    this.cut.addEventListener("pointercancel", drop);
  }

  // --- the lens ---

  async #toggleLens() {
    const on = this.lensFrame.hidden;
    this.lensFrame.hidden = !on;
    this.lensButton.setAttribute("aria-pressed", String(on));
    if (!on) return;
    if (this.#lens === null) {
      this.#lens = new Stage(this.lensPicture, { label: "Lens", still: true });
      await this.#lens.begin(this.#height / this.#width);
      this.#lens.cut = 0.5;
      for (const key of this.#layers.keys()) this.#showInLens(key);
    }
    this.#drawLens();
  }

  /** From what the stage has loaded: nothing is fetched a second time. */
  #showInLens(key) {
    const source = this.stage.sourceOf(key);
    if (source) this.#lens?.show(key, source, this.#layers.get(key));
  }

  #point(event) {
    const frame = this.frame.getBoundingClientRect();
    this.#pointer = event === null ? null : { x: event.clientX - frame.left, y: event.clientY - frame.top };
    this.#drawLens();
  }

  #drawLens() {
    if (this.lensFrame.hidden || this.#lens === null) return;
    // Without a pointer, at the middle: the arrow keys move the picture under it.
    const at = this.#pointer ?? { x: this.frame.clientWidth / 2, y: this.frame.clientHeight / 2 };
    const half = this.lensFrame.offsetWidth / 2;
    // Beside the pointer where it would leave the frame.
    const within = (value, end) => Math.min(Math.max(value, Math.min(half, end / 2)), Math.max(end - half, end / 2));
    this.lensFrame.style.left = `${within(at.x, this.frame.clientWidth)}px`;
    this.lensFrame.style.top = `${within(at.y, this.frame.clientHeight)}px`;
    this.#lens.look(this.stage, at.x, at.y, LENS_TIMES);
  }
}
