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
  for (const button of document.querySelectorAll("li button")) {
    const pressed = selection !== null && selection.edge === Number(button.dataset.edge);
    button.setAttribute("aria-pressed", String(pressed));
  }
  update();
}

// -- lists of edges ---------------------------------------------------------------------------------

function edgeItems(list) {
  return list.map((edge) => {
    const button = document.createElement("button");
    const name = document.createElement("span");
    const score = document.createElement("span");
    name.textContent = edge.name;
    score.textContent = scoreText(edge);
    button.type = "button";
    button.dataset.edge = edge.number;
    button.setAttribute("aria-pressed", String(state.selected !== null && state.selected.edge === edge.number));
    button.append(name, score);
    button.addEventListener("click", () => select({ edge: edge.number }));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
}

function showDetails() {
  const box = element("details");
  // An edge picked from a node's list leaves that list in place.
  const node = state.selected === null ? null : state.selected.node;
  box.hidden = state.selected === null;
  if (state.selected === null) return;
  const lit = highlight(shownEdges());
  const text = box.querySelector("p");
  if (node === undefined) {
    const edge = edges[state.selected.edge];
    box.querySelector("h2").textContent = edge.name;
    text.textContent = compares ? `${edge.group}; ${scoreText(edge)}` : `score ${scoreText(edge)}`;
    return;
  }
  box.querySelector("h2").textContent = nodes[node].name;
  text.textContent =
    `${all.into[node].length} in, ${all.outOf[node].length} out; ` +
    `${(lit.nodes.size - 1).toLocaleString("en")} nodes on paths through it`;
  const near = [...all.into[node], ...all.outOf[node]].sort((a, b) => b.strength - a.strength);
  box.querySelector("ol").replaceChildren(...edgeItems(near.slice(0, 8)));
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

let hit = false; // Plotly reports a click on a point just before the page sees the click itself

function listenToPlot() {
  plot.on("plotly_click", (event) => {
    const point = event.points[event.points.length - 1];
    hit = true;
    select(point.data.meta === "nodes" ? { node: point.customdata } : { edge: point.customdata });
  });
  plot.addEventListener("click", (event) => {
    if (!hit && !event.target.closest(".modebar")) select(null);
    hit = false;
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
