// The pictures chosen and not handed in yet: each with its thumbnail, its size now and after, and why not, if not.

import { bytes, megapixels, size } from "./words.js";

export class Tray {
  /** @type {{file?: File, job?: object, url: string, width: number, height: number, refusal: string, item: HTMLElement}[]} */
  pictures = [];

  /** `wanted()` gives {scale, largestSidePx, formatName}; `onChange()` is called when a picture comes or goes. */
  constructor(list, template, limits, wanted, onChange) {
    this.list = list;
    this.template = template;
    this.limits = limits;
    this.wanted = wanted;
    this.onChange = onChange;
  }

  add(files) {
    for (const file of files) {
      const picture = this.#lay({ file, name: file.name || "Pasted picture", url: URL.createObjectURL(file), width: 0, height: 0 });
      const image = picture.item.querySelector("img");
      image.onload = () => {
        picture.width = image.naturalWidth;
        picture.height = image.naturalHeight;
        image.hidden = false;
        this.#describe(picture);
        this.onChange();
      };
      image.onerror = () => {
        // The service reads more formats than browsers do (TIFF): it has the last word.
        picture.item.querySelector(".thumb span").textContent = (file.name.split(".").pop() || "?").slice(0, 5);
      };
      image.src = picture.url;
      this.#describe(picture);
    }
    this.onChange();
  }

  /** A picture that was handed in before, to be enlarged again from the service's own copy. */
  addAgain(job) {
    if (this.pictures.some((picture) => picture.job?.id === job.id)) return;
    const { name, width, height, format } = job.input;
    const picture = this.#lay({ job, name: name ?? job.id, url: "", width, height });
    const image = picture.item.querySelector("img");
    image.onload = () => { image.hidden = false; };
    image.onerror = () => { picture.item.querySelector(".thumb span").textContent = format; };
    if (job.progress.bands_total > 0) image.src = `/v1/jobs/${job.id}/thumbnail?of=input`;
    else image.onerror();
    this.#describe(picture);
    this.onChange();
  }

  #lay(facts) {
    const item = this.template.content.firstElementChild.cloneNode(true);
    const picture = { ...facts, refusal: "", item };
    item.querySelector(".name").textContent = item.querySelector(".name").title = picture.name;
    const button = item.querySelector("button");
    button.setAttribute("aria-label", `Remove ${picture.name}`);
    button.addEventListener("click", () => {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      this.remove(picture);
      (next?.querySelector("button") ?? document.getElementById("choose")).focus();
    });
    this.pictures.push(picture);
    this.list.append(item);
    return picture;
  }

  remove(picture) {
    URL.revokeObjectURL(picture.url);
    picture.item.remove();
    this.pictures = this.pictures.filter((other) => other !== picture);
    this.onChange();
  }

  /** Says under the picture why it was not taken; it stays, so that it can be handed in again. */
  refuse(picture, sentence) {
    const note = picture.item.querySelector(".note");
    note.textContent = sentence;
    note.hidden = sentence === "";
  }

  /** The settings have changed: sizes after, and what is too large, change with them. */
  redescribe() {
    for (const picture of this.pictures) this.#describe(picture);
    this.onChange();
  }

  /** Pictures that can be handed in. */
  get ready() {
    return this.pictures.filter((picture) => picture.refusal === "");
  }

  #describe(picture) {
    const { scale } = this.wanted();
    const { width, height } = picture;
    const count = picture.file?.size ?? picture.job.input.bytes;
    const [pixels, area] = picture.item.querySelectorAll(".small");
    if (width === 0) {
      pixels.textContent = `made ${scale} × larger`;
      area.textContent = bytes(count);
    } else {
      pixels.textContent = `${size(width, height)} → ${size(width * scale, height * scale)}`;
      area.textContent = `${megapixels(width, height)}, ${bytes(count)} → ${megapixels(width * scale, height * scale)}`;
    }
    picture.refusal = this.#refusal(picture);
    this.refuse(picture, picture.refusal);
  }

  #refusal({ file, width, height }) {
    const { scale, largestSidePx, formatName } = this.wanted();
    const { uploadBytes, inputPx, outputPx } = this.limits;
    if (file?.size === 0) return "The file is empty. Choose another one.";
    if (file?.size > uploadBytes) return `At most ${bytes(uploadBytes)} are taken. Save it smaller, as JPEG perhaps.`;
    if (width * height > inputPx) return `At most ${megapixels(inputPx, 1)} are taken. Hand in a part of the picture.`;
    if (width * scale * height * scale > outputPx) return `At most ${megapixels(outputPx, 1)} are made. Choose a smaller enlargement.`;
    if (Math.max(width, height) * scale > largestSidePx) {
      return `${formatName} holds at most ${largestSidePx.toLocaleString("en")} px a side. Choose PNG, or a smaller enlargement.`;
    }
    return "";
  }
}
