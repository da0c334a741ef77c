"use strict";
document.documentElement.classList.add("js");
for (const section of document.querySelectorAll("section.run")) {
  const text = section.querySelector("input[type=search]");
  const onlyCopies = section.querySelector("input[type=checkbox]");
  const shown = section.querySelector("output");
  if (!text) continue;
  const pairs = [...section.querySelectorAll("li.pair[data-pair]")];
  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let count = 0;
    for (const pair of pairs) {
      const fits = (!onlyCopies.checked || pair.classList.contains("copy")) &&
        pair.textContent.toLowerCase().includes(wanted);
      pair.hidden = !fits;
      count += fits;
    }
    shown.textContent = count + " of " + pairs.length + " shown";
  };
  text.addEventListener("input", filter);
  onlyCopies.addEventListener("change", filter);
  filter();
}
const dialog = document.querySelector("dialog");
const place = dialog.querySelector("div");
const zoom = (images) => {
  const copy = images.closest(".pair").cloneNode(true);
  copy.querySelector(".images").removeAttribute("tabindex");
  place.replaceChildren(...copy.childNodes);
  dialog.showModal();
};
for (const images of document.querySelectorAll(".pair .images")) {
  images.tabIndex = 0;
  images.addEventListener("click", () => zoom(images));
  images.addEventListener("keydown", (event) => {
    if (event.key === "Enter") zoom(images);
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
