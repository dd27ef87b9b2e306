// The page around the picture: search, slider, lists, details, theme.

const element = (id) => document.getElementById(id);
const startEdges = 4000; // more than these at once is a grey square, and slow
let last = { shown: edges, lit: null };
let turn = 0; // of the latest wish to draw, and of the latest picture
let drawn = -1;
let waiting = false;

// However often the slider moves, there is one picture per frame.
function update() {
  turn++;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    const now = turn;
    waiting = false;
    showCount();
    showDetails();
    draw().then((result) => {
      last = result;
      drawn = now;
    });
  });
}

function select(selection) {
  state.selected = selection;
  for (const [i, entry] of [...element("top").children].entries()) {
    const chosen = selection !== null && selection.edge === ranking[i].number;
    entry.firstChild.setAttribute("aria-pressed", String(chosen));
  }
  update();
}

// -- lists of edges ---------------------------------------------------------------------------------

function item(texts, selection) {
  const button = document.createElement("button");
  const parts = texts.map((text) => {
    const part = document.createElement("span");
    part.textContent = text;
    return part;
  });
  button.type = "button";
  button.append(...parts);
  button.addEventListener("click", () => select(selection));
  const entry = document.createElement("li");
  entry.append(button);
  return entry;
}

function edgeItems(list) {
  return list.map((edge) => item([edge.name, scoreText(edge)], { edge: edge.number }));
}

function showDetails() {
  const box = element("details");
  const list = box.querySelector("ol");
  const focused = list.contains(document.activeElement);
  box.hidden = state.selected === null;
  if (state.selected === null) return;
  const { node } = state.selected;
  let title, text, entries;
  if (node === undefined) {
    const edge = edges[state.selected.edge];
    title = edge.name;
    text = compares ? `${edge.group}; score ${scoreText(edge)}` : `score ${scoreText(edge)}`;
    entries = [edge.writer, ...edge.targets].map((i) => item([nodes[i].name], { node: i }));
  } else {
    const others = highlight(shownEdges()).nodes.size - 1;
    const near = [...all.into[node], ...all.outOf[node]].sort((a, b) => b.strength - a.strength);
    title = nodes[node].name;
    const own = nodeScore(node);
    text =
      (own === "" ? "" : `${own}; `) +
      `${all.into[node].length} in, ${all.outOf[node].length} out; ` +
      `${others.toLocaleString("en")} other nodes on paths through it`;
    entries = edgeItems(near.slice(0, 8));
  }
  box.querySelector("h2").textContent = title;
  box.querySelector("p").textContent = text;
  list.replaceChildren(...entries);
  if (focused) list.querySelector("button").focus(); // so that the keyboard can walk along
}

// -- which edges are shown --------------------------------------------------------------------------

const slider = element("cut");
slider.max = String(Math.min(1000, Math.max(0, strengths.length - 1)));
slider.disabled = strengths.length < 2;

function cutAt(position) {
  const share = Number(slider.max) ? position / Number(slider.max) : 0;
  return strengths.length ? strengths[Math.round(share * (strengths.length - 1))] : 0;
}

function showCount() {
  const shown = shownEdges().length;
  const value = String(Number(state.cut.toPrecision(4)));
  const text = `${shown.toLocaleString("en")} of ${edges.length.toLocaleString("en")} edges shown`;
  element("cut-value").textContent = value;
  element("count").textContent = text;
  slider.setAttribute("aria-valuetext", `${value}: ${text}`);
}

slider.addEventListener("input", () => {
  state.cut = cutAt(Number(slider.value));
  update();
});

function startCut() {
  let position = 0;
  if (edges.length > startEdges) {
    const wanted = ranking[startEdges - 1].strength;
    while (position < Number(slider.max) && cutAt(position) < wanted) position++;
  }
  slider.value = String(position);
  state.cut = cutAt(position);
}

function showLegend() {
  const labels = groups.map((group) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    const swatch = document.createElement("i");
    const count = edges.filter((edge) => edge.group === group).length;
    box.type = "checkbox";
    box.checked = !state.hiddenGroups.has(group);
    box.addEventListener("change", () => {
      if (box.checked) state.hiddenGroups.delete(group);
      else state.hiddenGroups.add(group);
      update();
    });
    swatch.style.background = color(group);
    label.append(box, swatch, `${group} (${count.toLocaleString("en")})`);
    return label;
  });
  const title = element("legend").querySelector("legend");
  element("legend").replaceChildren(title, ...labels);
}

