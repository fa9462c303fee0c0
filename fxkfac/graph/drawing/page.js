// The page: rows and lanes on a plane that can be moved and scaled, search, and what is chosen.
const ROW = 34, LANE = 18, INDENT = 16, MARGIN = 14;
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = Object.fromEntries(data.nodes.map((node) => [node.key, node]));
const byId = (id) => document.getElementById(id);
const closed = new Set();
const view = { x: MARGIN, y: MARGIN, scale: 1, width: 0, height: 0 };
let chosen = "", hits = [], hit = -1, place = {}, elements = {};

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== ""));
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --- the plane ---

function render() {
  const { rows, frames, at } = rowsOf(data, closed);
  const edges = edgesOf(data, at);
  const { lanes, width } = lanesOf(rows.length, edges);
  const left = (depth) => (width + 1) * LANE + depth * INDENT;
  const middle = (row) => row * ROW + ROW / 2;
  place = at;
  elements = {};
  byId("rows").replaceChildren();
  const lines = rows.map((row, k) => {
    const key = row.kind === "node" ? row.node.key : row.box;
    const line = row.kind === "node" ? nodeRow(row.node) : boxRow(row);
    Object.assign(line.style, { left: `${left(row.depth)}px`, top: `${k * ROW + 3}px` });
    elements[k] = line;
    line.dataset.key = key;
    return line;
  });
  byId("rows").append(...lines);
  const right = Math.max(...lines.map((line) => line.offsetLeft + line.offsetWidth)) + 8 * INDENT;
  const boxes = frames.map(({ depth, first, last }) => element("div", { class: "frame", style: {
    left: `${left(depth) - 6}px`, width: `${right - left(depth) - 6 * depth}px`,
    top: `${first * ROW + 1}px`, height: `${(last - first + 1) * ROW - 2}px` } }));
  byId("rows").prepend(...boxes);
  const x = (row) => (lanes[row] + 1) * LANE - 6;
  const paths = edges.flatMap(({ from, to, gradient }) => {
    const way = (shift) => `M${x(from) + shift},${middle(from)}` + (lanes[from] === lanes[to]
      ? `V${middle(to) - 5}`
      : `V${middle(to) - ROW} C${x(from) + shift},${middle(to) - 10} ${x(to) + shift},` +
        `${middle(to) - 26} ${x(to) + shift},${middle(to) - 5}`);
    const forward = drawn("path", { class: "data", d: way(0), "marker-end": "url(#tip-data)" });
    const back = { class: "gradient", d: way(5), "marker-start": "url(#tip-gradient)" };
    return gradient ? [forward, drawn("path", back)] : [forward];
  });
  const dots = rows.map((row, k) => [row, k]).filter(([, k]) => lanes[k] >= 0).map(([row, k]) =>
    drawn("circle", { cx: x(k), cy: middle(k), r: 4.5, fill: dotColour(row) }));
  byId("lanes").replaceChildren(tip("tip-data", "auto"), tip("tip-gradient", "auto"), ...paths,
    ...dots);
  Object.assign(view, { width: right + INDENT, height: rows.length * ROW });
  mark();
  move();
}

function tip(id, orient) {
  const size = { id, orient, markerWidth: 7, markerHeight: 7, refX: 5, refY: 3.5 };
  const shape = id === "tip-data" ? "M0,0 L7,3.5 L0,7 z" : "M7,0 L0,3.5 L7,7 z";
  return drawn("marker", { ...size, markerUnits: "userSpaceOnUse" },
    drawn("path", { d: shape, class: id }));
}

