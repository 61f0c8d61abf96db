// A stage shows pictures of one motif on top of each other, each as wide as the stage's motif: zoomed and moved together,
// cut at one line. OpenSeadragon does the zooming, and fetches tiles where a picture has them.

/** Loads OpenSeadragon when the first picture is looked at, and not before: the page itself needs none of it. */
let loading = null;
export function load() {
  loading ??= new Promise((resolve, reject) => {
    // It adds a style sheet of its own (no outline on phones) unless it finds one, and the page's policy takes none
    // inline: an element of that name which is no style sheet.
    const stand_in = document.createElementNS("urn:enlarger:none", "style");
    stand_in.setAttribute("data-openseadragon-mobile-css", "");
    document.head.append(stand_in);
    const script = document.createElement("script");
    script.src = document.getElementById("bench").dataset.openseadragon;
    script.onload = () => resolve(window.OpenSeadragon);
    script.onerror = () => { loading = null; reject(new Error("OpenSeadragon could not be loaded.")); };
    document.head.append(script);
  });
  return loading;
}

const FARTHEST_IN = 16;

export class Stage {
  /** Picture -> {side, item}: `side` is `left` or `right` of the cut, or `all`. */
  #shown = new Map();
  #wanted = new Map();
  #cut = null;
  #ready = null;
  #height = 1;

  /** `onMove()` is called with every change of what is seen, `onTouch()` when a person zooms or moves it,
   *  `onWhole()` when a person asks to see all of it by key. */
  constructor(element, { label, onMove = () => {}, onTouch = () => {}, onWhole = () => {}, still = false }) {
    this.element = element;
    this.#ready = load().then((OpenSeadragon) => {
      const viewer = new OpenSeadragon({
        element,
        // Not WebGL: results come from storage, another origin, whose pixels a page may draw and not read.
        drawer: "canvas",
        showNavigationControl: false,
        animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
        blendTime: 0,
        minZoomImageRatio: 0.8,
        maxZoomPixelRatio: FARTHEST_IN,
        visibilityRatio: 0.5,
        constrainDuringPan: true,
        // Pictures come one by one; what is looked at stays.
        preserveViewport: true,
        gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
        gestureSettingsTouch: { dblTapToZoom: true },
        mouseNavEnabled: !still,
        maxImageCacheCount: 400,
      });
      viewer.canvas.setAttribute("aria-label", label);
      viewer.canvas.setAttribute("role", "application");
      if (still) viewer.canvas.removeAttribute("tabindex");
      viewer.addHandler("canvas-key", (event) => {
        const { key } = event.originalEvent;
        // R and F would turn and flip the picture; 1 and L are the page's.
        if (["r", "f", "l", "0", "1"].includes(key.toLowerCase())) event.preventDefaultAction = true;
        if (key === "0") onWhole();
      });
      // The wheel belongs to the page until somebody has turned to the picture.
      viewer.addHandler("canvas-scroll", (event) => {
        const isOurs = event.originalEvent.ctrlKey || document.fullscreenElement !== null || viewer.canvas.contains(document.activeElement);
        event.preventDefaultAction = !isOurs;
        event.preventDefault = isOurs;
      });
      for (const name of ["viewport-change", "resize"]) {
        viewer.addHandler(name, () => { this.#clip(); onMove(); });
      }
      for (const name of ["canvas-drag", "canvas-scroll", "canvas-pinch", "canvas-key", "canvas-double-click"]) {
        viewer.addHandler(name, (event) => { if (!event.preventDefaultAction) onTouch(); });
      }
      // What is small is enlarged by the browser's bicubic filter, not its bilinear one.
      viewer.addHandler("update-viewport", () => {
        const drawn = viewer.drawer.canvas.getContext?.("2d");
        if (drawn) drawn.imageSmoothingQuality = "high";
      });
      this.viewer = viewer;
      return OpenSeadragon;
    });
  }

