"use strict";
// Sorting and filtering of tables and pictures, and what is at the pointer, or at the arrow keys, in charts and maps.

function sortBy(button) {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const column = head.cellIndex, down = head.ariaSort === "ascending";
  const key = row => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  const number = text => text === "" ? NaN : Number(String(text).replaceAll(",", "").replace(/ ?(%|x|s)$/, ""));
  const rows = [...body.rows].map((row, place) => ({ row, place, text: key(row), number: number(key(row)) }));
  rows.sort((a, b) => {
    const bothNumbers = !isNaN(a.number) && !isNaN(b.number);
    const order = bothNumbers ? a.number - b.number : a.text.localeCompare(b.text, undefined, { numeric: true });
    return (down ? -order : order) || a.place - b.place;
  });
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.ariaSort = down ? "descending" : "ascending";
  body.append(...rows.map(one => one.row));
}

function filter(input) {
  const items = [...input.closest("figure").querySelectorAll("tbody tr, ul > li")];
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const item of items) {
    const text = item.textContent.toLowerCase();
    item.hidden = !words.every(word => text.includes(word));
    shown += !item.hidden;
  }
  const all = items.length.toLocaleString("en");
  input.nextElementSibling.value = shown === items.length ? all : `${shown.toLocaleString("en")} of ${all}`;
}

const SIGNIFICANT = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

function valueAt(scale, pixel) {
  const [low, high, from, to, log] = scale.split(" ").map(Number);
  const share = (pixel - from) / (to - from);
  return log ? low * (high / low) ** share : low + share * (high - low);
}

function readAt(drawing, wanted) {  // the values of all lines at the vertex that is nearest to a place
  const svg = drawing.querySelector("svg[data-x]"), lines = [...drawing.querySelectorAll("polyline[data-name]")];
  const vertices = line => [...line.points];
  const all = lines.flatMap(vertices).map(point => point.x);
  if (!all.length) return;
  const x = all.reduce((best, one) => Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best);
  const near = line => vertices(line).reduce((best, one) => Math.abs(one.x - x) < Math.abs(best.x - x) ? one : best);
  const values = lines.map(line => {
    const point = near(line);
    return Math.abs(point.x - x) > 25 ? "" : `${line.dataset.name} ${SIGNIFICANT.format(valueAt(svg.dataset.y, point.y))}`;
  });
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("x1", x);
  cursor.setAttribute("x2", x);
  cursor.removeAttribute("visibility");
  drawing.cursorAt = x;
  const at = SIGNIFICANT.format(valueAt(svg.dataset.x, x));
  drawing.parentElement.querySelector(".readout").value = `${svg.dataset.across} ${at}: ${values.filter(Boolean).join(", ")}`;
}

function showDot(drawing, number, left, top) {
  const points = drawing.querySelectorAll(".point"), list = drawing.parentElement.querySelector(".dots");
  drawing.querySelector(".point.on")?.classList.remove("on");
  const tip = document.getElementById("tip"), dot = list.children[number];
  points[number].classList.add("on");
  drawing.dotAt = number;
  tip.replaceChildren();
  if (dot.dataset.image) {
    const image = document.createElement("img");
    image.src = dot.dataset.image;
    image.alt = "";
    tip.append(image);
  }
  tip.append(dot.textContent);
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(left + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(top + 14, innerHeight - tip.offsetHeight - 8))}px`;
}

function nearestDot(drawing, x, y) {
  let best = -1, least = 20 ** 2;
  drawing.querySelectorAll(".point").forEach((point, number) => {
    const box = point.getBoundingClientRect();
    const far = (box.x + box.width / 2 - x) ** 2 + (box.y + box.height / 2 - y) ** 2;
    if (far < least) [best, least] = [number, far];
  });
  return best;
}

const drawingOf = event => event.target.closest?.(".drawing");
const isMap = drawing => drawing.parentElement.classList.contains("map");
const hideTip = () => { document.getElementById("tip").hidden = true; };
let tipIsAtPointer = false;  // and not where the arrow keys are

document.addEventListener("click", event => {
  const button = event.target.closest("th button");
  if (button) sortBy(button);
});
document.addEventListener("input", event => {
  if (event.target.closest(".filter")) filter(event.target);
});
document.addEventListener("pointermove", event => {
  const drawing = drawingOf(event);
  if (!drawing) return hideTip();
  if (isMap(drawing)) {
    const number = nearestDot(drawing, event.clientX, event.clientY);
    tipIsAtPointer = true;
    if (number < 0) hideTip(); else showDot(drawing, number, event.clientX, event.clientY);
  } else if (drawing.querySelector("svg[data-x]")) {
    const svg = drawing.querySelector("svg"), box = svg.getBoundingClientRect();
    readAt(drawing, (event.clientX - box.x) * svg.viewBox.baseVal.width / box.width);
  }
});
document.addEventListener("scroll", () => { if (tipIsAtPointer) hideTip(); }, { passive: true });
document.addEventListener("keydown", event => {
  const drawing = drawingOf(event), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hideTip();
  if (!drawing || !step) return;
  if (isMap(drawing)) {
    const points = drawing.querySelectorAll(".point");
    const number = ((drawing.dotAt ?? -step) + step + points.length) % points.length;
    const box = points[number].getBoundingClientRect();
    tipIsAtPointer = false;
    showDot(drawing, number, box.x, box.y);
  } else if (drawing.querySelector("svg[data-x]")) {
    const places = [...new Set([...drawing.querySelectorAll("polyline[data-name]")]
      .flatMap(line => [...line.points].map(point => point.x)))].sort((a, b) => a - b);
    const now = places.indexOf(drawing.cursorAt);
    readAt(drawing, places[Math.max(0, Math.min(places.length - 1, now < 0 ? 0 : now + step))]);
  }
  event.preventDefault();
});