function dotColour(row) {
  const kinds = { op: "--blue", unsupported: "--violet", quiet: "--slate", input: "--ink" };
  const name = row.kind === "node" ? kinds[row.node.kind] || "--ink" : "--slate";
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

function nodeRow(node) {
  const factors = node.factors.flatMap(([a, b]) => [element("span", { class: "A" }, `A ${a}`),
    element("span", { class: "B" }, `B ${b}`)]);
  const shapes = node.y ? `${node.x} → ${node.y}` : node.shape;
  return element("div", { class: "row", onclick: () => moved || choose(node.key) },
    element("span", { class: node.kind }, node.title),
    ...node.parameters.map((key) => chip(key)),
    element("span", { class: "small" }, shapes), ...factors);
}

function chip(key) {
  const parameter = data.parameters[key];
  const style = { background: parameter.fill, color: parameter.ink, borderColor: parameter.border };
  const lost = parameter.status === "covered" ? "" : " lost";
  const ties = parameter.uses.length > 1 ? ` (${parameter.uses.length} uses)` : "";
  const press = (event) => { event.stopPropagation(); choose(key); };
  return element("button", { class: `parameter${lost}`, "data-parameter": key, style,
    onclick: press }, parameter.label + ties + (parameter.value ? `  ${parameter.value}` : ""));
}

function boxRow(row) {
  const box = data.boxes[row.box], taps = row.nodes.filter((node) => node.kind === "op").length;
  const count = box.count > 1 ? element("span", { class: "count" }, `${box.count} ×`) : "";
  const inside = row.kind === "closed" ? `${taps} tap${taps === 1 ? "" : "s"} inside` : "";
  return element("div", { class: "row head", title: "open or close", onclick: () => {
    if (moved) return;
    if (!closed.delete(row.box)) closed.add(row.box);
    render();
  } }, element("span", { class: "small" }, row.kind === "closed" ? "▸" : "▾"), count,
  element("b", {}, box.name), element("span", { class: "small" }, box.remark),
  element("span", { class: "small" }, inside));
}

function move() {
  byId("world").style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
}

function zoom(factor, x, y) {
  const scale = Math.min(4, Math.max(0.05, view.scale * factor));
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  move();
}

function fit() {
  const { clientWidth, clientHeight } = byId("view");
  const scale = Math.min(clientWidth / view.width, clientHeight / view.height) * 0.97;
  Object.assign(view, { scale: Math.min(1, scale), x: MARGIN, y: MARGIN });
  move();
}

function centre(row) {
  view.y = Math.min(MARGIN, byId("view").clientHeight / 2 - row * ROW * view.scale);
  move();
}

let grip = null, moved = false;
byId("view").addEventListener("pointerdown", (event) => {
  grip = { x: event.clientX - view.x, y: event.clientY - view.y };
  moved = false;
});
window.addEventListener("pointermove", (event) => {
  if (!grip) return;
  const [x, y] = [event.clientX - grip.x, event.clientY - grip.y];
  moved = moved || Math.abs(x - view.x) + Math.abs(y - view.y) > 3;
  if (moved) Object.assign(view, { x, y });
  move();
});
window.addEventListener("pointerup", () => { grip = null; });
byId("view").addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = byId("view").getBoundingClientRect();
  if (event.ctrlKey || event.metaKey) {
    zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
    return;
  }
  view.x -= event.shiftKey ? event.deltaY : event.deltaX;
  view.y -= event.shiftKey ? 0 : event.deltaY;
  move();
}, { passive: false });

// --- search, and what is chosen ---

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (node) => words.every((word) => node.text.includes(word));
  hits = words.length ? data.nodes.filter(fits).map((node) => node.key) : [];
  hit = -1;
  byId("found").textContent = words.length ? `${hits.length} found` : "";
  mark();
}

function nextHit() {
  if (!hits.length) return;
  hit = (hit + 1) % hits.length;
  choose(hits[hit]);
  centre(place[hits[hit]]);
  byId("found").textContent = `${hit + 1} of ${hits.length}`;
}

function mark() {
  const found = new Set(hits.map((key) => place[key]));
  for (const [row, line] of Object.entries(elements)) {
    line.classList.toggle("hit", found.has(Number(row)));
    line.classList.toggle("chosen", line.dataset.key === chosen);
    for (const button of line.querySelectorAll(".parameter")) {
      button.classList.toggle("chosen", button.dataset.parameter === chosen);
    }
  }
}

function choose(key) {
  if (!(key in nodes) && !(key in data.parameters)) return;
  chosen = key;
  const around = key in nodes ? nodes[key].boxes.filter((box) => closed.delete(box)) : [];
  if (around.length) render();
  byId("chosen").replaceChildren(...(key in nodes ? nodePanel(nodes[key]) : parameterPanel(key)));
  history.replaceState(null, "", `#${encodeURIComponent(key)}`);
  mark();
}

byId("search").addEventListener("input", (event) => search(event.target.value));
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") nextHit();
});
window.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target === byId("search")) return;
  event.preventDefault();
  byId("search").focus();
});
byId("close").addEventListener("click", () => {
  const isOpen = (box) => !closed.has(box);  // the innermost ones first
  const ready = Object.entries(data.boxes).filter(([box, { inner, around }]) =>
    around && isOpen(box) && !inner.some(isOpen));
  ready.forEach(([box]) => closed.add(box));
  render();
});
byId("open").addEventListener("click", () => { closed.clear(); render(); });
byId("smaller").addEventListener("click", () => zoom(0.8, 0, 0));
byId("larger").addEventListener("click", () => zoom(1.25, 0, 0));
byId("fit").addEventListener("click", fit);
