// Data -> rows and lanes. One row for each node, in the order in which the graph runs; a value has
// a lane of its own from the row where it is made to the last row that reads it.
"use strict";

// Rows, top to bottom: heads of open boxes, closed boxes, nodes. `at` maps a node's key to its row.
function rowsOf(data, closed) {
  const rows = [], frames = [], at = {}, stack = [];
  const shut = () => { frames[stack.pop().frame].last = rows.length - 1; };
  for (const node of data.nodes) {
    const chain = node.boxes;
    let same = 0;
    while (same < stack.length && stack[same].box === chain[same]) same++;
    while (stack.length > same) shut();
    for (const box of chain.slice(same)) {
      if (stack.length && stack[stack.length - 1].closed) break;
      const isClosed = closed.has(box);
      rows.push({ kind: isClosed ? "closed" : "head", box, depth: stack.length, nodes: [] });
      frames.push({ box, depth: stack.length, first: rows.length - 1 });
      stack.push({ box, closed: isClosed, frame: frames.length - 1, row: rows.length - 1 });
    }
    const top = stack[stack.length - 1];
    if (top && top.closed) {
      rows[top.row].nodes.push(node);
      at[node.key] = top.row;
    } else {
      rows.push({ kind: "node", node, depth: stack.length, nodes: [node] });
      at[node.key] = rows.length - 1;
    }
  }
  while (stack.length) shut();
  return { rows, frames, at };
}

// Edges between rows: those inside one row vanish, those between the same rows become one.
function edgesOf(data, at) {
  const edges = new Map();
  for (const [source, reader, gradient] of data.edges) {
    const [from, to] = [at[source], at[reader]];
    if (from === to) continue;
    const key = `${from} ${to}`;
    const edge = edges.get(key) || { from, to, gradient: false };
    edge.gradient = edge.gradient || gradient;
    edges.set(key, edge);
  }
  return [...edges.values()];
}

// The lane of every row that has edges; a lane is free again behind the last reader of its value.
function lanesOf(count, edges) {
  const entering = Array.from({ length: count }, () => []), last = Array(count).fill(-1);
  for (const edge of edges) {
    entering[edge.to].push(edge.from);
    last[edge.from] = Math.max(last[edge.from], edge.to);
  }
  const lanes = Array(count).fill(-1), taken = [];
  for (let row = 0; row < count; row++) {
    if (!entering[row].length && last[row] < 0) continue;
    const ending = entering[row].filter((from) => last[from] === row).map((from) => lanes[from]);
    for (const lane of ending) taken[lane] = false;
    let lane = ending.length ? Math.min(...ending) : 0;
    while (taken[lane]) lane++;
    lanes[row] = lane;
    taken[lane] = last[row] >= 0;
  }
  return { lanes, width: taken.length };
}
