// Before and after on one canvas, cut at a line that pointer and keyboard move.
//
// The slider (a range input, so arrows, Home and End work) holds the cut as a share of what is visible; the pointer
// moves the same slider. At 1:1 the frame scrolls, and dragging pulls the picture while the cut stays where it is.

export class Compare {
  #width = 0;
  #height = 0;
  #real = false;

  constructor(frame, slider) {
    this.frame = frame;
    this.slider = slider;
    for (const part of frame.querySelectorAll("[data-part]")) {
      this[part.dataset.part.replace(/-(\w)/g, (_, letter) => letter.toUpperCase())] = part;
    }
    slider.addEventListener("input", () => this.#place());
    this.viewport.addEventListener("scroll", () => this.#place());
    this.viewport.addEventListener("pointerdown", (event) => this.#grab(event));
    new ResizeObserver(() => this.#layOut()).observe(frame);
  }

  /** Shows `before` alone, at the size the result will have. */
  wait(before, width, height) {
    this.#show(width, height, before, null);
  }

  /** Shows both, with the cut in the middle. */
  show(before, after, width, height) {
    this.#show(width, height, before, after);
  }

  /** Shows a sentence in place of a picture; with `button` a way to go on all the same. */
  say(sentence, button = null) {
    this.said.hidden = false;
    this.said.querySelector("p").textContent = sentence;
    const shown = this.said.querySelector("button");
    shown.hidden = button === null;
    shown.onclick = button;
  }

  /** `real`: one pixel of the result on one of the screen; else as large as fits. */
  set real(real) {
    this.#real = real;
    this.#layOut();
    if (real) {
      this.viewport.scrollLeft = (this.viewport.scrollWidth - this.viewport.clientWidth) / 2;
      this.viewport.scrollTop = (this.viewport.scrollHeight - this.viewport.clientHeight) / 2;
    }
    this.#place();
  }

  #show(width, height, before, after) {
    this.#width = width;
    this.#height = height;
    this.said.hidden = true;
    this.slider.value = 50;
    this.#load(this.before, before, () => this.say("A browser cannot show the picture handed in (TIFF, perhaps). It is enlarged all the same."));
    this.#load(this.after, after, () => this.say("A browser cannot show the result (TIFF, perhaps, or no longer kept). Download it instead."));
    const both = after !== null;
    for (const part of [this.cut, this.knob, this.tagBefore, this.tagAfter]) part.hidden = !both;
    this.viewport.classList.toggle("alone", !both);
    this.#layOut();
  }

  #load(image, source, onFailure) {
    image.hidden = source === null;
    image.onerror = source === null ? null : onFailure;
    if (source === null) image.removeAttribute("src");
    else if (image.getAttribute("src") !== source) image.src = source;
  }

  #layOut() {
    const { viewport, canvas } = this;
    viewport.classList.toggle("real", this.#real);
    if (this.#width === 0 || this.frame.clientWidth === 0) return;
    let width = this.#width / window.devicePixelRatio;
    if (!this.#real) {
      const tallest = parseFloat(getComputedStyle(viewport).maxHeight);
      // Small pictures are not blown up further: that would soften both sides.
      width = Math.min(this.frame.clientWidth, tallest * this.#width / this.#height, Math.max(this.#width, 1));
    }
    canvas.style.width = `${width}px`;
    canvas.style.height = `${width * this.#height / this.#width}px`;
    this.#place();
  }

  /** The visible part of the canvas, in canvas px. */
  #visible() {
    const canvas = this.canvas.getBoundingClientRect();
    const frame = this.viewport.getBoundingClientRect();
    const left = Math.max(0, frame.left - canvas.left);
    const top = Math.max(0, frame.top - canvas.top);
    return {
      left,
      width: Math.min(canvas.width, this.viewport.clientWidth),
      middle: top + Math.min(canvas.height, this.viewport.clientHeight) / 2,
    };
  }

  #place() {
    const { left, width, middle } = this.#visible();
    const both = !this.cut.hidden;
    this.canvas.style.setProperty("--split", both ? `${left + width * this.slider.value / 100}px` : "100%");
    this.canvas.style.setProperty("--knob", `${middle}px`);
  }

  #grab(event) {
    const onKnob = this.knob.contains(event.target);
    if (event.button !== 0 || this.cut.hidden) return;
    const pull = this.#real && !onKnob;
    // A finger on a picture at 1:1 scrolls by itself.
    if (pull && event.pointerType === "touch") return;
    // What lies on the frame's own scroll bars is not ours.
    const frame = this.viewport.getBoundingClientRect();
    if (event.clientX - frame.left > this.viewport.clientWidth || event.clientY - frame.top > this.viewport.clientHeight) return;
    event.preventDefault();
    this.viewport.setPointerCapture(event.pointerId);
    const start = { x: event.clientX, y: event.clientY, left: this.viewport.scrollLeft, top: this.viewport.scrollTop };
    const move = (moved) => {
      if (pull) {
        this.viewport.scrollLeft = start.left - (moved.clientX - start.x);
        this.viewport.scrollTop = start.top - (moved.clientY - start.y);
        return;
      }
      const canvas = this.canvas.getBoundingClientRect();
      const { left, width } = this.#visible();
      this.slider.value = (moved.clientX - canvas.left - left) / width * 100;
      this.#place();
    };
    const drop = () => {
      this.viewport.classList.remove("pulled");
      this.viewport.removeEventListener("pointermove", move);
      this.viewport.removeEventListener("pointerup", drop);
      this.viewport.removeEventListener("pointercancel", drop);
    };
    this.viewport.classList.toggle("pulled", pull);
    this.viewport.addEventListener("pointermove", move);
    this.viewport.addEventListener("pointerup", drop);
    this.viewport.addEventListener("pointercancel", drop);
    if (!pull) move(event);
  }
}
