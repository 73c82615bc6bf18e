
// The page of a store that can be asked. What is asked stands in the fragment of the address, so that going back works:
// #text=a dog&count=24, #row=7&count=24, or #image=1&count=24, an image that this page was given.

const MOST_BYTES = 50 * 2 ** 20, COUNTS = [12, 24, 48, 96, 192];
const images = new Map();  // number -> File
let facts = null, questions = 0;
let addresses = [];  // of pictures that are shown, to be given back

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const sentence = element("input", { type: "search", id: "sentence", autocomplete: "off", placeholder: "a sentence" });
sentence.setAttribute("aria-label", "Sentence to ask with");
const file = element("input", { type: "file", id: "file", accept: "image/*" });
const count = element("select", { id: "count" }, ...COUNTS.map(one => element("option", { value: one }, String(one))));
const form = element("form", { id: "ask" }, sentence, element("button", { type: "submit" }, "Search"),
  element("label", { className: "button" }, "An image ...", file), element("label", {}, "results ", count));
const hint = element("p", { className: "note" }, "or drop or paste an image anywhere, or click a result to go on from it");
const state = element("p", { id: "status" });
state.setAttribute("role", "status");
const asked = element("div", { id: "asked" }), found = element("div", { id: "found" }), took = element("p", { className: "note" });
document.getElementById("sections").append(form, hint, state, asked, found, took);

const fragment = () => new URLSearchParams(location.hash.slice(1));
const chosenCount = () => COUNTS.includes(Number(fragment().get("count"))) ? fragment().get("count") : "24";

function ask(name, value) {
  const before = location.hash;
  location.hash = new URLSearchParams({ [name]: value, count: chosenCount() });
  if (location.hash === before) answer();
}

function askWithImage(given) {
  if (!given) return;
  if (given.size > MOST_BYTES) return refuse(`${given.name} has more than ${MOST_BYTES / 2 ** 20} MB`);
  images.set(String(images.size + 1), given);
  ask("image", images.size);
}

function refuse(words) {
  questions++;
  found.ariaBusy = "false";
  found.replaceChildren(element("p", { className: "warning" }, words));
}

function say(words, warning = false) {
  state.textContent = words;
  state.className = warning ? "warning" : "note";
}

async function fetchJson(path, options) {
  try {
    const response = await fetch(path, options);
    const words = await response.text();
    return response.ok ? JSON.parse(words) : { error: words };
  } catch {
    return { error: "dimefm explore does not answer: it has ended" };
  }
}

function question() {
  const given = fragment(), how = `count=${chosenCount()}`;
  if (given.has("text")) return fetchJson(`text?${how}`, { method: "POST", body: given.get("text") });
  if (given.has("row")) return fetchJson(`row?${how}&row=${encodeURIComponent(given.get("row"))}`);
  if (!given.has("image")) return fetchJson(`start?${how}`);
  const image = images.get(given.get("image"));
  if (image) return fetchJson(`image?${how}`, { method: "POST", body: image });
  return { error: "that image was given to a page that is closed: give it again" };
}

async function picture(row) {  // an image, or in words why there is none
  try {
    const response = await fetch(`picture?row=${row}`);
    if (response.headers.get("Content-Type") === "image/jpeg") return shownImage(await response.blob());
    return element("div", { className: "none" }, (await response.text()).trim());
  } catch {
    return element("div", { className: "none" }, "no picture");
  }
}

function shownImage(blob) {
  const address = URL.createObjectURL(blob);
  addresses.push(address);
  return element("img", { src: address, alt: "" });
}

function pictureOf(row) {
  const place = element("div", { className: "none" }, "");
  const mine = questions;
  picture(row).then(made => mine === questions && place.replaceWith(made));
  return place;
}

function linkTo(hit, ...children) {
  return element("a", { href: `#${new URLSearchParams({ row: hit.row, count: chosenCount() })}` }, ...children);
}

function shownHit(hit) {
  const score = hit.score === null ? [] : [element("b", {}, hit.score.toFixed(3).replace("-", "\u2212"))];
  const words = element("span", { className: "words" }, hit.words);
  const place = element("span", { className: "place" }, `row ${hit.row.toLocaleString("en")}, ${hit.place}`);
  const parts = facts.kind === "image" ? [pictureOf(hit.row), ...score, words] : [...score, words, place];
  const item = element("li", {}, linkTo(hit, ...parts));
  if (facts.kind === "image") item.title = place.textContent;
  return item;
}

function showAsked(query) {
  const given = fragment(), image = images.get(given.get("image"));
  asked.replaceChildren();
  if (query && facts.kind === "image") asked.append(pictureOf(query.row));
  if (image) asked.append(shownImage(image));
  const name = query ? `row ${query.row.toLocaleString("en")}: ${query.words}` : image ? image.name : given.has("text") ? `\u201c${given.get("text")}\u201d` : null;
  const words = name === null ? `Some ${facts.kind === "image" ? "images" : "sentences"} to begin with` : `Nearest to ${name}`;
  asked.append(element("h2", {}, words));
}

async function answer() {
  const mine = ++questions;
  count.value = chosenCount();
  sentence.value = fragment().get("text") ?? "";
  found.ariaBusy = "true";
  const answered = await question();
  if (mine !== questions) return;  // something else was asked since
  found.ariaBusy = "false";
  addresses.forEach(address => URL.revokeObjectURL(address));
  addresses = [];
  showAsked(answered.query);
  found.className = facts.kind === "image" ? "gallery" : "sentences";
  if (answered.error) refuse(answered.error);
  else found.replaceChildren(element(facts.kind === "image" ? "ul" : "ol", {}, ...answered.hits.map(shownHit)));
  took.textContent = "milliseconds" in answered ? `found in ${answered.milliseconds.toLocaleString("en")} ms` : "";
  scrollTo(0, 0);
}

async function watchState() {
  const now = await fetchJson("state");
  if (now.error) return say(now.error, true);
  const first = facts === null;
  facts = now;
  say(now.words, now.state === "failed");
  if (first) {
    sentence.disabled = !now.texts;
    if (!now.texts) sentence.placeholder = "the teacher has no text tower: give an image";
    answer();
  }
  if (now.state === "loading") setTimeout(watchState, 400);
}

form.addEventListener("submit", event => {
  event.preventDefault();
  if (sentence.value.trim()) ask("text", sentence.value.trim());
});
file.addEventListener("change", () => {
  askWithImage(file.files[0]);
  file.value = "";
});
count.addEventListener("change", () => {
  const given = fragment();
  given.set("count", count.value);
  location.hash = given;
});
addEventListener("hashchange", answer);
document.addEventListener("paste", event => {
  const given = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
  if (given) askWithImage(given);
});
document.addEventListener("dragover", event => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", event => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  askWithImage(event.dataTransfer.files[0]);
});
watchState();
