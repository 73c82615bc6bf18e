
// The page of a run that is being trained: asks for newer sections, and puts them in the place of those that it shows.

const SHOWN = 2000, HIDDEN = 30000;  // milliseconds from one question to the next
let version = "", timer = 0;

const state = document.createElement("p");
state.id = "state";
state.setAttribute("role", "status");
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
    cursor: figure.querySelector(".readout")?.value && figure.querySelector(".drawing")?.cursorAt,
    focused,
    top: figure.getBoundingClientRect().top,
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
  if (kept.cursor) readAt(figure.querySelector(".drawing"), kept.cursor);
  if (kept.focused < 0) return;
  canHaveFocus(figure)[kept.focused]?.focus({ preventScroll: true });
  if (kept.selected && document.activeElement === input) input.setSelectionRange(...kept.selected);
}

function replaceSections(html) {
  const before = new Map([...figures()].map(([name, figure]) => [name, keep(figure)]));
  const link = document.activeElement.closest("nav a")?.textContent;
  const onTop = [...figures()].find(([, figure]) => figure.getBoundingClientRect().bottom > 0)?.[0];
  document.getElementById("sections").innerHTML = html;
  const after = figures();
  for (const [name, figure] of after) if (before.has(name)) restore(figure, before.get(name));
  [...document.querySelectorAll("nav a")].find(one => one.textContent === link)?.focus({ preventScroll: true });
  if (scrollY && after.has(onTop)) {
    const moved = after.get(onTop).getBoundingClientRect().top - before.get(onTop).top;
    scrollBy({ top: moved, behavior: "instant" });
  }
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
