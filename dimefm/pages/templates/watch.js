
// The page of a run that is being trained: asks for newer sections, and puts them in the place of those that it shows.

document.documentElement.style.overflowAnchor = "none";  // what stays in its place is chosen below
const SHOWN = 2000, HIDDEN = 30000;  // milliseconds from one question to the next
let version = "", timer = 0;

const state = document.createElement("p");
state.id = "state";
document.querySelector("header").append(state);

function figures() {  // by what they are called; a name that comes again has a number
  const found = new Map();
  for (const figure of document.querySelectorAll("#sections figure")) {
    const heading = figure.closest("section").querySelector("h2").textContent;
    let name = `${heading}: ${figure.querySelector("figcaption").firstChild?.textContent.trim()}`;
    while (found.has(name)) name += "+";
    found.set(name, figure);
  }
  return found;
}

function cursorOf(figure) {  // the value that a chart's cursor is at, if it is shown
  const drawing = figure.querySelector(".drawing");
  return figure.querySelector(".readout")?.value && valueAt(drawing.querySelector("svg").dataset.x, drawing.cursorAt);
}

function readAtValue(drawing, value) {
  const scale = drawing.querySelector("svg[data-x]").dataset.x, [, , from, to] = scale.split(" ").map(Number);
  const share = (value - valueAt(scale, from)) / (valueAt(scale, to) - valueAt(scale, from));
  readAt(drawing, from + share * (to - from));
}

const canHaveFocus = figure => [...figure.querySelectorAll("input, button, .drawing, .scroll")];

function keep(figure) {
  const sorted = figure.querySelector("th[aria-sort]"), scroll = figure.querySelector(".scroll");
  const focused = canHaveFocus(figure).indexOf(document.activeElement), input = figure.querySelector(".filter input");
  return {
    filter: input?.value,
    selected: input && [input.selectionStart, input.selectionEnd],
    column: sorted?.cellIndex,
    order: sorted?.ariaSort,
    scrolled: scroll && [scroll.scrollLeft, scroll.scrollTop],
    cursor: cursorOf(figure),
    focused,
    top: figure.getBoundingClientRect().top,
    bottom: figure.getBoundingClientRect().bottom,
  };
}

function restore(figure, kept) {
  const head = figure.querySelector("thead tr")?.cells[kept.column], input = figure.querySelector(".filter input");
  for (let turn = 0; head && head.ariaSort !== kept.order && turn < 2; turn++) sortBy(head.querySelector("button"));
  if (input && kept.filter) {
    input.value = kept.filter;
    filter(input);
  }
  if (kept.scrolled) figure.querySelector(".scroll")?.scrollTo(...kept.scrolled);
  if (kept.cursor) readAtValue(figure.querySelector(".drawing"), kept.cursor);
  if (kept.focused < 0) return;
  canHaveFocus(figure)[kept.focused]?.focus({ preventScroll: true });
  if (kept.selected && document.activeElement === input) input.setSelectionRange(...kept.selected);
}

function replaceSections(html) {
  const before = new Map([...figures()].map(([name, figure]) => [name, keep(figure)]));
  const link = document.activeElement.closest("nav a")?.textContent;
  const seen = [...before].filter(([, kept]) => kept.bottom > 0 && kept.top < innerHeight);
  const still = (seen.find(([, kept]) => kept.focused >= 0) ?? seen[0])?.[0];  // what stays where it is
  document.getElementById("sections").innerHTML = html;
  const after = figures();
  for (const [name, figure] of after) if (before.has(name)) restore(figure, before.get(name));
  [...document.querySelectorAll("nav a")].find(one => one.textContent === link)?.focus({ preventScroll: true });
  if (!scrollY || !after.has(still)) return;
  const moved = after.get(still).getBoundingClientRect().top - before.get(still).top;
  scrollBy({ top: moved, behavior: "instant" });
}

function say(name, words) {
  state.className = name;
  if (state.textContent !== words) state.textContent = words;
}

async function ask() {
  const answer = await fetch(`now?version=${version}`).catch(() => null);
  const words = await answer?.text().catch(() => null) ?? null;
  if (words === null) {
    say("gone", "dimefm watch has ended, or does not answer: this page is as it was");
  } else if (!answer.ok) {
    say("gone", words);
  } else {
    const found = JSON.parse(words);
    if (found.sections !== null) replaceSections(found.sections);
    version = found.version;
    say(found.state, `${found.words}; last update ${new Date(found.changed * 1000).toLocaleString()}`);
  }
  clearTimeout(timer);
  timer = setTimeout(ask, document.hidden ? HIDDEN : SHOWN);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
ask();
