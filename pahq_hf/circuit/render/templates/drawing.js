// The picture: edges as a few line traces (one per colour, width and dash), nodes as markers on top.

const plot = document.getElementById("plot");
const palettes = drawing.palettes;
const symbols = { head: "circle", mlp: "square", input: "diamond", logits: "diamond" };
const fewEdges = edges.length <= 300;
const widths = fewEdges ? [1.3, 1.9, 2.7, 3.8] : [0.8, 1.2, 2, 3.2];
const opacities = fewEdges ? [0.55, 0.7, 0.85, 1] : [0.3, 0.45, 0.7, 0.95];
const binEnds = [0.5, 0.2, 0.05].map((share) => (ranking.length ? ranking[Math.floor(share * ranking.length)].strength : 0));
const markerSize = nodes.length <= 80 ? 15 : 10;
const curvePoints = edges.length <= 1000 ? 16 : 8;

let theme = "light";

function color(group) {
  const palette = palettes[theme];
  return compares ? palette.sets[groups.indexOf(group)] : palette.edges[group];
}

// Plotly reads a little HTML in the texts it draws.
function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function pointAt(edge, i, t) {
  const from = nodes[edge.writer];
  const to = nodes[edge.targets[i]];
  const side = 2 * t * (1 - t);
  const controlX = (from.x + to.x) / 2 + edge.bends[i];
  const controlY = (from.y + to.y) / 2;
  return [
    (1 - t) * (1 - t) * from.x + side * controlX + t * t * to.x,
    (1 - t) * (1 - t) * from.y + side * controlY + t * t * to.y,
  ];
}

function addCurve(trace, edge, i) {
  const last = edge.bends[i] === 0 ? 1 : curvePoints;
  for (let step = 0; step <= last; step++) {
    const [x, y] = pointAt(edge, i, step / last);
    trace.x.push(x);
    trace.y.push(y);
  }
  trace.x.push(null);
  trace.y.push(null);
}

function lineTraces(shown, lit) {
  const palette = palettes[theme];
  const blank = (width, opacity, line) => ({
    type: "scatter", mode: "lines", x: [], y: [], hoverinfo: "skip", opacity, line: { width, ...line },
  });
  const dim = blank(0.6, fewEdges ? 0.3 : 0.15, { color: palette.dim });
  // Invisible: a place on each line that answers to the pointer.
  const spots = {
    type: "scatter", mode: "none", x: [], y: [], customdata: [], hovertext: [], hoverinfo: "text", meta: "edges",
  };
  const traces = new Map();
  for (const edge of shown) {
    const bin = binEnds.filter((end) => edge.strength > end).length;
    const key = `${edge.group} ${bin} ${edge.score < 0}`;
    const hover = `<b>${escaped(edge.name)}</b><br>score ${escaped(scoreText(edge))}`;
    edge.targets.forEach((target, i) => {
      if (lit !== null && !lit.line(edge, target)) {
        addCurve(dim, edge, i);
        return;
      }
      if (!traces.has(key)) {
        const opacity = lit === null ? opacities[bin] : Math.max(0.6, opacities[bin]);
        const line = { color: color(edge.group), dash: edge.score < 0 ? "dot" : "solid" };
        traces.set(key, { ...blank(widths[bin], opacity, line), bin });
      }
      addCurve(traces.get(key), edge, i);
      const [x, y] = pointAt(edge, i, 0.5);
      spots.x.push(x);
      spots.y.push(y);
      spots.customdata.push(edge.number);
      spots.hovertext.push(hover);
    });
  }
  const strongestLast = [...traces.values()].sort((a, b) => a.bin - b.bin);
  return [dim, ...strongestLast.map(({ bin, ...trace }) => trace), spots];
}

function nodeText(i) {
  const strongest = [...all.into[i], ...all.outOf[i]].sort((a, b) => b.strength - a.strength).slice(0, 4);
  const lines = strongest.map((edge) => `${escaped(edge.name)}  ${escaped(scoreText(edge))}`);
  const counts = `${all.into[i].length} in, ${all.outOf[i].length} out`;
  const own = nodeScore(i);
  const score = own === "" ? [] : [escaped(own)];
  return [`<b>${escaped(nodes[i].name)}</b>`, ...score, counts, ...lines].join("<br>");
}

const nodeTexts = nodes.map((_, i) => nodeText(i));

function labelled(lit, i) {
  if (nodes[i].kind === "input" || nodes[i].kind === "logits" || nodes.length <= 60) return true;
  return lit !== null && lit.nodes.has(i) && (lit.nodes.size <= 40 || i === state.selected.node);
}