// -- search -----------------------------------------------------------------------------------------

const search = element("search");

function find(finished) {
  const wanted = search.value.trim().toLowerCase();
  const found = element("found");
  if (wanted === "") {
    found.textContent = "";
    return;
  }
  const near = nodes.map((node) => node.name.toLowerCase()).filter((name) => name.startsWith(wanted));
  const hit = numberOf.has(wanted) ? wanted : finished || near.length === 1 ? near[0] : undefined;
  if (hit !== undefined) {
    const i = numberOf.get(hit);
    found.textContent = `${nodes[i].name} is highlighted`;
    select({ node: i });
    centreOn(i);
  } else if (near.length) {
    found.textContent = `${near.length} nodes begin with this`;
  } else {
    found.textContent = `No node of this circuit matches “${search.value.trim()}”`;
  }
}

search.addEventListener("input", () => find(false));
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") find(true);
});

// -- light and dark ---------------------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;

function showTheme() {
  theme = chosenTheme ?? (prefersDark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  element("theme").textContent = theme === "dark" ? "Light" : "Dark";
  showLegend();
}

element("theme").addEventListener("click", () => {
  chosenTheme = theme === "dark" ? "light" : "dark";
  showTheme();
  update();
});
prefersDark.addEventListener("change", () => {
  showTheme();
  update();
});

// -- pointer and keys -------------------------------------------------------------------------------

let pressed = [0, 0];

// Plotly's own click event speaks of what the pointer last rested on, which a quick hand has left.
function nearest(trace, x, y) {
  const { xaxis, yaxis } = plot._fullLayout;
  let best = { distance: Infinity, item: null };
  trace.x.forEach((_, i) => {
    const distance = Math.hypot(xaxis.d2p(trace.x[i]) - x, yaxis.d2p(trace.y[i]) - y);
    if (distance < best.distance) best = { distance, item: trace.customdata[i] };
  });
  return best;
}

function clicked(event) {
  const { xaxis, yaxis } = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  const x = event.clientX - box.left - xaxis._offset;
  const y = event.clientY - box.top - yaxis._offset;
  const traceOf = (meta) => plot.data.find((trace) => trace.meta === meta);
  const node = nearest(traceOf("nodes"), x, y);
  const edge = nearest(traceOf("edges"), x, y);
  if (node.distance <= markerSize / 2 + 4) select({ node: node.item });
  else if (edge.distance <= plotLayout.hoverdistance) select({ edge: edge.item });
  else select(null);
}

function listenToPlot() {
  plot.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; }, true);
  plot.addEventListener("click", (event) => {
    const moved = Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]);
    if (moved < 6 && !event.target.closest(".modebar")) clicked(event);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") select(null);
});
element("clear").addEventListener("click", () => {
  select(null);
  search.focus();
});
element("reset").addEventListener("click", () => moveTo(whole));

// -- start ------------------------------------------------------------------------------------------

element("names").append(...nodes.map((node) => new Option(node.name)));
element("top").append(...edgeItems(ranking.slice(0, 40)));
startCut();
showTheme();
showCount();
draw().then((result) => {
  last = result;
  drawn = 0;
  listenToPlot();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.pahq.openedAfter = performance.now(); }));
});

// For tests, and for whoever is curious in the console.
window.pahq = {
  nodes: nodes.length,
  edges: edges.length,
  openedAfter: null, // milliseconds until the first picture was on the screen
  idle: () => drawn === turn && window.pahq.openedAfter !== null,
  theme: () => theme,
  cut: () => state.cut,
  visibleEdges: () => last.shown.map((edge) => edge.name),
  highlightedNodes: () => (last.lit === null ? [] : [...last.lit.nodes].map((i) => nodes[i].name)),
  highlightedLines: () =>
    last.shown.flatMap((edge) =>
      edge.targets
        .filter((target) => last.lit !== null && last.lit.line(edge, target))
        .map((target) => [edge.name, nodes[target].name]),
    ),
  // Where a node is on the screen.
  position: (name) => {
    const { xaxis, yaxis } = plot._fullLayout;
    const node = nodes[numberOf.get(name)];
    const box = plot.getBoundingClientRect();
    return [
      box.left + xaxis._offset + xaxis.d2p(node.x),
      box.top + yaxis._offset + yaxis.d2p(node.y),
    ];
  },
};
