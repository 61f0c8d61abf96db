// Small comforts of the operator's pages, none of which is needed: ticking all boxes that are shown, copying a text.

document.addEventListener("change", (event) => {
  const box = event.target;
  if (!(box instanceof HTMLInputElement)) return;
  const form = box.closest("[data-choose]");
  if (!form) return;
  if (box.matches("[data-all-shown]")) {
    for (const each of form.querySelectorAll("input[name=id]")) each.checked = box.checked;
  } else if (box.name === "id" && !box.checked) {
    form.querySelector("[data-all-shown]").checked = false;
    form.querySelector("input[name=all]").checked = false;
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target instanceof Element ? event.target.closest("[data-copy]") : null;
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // Pages without TLS may not write to the clipboard: the text is selected instead, for a person to copy.
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
});
