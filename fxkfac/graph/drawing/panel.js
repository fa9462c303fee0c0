// What the panel says of a node or a parameter, and the legend.

function table(pairs) {
  const rows = pairs.filter(([, value]) => value !== "" && value !== undefined).map(
    ([name, value]) => element("tr", {}, element("td", {}, name), element("td", {}, value)));
  return element("table", {}, ...rows);
}

function nodePanel(node) {
  const of = node.parameters.flatMap((key) => [element("h3", {}, chip(key)), ...about(key)]);
  const code = node.code ? [element("pre", {}, node.code)] : [];
  return [element("h2", {}, node.title), table([
    ["module", node.module], ["source", node.source], ["tap", node.tap], ["tapped at", node.tapped],
    ["x", node.x], ["y", node.y], ["shape", node.y ? "" : node.shape], ["batch axis", node.batch],
    ["reason", node.reason], ["bias of", node.joins],
    ...node.factors.flatMap(([a, b]) => [["A", a], ["B", b]]),
  ]), ...code, ...of];
}

function parameterPanel(key) {
  const uses = data.parameters[key].uses.map(({ node, view, orientation }) => element("div", {},
    element("a", { href: `#${encodeURIComponent(node)}`, onclick: (event) => {
      event.preventDefault();
      choose(node);
      centre(place[node]);
    } }, nodes[node].title), ` ${nodes[node].module} ${view} ${orientation && `(${orientation})`}`));
  return [element("h2", {}, data.parameters[key].name), ...about(key),
    element("h3", {}, uses.length ? "enters" : "enters no op"), ...uses];
}

function about(key) {
  const of = data.parameters[key];
  const facts = table([["name", of.name], ["shape", of.shape], ["entries", of.numel],
    ["block", of.structure], ["status", of.status], ["reason", of.reason],
    [data.scale ? data.scale.name : "", of.value]]);
  const more = of.details.map(({ name, facts }, k) => element("details", k ? {} : { open: "" },
    element("summary", {}, name), ...facts.map(detail)));
  return [facts, ...more];
}

function detail({ name, text, curve, count, lost }) {
  if (!curve) return table([[name, text]]);
  const aside = lost ? `, ${lost} not positive` : "";
  return element("div", {}, element("div", { class: "small" }, `${name}: ${count} numbers${aside}`),
    curve.length ? plot(curve) : "");
}

// Numbers from the largest to the smallest, on a logarithmic scale.
function plot(values) {
  const logs = values.map(Math.log10), high = Math.max(...logs), low = Math.min(...logs);
  const x = (k) => 8 + (values.length > 1 ? k / (values.length - 1) : 0.5) * 304;
  const y = (log) => 18 + (high > low ? (high - log) / (high - low) : 0.5) * 60;
  const points = logs.map((log, k) => `${x(k).toFixed(1)},${y(log).toFixed(1)}`);
  const text = (value) => value >= 0.001 && value < 1e5 ? value.toPrecision(3)
    : value.toExponential(2);
  const label = (value, at) => drawn("text", { x: 8, y: at, "font-size": 10 }, text(value));
  return drawn("svg", { class: "curve", viewBox: "0 0 320 96" },
    drawn("polyline", { points: points.join(" ") }),
    ...(values.length < 40 ? points.map((point) => drawn("circle", {
      cx: point.split(",")[0], cy: point.split(",")[1], r: 2 })) : []),
    label(10 ** high, 12), label(10 ** low, 92));
}

function legend() {
  const entry = (sign, name, text) => element("div", { class: "row" },
    element("span", { class: name }, sign), element("span", { class: "small" }, text));
  const ramp = data.scale ? [element("div", { class: "small" }, data.scale.text),
    element("div", { class: "ramp" }, element("span", { class: "small" }, data.scale.low),
      ...data.scale.steps.map((fill) => element("i", { style: { background: fill } })),
      element("span", { class: "small" }, data.scale.high))] : [];
  return [entry("op", "op", "linear op with a tap"), entry("A", "A", "factor from the inputs x"),
    entry("B", "B", "factor from the gradients at y"),
    entry("op", "quiet", "ops without parameters"),
    element("div", { class: "small" }, "lines: data; dashed: backpropagated vectors"),
    element("div", { class: "small" }, "drag or wheel: move; ctrl and wheel: scale"), ...ramp];
}

byId("model").textContent = data.model;
byId("found").textContent = data.counts;
byId("legend").replaceChildren(...legend());
render();
choose(decodeURIComponent(location.hash.slice(1)));
if (chosen in place) centre(place[chosen]);
