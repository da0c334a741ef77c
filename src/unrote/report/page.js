"use strict";
// Names and captions are strangers' text: they go into textContent and setAttribute, never into HTML.
document.documentElement.classList.add("js");
const PAGE = 60;
const dialog = document.querySelector("dialog");
let open = null; // what the dialog shows: {gallery, place} of a pair, or nothing

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function setTile(tile, data, number, label) {
  tile.setAttribute("role", "img");
  tile.setAttribute("aria-label", number < 0 ? label + ": not in this file" : label);
  tile.className = "tile missing";
  if (number < 0) return tile;
  const sheet = data.sheets.find((one) => {
    if (number < one.count) return true;
    number -= one.count;
    return false;
  });
  const across = (number % data.columns) * sheet.steps[0];
  const down = Math.floor(number / data.columns) * sheet.steps[1];
  tile.className = "tile " + sheet.name;
  tile.style.backgroundPosition = across.toFixed(4) + "% " + down.toFixed(4) + "%";
  return tile;
}

class Gallery {
  constructor(section) {
    this.data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
    this.template = section.querySelector("template").content.firstElementChild;
    this.list = section.querySelector("ul.pairs.all");
    this.pager = section.querySelector("nav.pager");
    this.output = section.querySelector("output");
    this.text = section.querySelector("input[type=search]");
    this.onlyCopies = section.querySelector("input[type=checkbox]");
    const select = (name) => section.querySelector("select[data-control=" + name + "]");
    [this.viewSelect, this.thresholdSelect, this.sort] = ["view", "threshold", "sort"].map(select);
    this.views = this.data.views.map((view) => ({ ...view, exact: new Set(view.exact) }));
    this.views.forEach((view, number) => this.viewSelect.add(new Option(view.label, number)));
    this.all = this.data.name.map((_, index) => index);
    this.page = 0;
    this.setView();
    this.viewSelect.addEventListener("change", () => this.setView());
    for (const control of [this.thresholdSelect, this.onlyCopies, this.sort]) {
      control.addEventListener("change", () => this.update());
    }
    this.text.addEventListener("input", () => this.update());
    this.pager.addEventListener("click", (event) => {
      if (event.target.dataset.page) this.turn(Number(event.target.dataset.page));
    });
  }

  setView() {
    this.view = this.views[this.viewSelect.value];
    this.thresholdSelect.replaceChildren(...this.view.thresholds.map(([value, words]) => new Option(words, value)));
    this.update();
  }

  isCopy(index) {
    const value = this.view.value[index];
    return this.view.lower ? value < this.threshold : value > this.threshold;
  }

  words(index) {
    const { train, name, prompt } = this.data, nearest = this.view.train[index];
    const pick = (column, at) => (column ? column[at] : "");
    return { name: name[index], prompt: pick(prompt, index), train: train.name[nearest],
      caption: pick(train.caption, nearest), note: pick(train.note, nearest) };
  }

  update() {
    this.threshold = Number(this.thresholdSelect.value);
    const wanted = this.text.value.trim().toLowerCase();
    this.found = this.all.filter((index) => {
      if (this.onlyCopies.checked && !this.isCopy(index)) return false;
      return !wanted || Object.values(this.words(index)).join("\n").toLowerCase().includes(wanted);
    });
    const value = this.view.value, sign = this.view.lower === (this.sort.value === "worst") ? 1 : -1;
    const names = this.data.name;
    this.found.sort(this.sort.value === "name"
      ? (a, b) => (names[a] < names[b] ? -1 : names[a] > names[b] ? 1 : a - b)
      : (a, b) => sign * (value[a] - value[b]) || a - b);
    this.page = 0;
    this.output.textContent = this.found.length.toLocaleString("en") + " of " +
      this.all.length.toLocaleString("en") + " pairs";
    this.draw();
  }

  turn(step) {
    this.page = Math.min(Math.max(0, this.page + step), this.pages() - 1);
    this.draw();
    this.list.scrollIntoView();
  }

  pages() {
    return Math.max(1, Math.ceil(this.found.length / PAGE));
  }