  /** The motif has another shape, `height` times its width; what was shown is taken away. */
  async begin(height) {
    await this.#ready;
    this.#height = height;
    for (const key of [...this.#wanted.keys()]) this.remove(key);
  }

  /**
   * Shows a picture under the name `key`, in place of one of the same name: `source` is what OpenSeadragon takes for a
   * tile source. Returns whether it could be shown.
   */
  async show(key, source, { side, y = 0, width = 1 }) {
    const asked = (this.#wanted.get(key)?.asked ?? 0) + 1;
    this.#wanted.set(key, { asked });
    await this.#ready;
    if (this.#wanted.get(key)?.asked !== asked) return false;
    return new Promise((resolve) => {
      this.viewer.addTiledImage({
        tileSource: source, x: 0, y, width,
        success: ({ item }) => {
          const isStill = this.#wanted.get(key)?.asked === asked;
          if (isStill) {
            const before = this.#shown.get(key)?.item;
            this.#shown.set(key, { side, item });
            this.#clip();
            // The old one goes when the new one can be seen.
            if (before) this.#whenDrawn(item, () => this.viewer.world.removeItem(before));
          } else {
            this.viewer.world.removeItem(item);
          }
          resolve(isStill);
        },
        error: () => resolve(false),
      });
    });
  }

  remove(key) {
    this.#wanted.delete(key);
    const shown = this.#shown.get(key);
    this.#shown.delete(key);
    if (shown) this.viewer.world.removeItem(shown.item);
  }

  /** On which side of the cut a picture is to be seen. */
  place(key, side) {
    const shown = this.#shown.get(key);
    if (shown) shown.side = side;
    this.#clip();
  }

  /** What a picture was made of, for another stage to show. */
  sourceOf(key) {
    return this.#shown.get(key)?.item.source;
  }

  /** Calls back when every tile of the picture that is in sight has come. */
  whenSeen(key, callback) {
    const shown = this.#shown.get(key);
    if (shown) this.#whenDrawn(shown.item, callback);
  }

  #whenDrawn(item, callback) {
    if (item.getFullyLoaded()) { callback(); return; }
    item.addOnceHandler("fully-loaded-change", callback);
  }

  /** The cut, as a share of the stage's width; null where there is none. */
  set cut(share) {
    this.#cut = share;
    this.#clip();
  }

  #clip() {
    if (!this.viewer?.viewport) return;
    const { Point, Rect } = window.OpenSeadragon;
    const at = this.#cut === null ? null : this.viewer.viewport.pointFromPixel(new Point(this.#cut * this.element.clientWidth, 0), true).x;
    for (const { side, item } of this.#shown.values()) {
      const { x: width, y: height } = item.getContentSize();
      const bounds = item.getBounds(true);
      const px = at === null || side === "all" ? (side === "left" ? width : 0) : Math.min(width, Math.max(0, (at - bounds.x) / bounds.width * width));
      const clip = side === "left" ? new Rect(0, 0, px, height) : new Rect(px, 0, width - px, height);
      const isSeen = side === "left" || this.#cut !== null || side === "all";
      item.setOpacity(isSeen && clip.width > 0 ? 1 : 0);
      if (clip.width > 0) item.setClip(clip);
    }
  }

  /** The whole motif, as large as fits. */
  fit(immediately = false) {
    const { Rect } = window.OpenSeadragon;
    this.viewer.viewport.fitBounds(new Rect(0, 0, 1, this.#height), immediately);
  }

  get zoom() {
    return this.viewer?.viewport?.getZoom(true) ?? 1;
  }

  /** CSS px the whole motif's width takes: at once, or by and by. */
  get width() {
    return this.zoom * this.element.clientWidth;
  }

  set width(px) {
    this.viewer.viewport.zoomTo(px / this.element.clientWidth);
    this.viewer.viewport.applyConstraints();
  }

  /** Shows what lies under a point of another stage, `times` as large. */
  look(other, x, y, times) {
    if (!this.viewer?.viewport || !other.viewer?.viewport) return;
    const { Point } = window.OpenSeadragon;
    const viewport = this.viewer.viewport;
    viewport.zoomTo(other.width * times / this.element.clientWidth, null, true);
    viewport.panTo(other.viewer.viewport.pointFromPixel(new Point(x, y), true), true);
  }
}