function nodeTrace(shown, lit) {
  const palette = palettes[theme];
  const busy = new Set(shown.flatMap((edge) => [edge.writer, ...edge.targets]));
  const visible = (i) => (lit === null ? busy.has(i) : lit.nodes.has(i));
  const chosen = (i) => state.selected !== null && state.selected.node === i;
  return {
    type: "scatter", mode: "markers+text", meta: "nodes", hoverinfo: "text", cliponaxis: false,
    x: nodes.map((node) => node.x),
    y: nodes.map((node) => node.y),
    customdata: nodes.map((_, i) => i),
    hovertext: nodeTexts,
    text: nodes.map((node, i) => (labelled(lit, i) ? escaped(node.name) : "")),
    textposition: "middle right",
    textfont: { size: 11, color: nodes.map((_, i) => (visible(i) ? palette.ink : palette.dim)) },
    marker: {
      size: nodes.map((_, i) => (chosen(i) ? markerSize + 5 : markerSize)),
      symbol: nodes.map((node) => symbols[node.kind]),
      color: nodes.map((node, i) => (chosen(i) ? palette.chosen : palette.nodes[node.kind])),
      opacity: nodes.map((_, i) => (visible(i) ? 1 : 0.25)),
      line: { width: 1.5, color: palette.ground },
    },
  };
}

// Room for every node and for the middle of every line, shown or not.
function startRanges() {
  const range = { x: [0, 0], y: [0, 0] };
  const include = (axis, value) => {
    range[axis] = [Math.min(range[axis][0], value), Math.max(range[axis][1], value)];
  };
  for (const node of nodes) {
    include("x", node.x);
    include("y", node.y);
  }
  for (const edge of edges) edge.targets.forEach((_, i) => include("x", pointAt(edge, i, 0.5)[0]));
  const padded = ([from, to], room) => [from - room, to + room];
  return { x: padded(range.x, 0.8), y: padded(range.y, 0.5 + range.y[1] / 50) };
}

const whole = startRanges();

const plotLayout = {
  hovermode: "closest",
  hoverdistance: 12,
  dragmode: "pan",
  showlegend: false,
  margin: { l: 64, r: 8, t: 8, b: 8 },
  xaxis: { visible: false, range: [...whole.x] },
  yaxis: { range: [...whole.y], zeroline: false, showgrid: true, ticks: "" },
};

function paintLayout() {
  const palette = palettes[theme];
  const step = Math.ceil(drawing.rows.length / 24);
  const rows = drawing.rows.filter((_, i) => i % step === 0 || i === drawing.rows.length - 1);
  plotLayout.paper_bgcolor = palette.ground;
  plotLayout.plot_bgcolor = palette.ground;
  plotLayout.font = { color: palette.faint, size: 11, family: "system-ui, 'DejaVu Sans', sans-serif" };
  plotLayout.yaxis.gridcolor = palette.grid;
  plotLayout.yaxis.tickvals = rows.map((row) => row[0]);
  plotLayout.yaxis.ticktext = rows.map((row) => row[1]);
  plotLayout.modebar = { bgcolor: "rgba(0,0,0,0)", color: palette.faint, activecolor: palette.ink };
  plotLayout.hoverlabel = {
    align: "left", bgcolor: palette.ground, bordercolor: palette.faint, font: { color: palette.ink, size: 12 },
  };
}

const plotConfig = {
  responsive: true,
  scrollZoom: true,
  displaylogo: false,
  doubleClick: "reset",
  // All there are: plotly.js 4 would add one that sends the picture's data to its makers.
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d"]],
  showSendToCloud: false,
  plotlyServerURL: "",
};

function draw() {
  const shown = shownEdges();
  const lit = highlight(shown);
  paintLayout();
  const traces = [...lineTraces(shown, lit), nodeTrace(shown, lit)];
  return Plotly.react(plot, traces, plotLayout, plotConfig).then(() => ({ shown, lit }));
}

function moveTo(ranges) {
  return Plotly.relayout(plot, { "xaxis.range": ranges.x, "yaxis.range": ranges.y });
}

// At most half of the whole picture, with the node in its middle.
function centreOn(i) {
  const around = (now, full, middle) => {
    const half = Math.min(now[1] - now[0], (full[1] - full[0]) / 2) / 2;
    return [middle - half, middle + half];
  };
  return moveTo({
    x: around(plotLayout.xaxis.range, whole.x, nodes[i].x),
    y: around(plotLayout.yaxis.range, whole.y, nodes[i].y),
  });
}