  draw() {
    const first = this.page * PAGE;
    this.list.replaceChildren(...this.found.slice(first, first + PAGE).map((index, at) => this.card(index, first + at)));
    const [previous, next] = this.pager.querySelectorAll("button");
    this.pager.hidden = this.pages() === 1;
    this.pager.querySelector("span").textContent = "page " + (this.page + 1) + " of " + this.pages();
    previous.disabled = this.page === 0;
    next.disabled = this.page === this.pages() - 1;
  }

  card(index, place) {
    const { view, data } = this, card = this.template.cloneNode(true), words = this.words(index);
    const copy = this.isCopy(index);
    const texts = { ...words, score: view.value[index].toFixed(3), detail: this.detail(index),
      tag: !copy ? "" : view.exact.has(index) ? "exact copy" : "near-copy" };
    for (const slot of card.querySelectorAll("[data-slot]")) slot.textContent = texts[slot.dataset.slot];
    const [generated, train] = card.querySelectorAll(".tile");
    setTile(generated, data, data.picture[index], "generated image " + words.name);
    setTile(train, data, data.train.picture[view.train[index]], "nearest training image " + words.train);
    card.querySelector(".ratio").title = view.score;
    card.classList.toggle("copy", copy);
    card.dataset.place = place;
    return card;
  }

  detail(index) {
    const { second, secondWords, transforms, transform } = this.view;
    const parts = second ? [secondWords + " " + second[index].toFixed(3)] : [];
    if (transforms && transforms[transform[index]] !== "identity") parts.push(transforms[transform[index]]);
    return parts.join(" · ");
  }

  enlarged(place) {
    const index = this.found[place], { view, data } = this, card = this.card(index, place);
    const words = this.words(index), figures = make("div", "figures", "");
    const add = (number, label, second) => {
      const figure = make("figure", "", ""), box = make("span", "box", "");
      box.append(setTile(make("span", "", ""), data, number, label + " " + (second ?? "")));
      figure.append(box, make("figcaption", "soft", label));
      figures.append(figure);
      return box;
    };
    const transform = view.transforms ? view.transforms[view.transform[index]] : "identity";
    const nearest = data.train.picture[view.train[index]], moved = transform !== "identity";
    const matched = moved ? view.matched[index] : nearest;
    add(data.picture[index], "generated", words.name);
    if (moved) add(matched, "training image, as matched: " + transform, words.train);
    add(nearest, moved ? "training image, as it is" : "nearest training image", words.train);
    if (matched >= 0 && data.picture[index] >= 0) {
      const box = add(data.picture[index], "difference (black: none)", "");
      const over = setTile(make("span", "", ""), data, matched, "");
      over.setAttribute("aria-hidden", "true");
      over.classList.add("over");
      box.append(over);
    }
    card.querySelector("[data-slot=score]").textContent = view.score + " " + view.value[index].toFixed(3);
    card.querySelector(".images").replaceWith(figures);
    return card.childNodes;
  }
}

function show(gallery, place, card) {
  open = gallery ? { gallery, place } : null;
  const nodes = gallery ? gallery.enlarged(place) : card.cloneNode(true).childNodes;
  dialog.querySelector("div").replaceChildren(...nodes);
  for (const button of dialog.querySelectorAll("[data-step]")) {
    const step = Number(button.dataset.step);
    button.hidden = step !== 0 && !gallery;
    button.disabled = step !== 0 && Boolean(gallery) && !(place + step in gallery.found);
  }
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  if (by === 0) dialog.close();
  else if (open && open.place + by in open.gallery.found) show(open.gallery, open.place + by);
}

const galleries = new Map();
for (const section of document.querySelectorAll("section.run")) galleries.set(section, new Gallery(section));
for (const images of document.querySelectorAll("div.images")) images.tabIndex = 0;

function enlarge(event) {
  const card = event.target.closest(".pair"), images = event.target.closest(".images");
  if (!images || dialog.contains(images)) return;
  const gallery = card.dataset.place === undefined ? null : galleries.get(card.closest("section.run"));
  show(gallery, Number(card.dataset.place), card);
}
document.addEventListener("click", enlarge);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("div.images")) enlarge(event);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
  else if (event.target.dataset.step) step(Number(event.target.dataset.step));
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
