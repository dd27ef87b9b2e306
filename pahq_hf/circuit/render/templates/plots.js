(() => {
"use strict";
for (const [number, plot] of JSON.parse(document.getElementById("data").textContent).entries()) {
  Plotly.newPlot(`plot-${number}`, plot.data, plot.layout, {responsive: true, displaylogo: false});
}
})();
