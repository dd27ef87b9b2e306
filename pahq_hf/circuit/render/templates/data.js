// What there is to draw, what of it is shown, and walks along it. Nothing here touches the page.

const drawing = JSON.parse(document.getElementById("data").textContent);
const nodes = drawing.nodes;
const readers = drawing.readers;
const compares = drawing.edges.scores.length > 1;
const groups = compares ? ["only A", "only B", "in both"] : ["q", "k", "v", "mlp", "logits"];

const edges = drawing.edges.writer.map((writer, i) => {
  const reader = readers[drawing.edges.reader[i]];
  const scores = drawing.edges.scores.map((column) => column[i]);
  const score = scores.reduce((a, b) => (b !== null && (a === null || Math.abs(b) > Math.abs(a)) ? b : a), null);
  const group = !compares ? reader.kind : scores[1] === null ? "only A" : scores[0] === null ? "only B" : "in both";
  return {
    number: i,
    name: `${nodes[writer].name}->${reader.name}`,
    writer,
    targets: reader.targets,
    bends: drawing.edges.bends[i],
    scores,
    tested: drawing.edges.tested.map((column) => column[i] === 1),
    estimated: drawing.edges.estimated.map((column) => column[i] === 1),
    gates: drawing.edges.gates.map((column) => column[i]),
    score,
    strength: Math.abs(score),
    group,
  };
});

// Strongest first; ties stay in model order.
const ranking = [...edges].sort((a, b) => b.strength - a.strength);
// Every strength once, weakest first: the slider steps through these, however they are spread.
const strengths = [...new Set(edges.map((edge) => edge.strength))].sort((a, b) => a - b);
const numberOf = new Map(nodes.map((node, i) => [node.name.toLowerCase(), i]));

const state = {
  cut: 0, // edges with a smaller |score| are hidden
  hiddenGroups: new Set(),
  selected: null, // { node } or { edge }, by number
};

function touching(list) {
  const into = nodes.map(() => []);
  const outOf = nodes.map(() => []);
  for (const edge of list) {
    outOf[edge.writer].push(edge);
    for (const target of edge.targets) into[target].push(edge);
  }
  return { into, outOf };
}

const all = touching(edges);

function shownEdges() {
  return edges.filter((edge) => edge.strength >= state.cut && !state.hiddenGroups.has(edge.group));
}

function reach(start, next) {
  const seen = new Set([start]);
  const open = [start];
  while (open.length) {
    for (const node of next(open.pop())) {
      if (!seen.has(node)) {
        seen.add(node);
        open.push(node);
      }
    }
  }
  return seen;
}

// What the selection lights up: nodes, and a test for each line of an edge. An edge that leads from above
// a node to below it without passing through it is on no path through it.
function highlight(shown) {
  if (state.selected === null) return null;
  if (state.selected.edge !== undefined) {
    const edge = edges[state.selected.edge];
    return { nodes: new Set([edge.writer, ...edge.targets]), line: (other) => other === edge };
  }
  const near = touching(shown);
  const up = reach(state.selected.node, (node) => near.into[node].map((edge) => edge.writer));
  const down = reach(state.selected.node, (node) => near.outOf[node].flatMap((edge) => edge.targets));
  return {
    nodes: new Set([...up, ...down]),
    line: (edge, target) => (up.has(edge.writer) && up.has(target)) || (down.has(edge.writer) && down.has(target)),
  };
}

function number(value) {
  return value === null ? "–" : (value < 0 ? "−" : "+") + Number(Math.abs(value).toPrecision(compares ? 3 : 4));
}

// Of whole nodes; "" where edges were kept or removed.
function nodeScore(i) {
  const scores = nodes[i].scores;
  if (scores.every((score) => score === null)) return "";
  return compares ? `score A ${number(scores[0])}, B ${number(scores[1])}` : `score ${number(scores[0])}`;
}

function scoreText(edge) {
  const one = (i) => {
    const gate = edge.gates[i] === null ? "" : ` ${edge.gates[i]}`;
    if (edge.scores[i] !== null && !edge.tested[i]) return "not tested" + gate;
    return number(edge.scores[i]) + (edge.estimated[i] ? " (estimate)" : "") + gate;
  };
  return compares ? `A ${one(0)}, B ${one(1)}` : one(0);
}
